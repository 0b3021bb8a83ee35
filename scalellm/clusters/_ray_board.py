"""What the workers of one run tell its driver, and the driver them: one small Ray actor.

Ray Train's own channel, `ray.train.report`, is a barrier of all workers and takes seconds; lines of
text and the order to stop should not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
# The driver reads several times a second; what piles up when it does not is cut at the old end.
_MOST_EVENTS = 100_000


@dataclass
class Status:
    """What a worker needs to know of its run.

    Attributes:
        stop: why the ranks are to save and stop; None: go on.
        kill: those that have not stopped yet will not: a peer is gone.
        reports: paths of checkpoints that every worker is to report to Ray, oldest first.
        is_over: whether rank 0 has ended in this attempt, and not by dying.
    """

    stop: str | None = None
    kill: bool = False
    reports: list[str] = field(default_factory=list)
    is_over: bool = False


class Board:
    """Events in the order they came. An attempt is one start of all ranks."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._first = 0
        self._attempt = -1
        self._stop: str | None = None
        self._status = Status()
        self._training: set[int] = set()
        self._has_died = False

    def begin(self, nodes: list[str]) -> None:
        """A new attempt; `nodes` are the addresses of the ranks' nodes. Ray's controller calls."""
        self._attempt += 1
        self._status = Status(stop=self._stop)
        self._training = set()
        self._has_died = False
        self.post(self._attempt, [{"kind": "begun", "nodes": nodes}])

    def attempt(self) -> int:
        return self._attempt

    def post(self, attempt: int, events: list[Event]) -> Status:
        """Takes events of one worker; each has `kind` and gets `attempt` and `time_s`."""
        now_s = time.time()
        for event in events:
            self._events.append({**event, "attempt": attempt, "time_s": now_s})
            if attempt == self._attempt:
                self._note(event)
        surplus = len(self._events) - _MOST_EVENTS
        if surplus > 0:
            del self._events[:surplus]
            self._first += surplus
        return self._status

    def _note(self, event: Event) -> None:
        if event["kind"] == "spawned":
            self._training.add(event["rank"])
        elif event["kind"] == "reporting":
            self._status.reports.append(event["path"])
        elif event["kind"] in ("exited", "lost"):
            self._training.discard(event["rank"])
            self._has_died |= event.get("died", True)
            if event["kind"] == "exited" and event["rank"] == 0 and not event["died"]:
                self._status.is_over = True

    def lost(self, ranks: dict[int, str]) -> None:
        """Takes what Ray says of workers that cannot speak any more: rank -> cause."""
        events = [{"kind": "lost", "rank": rank, "cause": text} for rank, text in ranks.items()]
        self.post(self._attempt, events)

    def leave(self, reason: str) -> tuple[int, bool]:
        """Asks the ranks of this attempt to save and stop.

        Returns:
            How many still train, and whether one of them has died.
        """
        self._status.stop = reason
        return len(self._training), self._has_died

    def kill(self) -> None:
        """Ends the ranks of this attempt at once."""
        self._status.kill = True

    def read(self, start: int) -> tuple[int, list[Event]]:
        """Returns the events from number `start` on, and the number of the next one."""
        fresh = self._events[max(0, start - self._first) :]
        return self._first + len(self._events), fresh

    def stop(self, reason: str) -> None:
        """Asks the ranks of this and all later attempts to save and stop."""
        self._stop = self._status.stop = reason
