"""One line for each thing that happens to a run, one count for each failure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalellm.clusters import _ray_story
from scalellm.clusters._ray_causes import cause_of_end, cause_of_loss
from scalellm.clusters._ray_story import JOURNAL, Story

BROKEN_PEER = "lost another rank: Connection closed by peer [10.0.0.2]:1"
REASON = "raised RuntimeError: no memory"


class Run:
    """A story with a clock of its own, in seconds."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, max_failures: int = 3, attempt: int = 0
    ) -> None:
        self.now_s = 1000.0
        self.attempt = attempt
        self.said: list[str] = []
        self.story = Story(folder, max_failures, self.said.append)
        patch.setattr(_ray_story, "time", SimpleNamespace(time=lambda: self.now_s))

    def take(self, kind: str, **values: Any) -> None:
        self.story.take({"kind": kind, "attempt": self.attempt, "time_s": self.now_s, **values})

    def begin(self, *nodes: str) -> None:
        self.take("begun", nodes=nodes)

    def exit(self, rank: int, cause: str, code: int = 1, **values: Any) -> None:
        values = {"died": True, "preempted": False, **values}
        self.take("exited", rank=rank, node=f"10.0.0.{rank}", code=code, cause=cause, **values)

    def wait(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.story.tick()

    def fail(self) -> None:
        """All ranks of an attempt die, and the next one begins."""
        self.exit(1, REASON)
        self.wait(2.0)
        self.attempt += 1
        self.begin("10.0.0.0", "10.0.0.2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path, monkeypatch)
    made.begin("10.0.0.0", "10.0.0.1")
    return made


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def test_lines_of_other_ranks_are_marked(run: Run, tmp_path: Path) -> None:
    run.take("line", rank=0, text="step 1")
    run.take("line", rank=2, text="step 1")
    run.wait(9.0)
    assert run.said == ["step 1", "[rank 2] step 1"]
    assert not (tmp_path / JOURNAL).exists()


def test_ours_go_to_stderr_and_the_ranks_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story(tmp_path, 0)
    story.take({"kind": "line", "rank": 0, "text": "step 1"})
    story.take({"kind": "surplus", "world_size": 3, "usable": 2})
    out, err = capsys.readouterr()
    assert out == "step 1\n"
    assert err.startswith("scalellm: there is room for 3 ranks, of which 2 train: ")


def test_a_quiet_beginning_is_written_down(run: Run, tmp_path: Path) -> None:
    run.take("spawned", rank=0, pid=7)
    run.take("started", rank=0, step=0, world_size=2)
    assert run.said == [] and run.story.code is None
    spawned, started = rows(tmp_path)
    assert (spawned["kind"], spawned["pid"]) == ("spawned", 7)
    assert (started["kind"], started["nodes"]) == ("started", ["10.0.0.0", "10.0.0.1"])


def _lost(run: Run) -> None:
    run.take("lost", rank=1, cause="is gone: its node died or was cut off")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param(
            [lambda run: run.exit(0, BROKEN_PEER), lambda run: run.exit(1, REASON)],
            f"rank 1 on 10.0.0.1 {REASON}",
            id="a reason, not a broken peer",
        ),
        pytest.param(
            [lambda run: run.exit(0, BROKEN_PEER), _lost],
            "rank 1 on 10.0.0.1 is gone: its node died or was cut off",
            id="a lost node, not a broken peer",
        ),
        pytest.param(
            [_lost, lambda run: run.exit(0, REASON)],
            f"rank 0 on 10.0.0.0 {REASON}",
            id="a reason, not a lost node",
        ),
        pytest.param(
            [
                lambda run: run.exit(0, "was asked to stop, and saved", 3, preempted=True),
                lambda run: run.exit(1, BROKEN_PEER),
            ],
            f"rank 1 on 10.0.0.1 {BROKEN_PEER}",
            id="a broken peer, not one that made room",
        ),
    ],
)
def test_of_all_that_die_the_one_that_knows_why_is_told(
    run: Run, tmp_path: Path, what: list[Any], words: str
) -> None:
    for happens in what:
        happens(run)
        run.wait(0.5)
        assert run.said == []  # more may come
    assert not run.story.has_room
    run.wait(4.0)
    run.exit(0, "raised RuntimeError: late")
    run.wait(9.0)
    going_on = "going on from the last checkpoint (failure 1 of at most 3)"
    assert run.said == [f"scalellm: {words}; {going_on}"]
    assert [row["cause"] in words for row in rows(tmp_path)] == [True]


