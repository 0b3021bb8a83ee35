"""What ranks tell their driver, and it them, without Ray: the actor is a plain class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scalellm.clusters import _ray_board
from scalellm.clusters._ray_board import Board, Status


def spawned(rank: int) -> dict[str, Any]:
    return {"kind": "spawned", "rank": rank}


def exited(rank: int, *, died: bool = False) -> dict[str, Any]:
    return {"kind": "exited", "rank": rank, "died": died}


@pytest.fixture
def board() -> Board:
    """Two ranks train in the first attempt."""
    made = Board()
    made.begin(["10.0.0.1", "10.0.0.2"])
    made.post(0, [spawned(0), spawned(1)])
    return made


def kinds(board: Board, start: int = 0) -> list[tuple[int, str]]:
    return [(event["attempt"], event["kind"]) for event in board.read(start)[1]]


def test_events_are_read_once_and_in_order(board: Board) -> None:
    end, events = board.read(0)
    assert end == 3 and board.read(end) == (3, [])
    assert kinds(board) == [(0, "begun"), (0, "spawned"), (0, "spawned")]
    assert events[0]["nodes"] == ["10.0.0.1", "10.0.0.2"]
    assert all(event["time_s"] > 0 for event in events)
    board.begin(["10.0.0.2"])
    board.post(0, [{"kind": "line", "rank": 1, "text": "late"}])
    assert board.attempt() == 1
    assert kinds(board, end) == [(1, "begun"), (0, "line")]


def test_a_reader_that_is_late_misses_the_oldest(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ray_board, "_MOST_EVENTS", 4)
    for number in range(10):
        board.post(0, [{"kind": "line", "rank": 0, "text": number}])
    end, events = board.read(5)
    assert (end, [event["text"] for event in events]) == (13, [6, 7, 8, 9])
    assert [event["text"] for event in board.read(12)[1]] == [9]
    assert board.read(13) == (13, [])


def test_a_stop_holds_for_later_attempts_too(board: Board) -> None:
    assert board.post(0, []) == Status()
    board.stop("SIGTERM")
    assert board.post(0, []).stop == "SIGTERM"
    board.begin(["10.0.0.1"])
    assert board.post(1, []) == Status(stop="SIGTERM")


def test_room_is_made_and_ranks_are_killed_in_one_attempt_only(board: Board) -> None:
    assert board.leave("a change") == (2, False)
    board.kill()
    board.post(0, [{"kind": "reporting", "rank": 0, "path": "/a"}, exited(0)])
    assert board.post(0, []) == Status("a change", kill=True, reports=["/a"], is_over=True)
    board.begin(["10.0.0.1"])
    assert board.post(1, []) == Status()
    assert board.leave("a change") == (0, False)


@pytest.mark.parametrize(
    ("event", "left", "has_died"),
    [
        (exited(1), 1, False),
        (exited(1, died=True), 1, True),
        (exited(7), 2, False),  # it never began
        ({"kind": "line", "rank": 1, "text": "hello"}, 2, False),
    ],
)
def test_who_still_trains(board: Board, event: dict[str, Any], left: int, has_died: bool) -> None:
    board.post(0, [event])
    assert board.leave("a change") == (left, has_died)


def test_what_ray_says_of_a_worker_that_is_gone(board: Board) -> None:
    board.lost({1: "is gone"})
    assert board.leave("a change") == (1, True)
    [event] = board.read(3)[1]
    assert event == {
        **{"kind": "lost", "rank": 1, "cause": "is gone"},
        **{"attempt": 0, "time_s": event["time_s"]},
    }


@pytest.mark.parametrize(
    ("event", "is_over"),
    [(exited(0), True), (exited(0, died=True), False), (exited(1), False)],
)
def test_it_is_over_when_rank_0_says_so(board: Board, event: dict[str, Any], is_over: bool) -> None:
    assert board.post(0, [event]).is_over == is_over


def test_a_late_word_of_an_earlier_attempt_changes_nothing(board: Board) -> None:
    board.begin(["10.0.0.1", "10.0.0.2"])
    board.post(1, [spawned(0), spawned(1)])
    before = replace(board.post(1, []))
    late = [exited(0, died=True), exited(1), {"kind": "reporting", "rank": 0, "path": "/old"}]
    assert board.post(0, late) == before
    assert board.leave("a change") == (2, False)
