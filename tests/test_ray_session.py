"""A cluster that was lost is joined again once it lets anybody in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from scalellm import ray_session as session_module
from scalellm.errors import UserError
from scalellm.ray_session import Session, ray_session_again

BACK = Session("127.0.0.1:6379", is_local=False, hosts=("127.0.0.1",))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_AGAIN_AFTER_S", 0.01)


def test_a_cluster_that_refuses_at_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, seen = iter(["not yet", "not yet", "no node of mine", None]), []

    @contextmanager
    def session(address: str | None) -> Iterator[Session]:
        if (problem := next(answers)) is not None:
            raise UserError(problem)
        yield BACK
        seen.append("left")

    monkeypatch.setattr(session_module, "ray_session", session)
    with ray_session_again(BACK.address, 60, lambda: False) as made:
        assert made is BACK and not seen
    assert seen == ["left"]
    said = capsys.readouterr().err.splitlines()  # once each
    assert said == ["scalellm: trying again: not yet", "scalellm: trying again: no node of mine"]


def test_it_gives_up_with_the_last_reason(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")  # not in the time measured
    sentence = "no Ray cluster answers at 127.0.0.1:1 within 5 s"
    with pytest.raises(UserError, match=sentence) as given_up:  # noqa: SIM117
        with ray_session_again("127.0.0.1:1", 0.3, bool):
            pass
    assert "for 0.3 s (cluster.wait_for_nodes_s): go on" in str(given_up.value)
    assert sentence in capsys.readouterr().err


def test_who_asks_it_to_stop_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    asked = r"asked to stop while .* no Ray cluster .* --resume auto"
    with pytest.raises(UserError, match=asked), ray_session_again("127.0.0.1:1", 9, lambda: True):
        pass
    assert not capsys.readouterr().err


def test_what_fails_inside_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def session(address: str | None) -> Iterator[Session]:
        yield BACK

    monkeypatch.setattr(session_module, "ray_session", session)
    times = 0
    with pytest.raises(UserError, match="a mistake"), ray_session_again("a:1", 60, bool):
        times += 1
        raise UserError("a mistake")
    assert times == 1
