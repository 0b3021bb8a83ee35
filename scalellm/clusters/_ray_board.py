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
        saved: paths of the checkpoints of this attempt, oldest first.
        is_over: whether rank 0 has ended in this attempt, and not by dying.
    """

    stop: str | None = None
    saved: list[str] = field(default_factory=list)
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

    def begin(self, nodes: list[str]) -> None:
        """A new attempt; `nodes` are the addresses of the ranks' nodes. Ray's controller calls."""
        self._attempt += 1
        self._status = Status(stop=self._stop)
        self._training = set()
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
        elif event["kind"] == "saved":
            self._status.saved.append(event["path"])
        elif event["kind"] in ("exited", "lost"):
            self._training.discard(event["rank"])
            if event["kind"] == "exited" and event["rank"] == 0 and not event["died"]:
                self._status.is_over = True

    def lost(self, ranks: dict[int, str]) -> None:
        """Takes what Ray says of workers that cannot speak any more: rank -> cause."""
        events = [{"kind": "lost", "rank": rank, "cause": text} for rank, text in ranks.items()]
        self.post(self._attempt, events)

    def leave(self, reason: str) -> int:
        """Asks the ranks of this attempt to save and stop; returns how many still train."""
        self._status.stop = reason
        return len(self._training)

    def read(self, start: int) -> tuple[int, list[Event]]:
        """Returns the events from number `start` on, and the number of the next one."""
        fresh = self._events[max(0, start - self._first) :]
        return self._first + len(self._events), fresh

    def stop(self, reason: str) -> None:
        """Asks the ranks of this and all later attempts to save and stop."""
        self._stop = self._status.stop = reason