def test_a_recovery_is_timed_and_counted_once(run: Run, tmp_path: Path) -> None:
    run.fail()
    assert run.story.has_room
    run.wait(9.5)
    run.take("started", rank=0, step=40, world_size=2)
    assert run.said[1:] == [
        "scalellm: going on from step 40 with 2 ranks on 10.0.0.0, 10.0.0.2, 11.5 s later"
    ]
    assert [row["kind"] for row in rows(tmp_path)] == ["exited", "started", "recovered"]
    assert rows(tmp_path)[2]["recovery_s"] == 11.5
    run.attempt += 1  # the next start is no recovery
    run.begin("10.0.0.0")
    run.take("started", rank=0, step=50, world_size=1)
    assert run.said[2:] == [
        "scalellm: going on from step 50 with 1 ranks on 10.0.0.0: the cluster changed"
    ]
    assert rows(tmp_path)[-1]["kind"] == "resized"


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_the_failure_after_the_last_allowed_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_failures: int
) -> None:
    run = Run(tmp_path, monkeypatch, max_failures)
    for number in range(1, max_failures + 1):
        run.fail()
        assert f"(failure {number} of at most {max_failures})" in run.said[-1]
        assert run.story.code is None
    run.fail()
    assert run.story.code == 1
    number = max_failures + 1
    assert run.said[-1].endswith(
        f"that was failure {number} of at most {max_failures} (cluster.max_failures="
        f"{max_failures}): go on later with --resume auto"
    )


def test_any_number_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, max_failures=-1)
    for _ in range(30):
        run.fail()
    assert run.story.code is None
    assert run.said[-1].endswith("going on from the last checkpoint (failure 30)")


def test_a_node_taken_away_is_told_once_and_is_no_failure(run: Run, tmp_path: Path) -> None:
    for node in ("10.0.0.0", "10.0.0.1"):
        run.take("preempted", rank=0, node=node)
    run.exit(0, "was asked to stop, and saved", 3, preempted=True)
    run.exit(1, BROKEN_PEER)
    run.wait(9.0)
    assert run.said == ["scalellm: node 10.0.0.0 is being taken away: saving, then going on"]
    run.attempt += 1
    run.begin("10.0.0.0")
    run.take("started", rank=0, step=4, world_size=1)
    assert run.said[1].endswith("9.0 s later")
    run.fail()
    assert "(failure 1 of at most 3)" in run.said[2]
    assert rows(tmp_path)[0]["kind"] == "preempted"


def test_a_rank_stopped_from_outside_is_no_failure(run: Run) -> None:
    run.exit(0, "was asked to stop, and saved", 3, preempted=True)
    run.wait(9.0)
    cause = "was asked to stop, and saved"
    assert run.said == [f"scalellm: rank 0 on 10.0.0.0 {cause}; going on from there"]
    run.attempt += 1
    run.fail()
    assert "(failure 1 of at most 3)" in run.said[-1]


@pytest.mark.parametrize(("code", "ends_with"), [(0, None), (3, None), (2, 2)])
def test_a_rank_that_ends_by_itself(run: Run, code: int, ends_with: int | None) -> None:
    run.exit(0, "ended", code, died=False)
    run.wait(9.0)
    assert (run.story.code, run.said) == (ends_with, [])


def test_a_driver_that_does_not_see_the_folder_still_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "not here", monkeypatch)
    run.begin("10.0.0.0")
    run.fail()
    assert len(run.said) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "lines", "cause"),
    [
        (-9, ["ValueError: x"], "was ended by SIGKILL (out of memory?)"),
        (-11, [], "was ended by SIGSEGV"),
        (-35, [], "was ended by signal 35"),
        (1, ["RuntimeError: [gloo] Connection reset by peer. x"], "lost another rank: Connection"),
        (1, ["[rank0]: KeyError: 'x'"], "raised KeyError: 'x'"),
        (3, ["scalellm: x"], "was asked to stop, and saved"),
        (2, ["scalellm: no data", "  in y"], "said: no data"),
        (1, ["ValueError: old", "x", "torch.OutOfMemoryError: new"], "raised torch.OutOfMemoryErr"),
        (1, ["KeyError: 1", "scalellm: gave up"], "said: gave up"),
        (1, ["  ValueError: quoted", "an Error"], "ended with exit code 1"),
        (7, [], "ended with exit code 7"),
    ],
)
def test_why_a_rank_has_ended(code: int, lines: list[str], cause: str) -> None:
    assert cause_of_end(code, lines).startswith(cause)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("RankDiedError: rank 1: killed"), ""),  # it has told us itself
        (RuntimeError("rank 0 on 10.0.0.3: lost another rank: Connection reset by peer"), ""),
        (RuntimeError("The actor died because its node has died."), "is gone: its node died or"),
        (RuntimeError("The node is dead"), "is gone: its node died or"),
        (RuntimeError("The node: worker process has died"), "is gone: its Ray worker was killed"),
        (RuntimeError("\nfirst\nsecond"), "is gone: first"),
        (RuntimeError(), "is gone: RuntimeError()"),
        (RuntimeError("x" * 999), f"is gone: {'x' * 200}"),
    ],
)
def test_why_a_worker_is_lost(error: Exception, cause: str) -> None:
    found = cause_of_loss(error)
    assert found.startswith(cause) and "\n" not in found and len(found) < 220
    assert bool(found) == bool(cause)


def test_failures_that_are_read_at_once_are_all_counted(run: Run) -> None:
    run.exit(0, "raised RuntimeError: one")
    run.attempt += 1
    run.exit(0, "raised RuntimeError: two")
    run.wait(9.0)
    assert ["(failure 1 of" in words or "(failure 2 of" in words for words in run.said] == [
        True
    ] * 2
