"""The run as its driver tells it: the ranks' own lines, and one for each thing that happens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalellm.clusters._ray_board import Event
from scalellm.errors import EXIT_FAILURE, EXIT_USER_ERROR

JOURNAL = "cluster.jsonl"
# When a rank dies its peers fail too: how long to wait for the one that knows why.
_GATHER_S = 1.5
_GATHER_LONGER_S = 4.0  # as long as all that is known is that somebody else is gone
_PEER_LOST = ("lost another rank", "NCCL", "DistNetworkError", "ranks failed")


class Story:
    """Reads events in order; prints, counts failures, and says when the run cannot go on.

    Attributes:
        code: the exit code of a run that must end now; None as long as it may go on.
        has_room: whether Ray has found room for the ranks, as far as known.
        has_trained: whether they have ever begun to train.
    """

    def __init__(
        self, run_dir: Path, max_failures: int, say: Callable[[str], None] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._max_failures = max_failures
        self._say = say or _print
        self._failures = 0
        self._failed_attempts: set[int] = set()
        self._failed_s: float | None = None
        self._gathering: list[Event] = []
        self._gather_until_s = 0.0
        self._nodes: dict[int, str] = {}
        self.code: int | None = None
        self.has_room = False
        self.has_trained = False

    def take(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "line":
            prefix = "" if event["rank"] == 0 else f"[rank {event['rank']}] "
            self._say(prefix + event["text"])
            return
        if kind == "begun":
            self._nodes = dict(enumerate(event["nodes"]))
            self.has_room = True
        elif kind == "surplus":
            self._say(
                f"scalellm: there is room for {event['world_size']} ranks, of which "
                f"{event['usable']} train: the configuration does not work with more of them"
            )
        elif kind == "spawned":
            self._journal(event)
        elif kind == "started":
            self._on_started(event)
        elif kind == "preempted" and event["attempt"] not in self._failed_attempts:
            self._failed_attempts.add(event["attempt"])
            self._failed_s = event["time_s"]
            self._tell(event, f"node {event['node']} is being taken away: saving, then going on")
        elif kind == "exited" and event["code"] == EXIT_USER_ERROR:
            self.code = EXIT_USER_ERROR
        elif kind == "lost" or (kind == "exited" and event["died"]):
            self._on_failure(event)

    def tick(self) -> None:
        """Call it often: says what was gathered of a failure once nothing more is to come."""
        if self._gathering and time.time() >= self._gather_until_s:
            self._conclude()

    def _conclude(self) -> None:
        event = min(self._gathering, key=_says_less)
        self._gathering = []
        who = f"rank {event['rank']}"
        node = event.get("node") or self._nodes.get(event["rank"])
        words = f"{who} on {node} {event['cause']}" if node else f"{who} {event['cause']}"
        if event.get("preempted"):
            self._tell(event, f"{words}; going on from there")
            return
        self._failures += 1
        if self._max_failures < 0:
            count = f"failure {self._failures}"
        else:
            count = f"failure {self._failures} of at most {self._max_failures}"
        if 0 <= self._max_failures < self._failures:
            self.code = EXIT_FAILURE
            limit = f"cluster.max_failures={self._max_failures}"
            self._tell(
                event, f"{words}; that was {count} ({limit}): go on later with --resume auto"
            )
        else:
            self._tell(event, f"{words}; going on from the last checkpoint ({count})")

    def _on_started(self, event: Event) -> None:
        self.has_trained = True
        nodes = sorted(set(self._nodes.values()))
        self._journal(event | {"nodes": nodes})
        if event["attempt"] == 0:
            return
        words = f"going on from step {event['step']} with {event['world_size']} ranks"
        if self._failed_s is not None:
            recovery_s = event["time_s"] - self._failed_s
            self._failed_s = None
            self._tell(
                event | {"kind": "recovered", "recovery_s": recovery_s},
                f"{words} on {', '.join(nodes)}, {recovery_s:.1f} s later",
            )
        else:
            self._tell(
                event | {"kind": "resized"}, f"{words} on {', '.join(nodes)}: the cluster changed"
            )

    def _on_failure(self, event: Event) -> None:
        self.has_room = False
        if self._gathering and event["attempt"] != self._gathering[0]["attempt"]:
            self._conclude()
        if event["attempt"] in self._failed_attempts:
            if self._gathering:
                self._gathering.append(event)
                if _says_less(event) < 2:
                    self._gather_until_s = min(self._gather_until_s, time.time() + _GATHER_S)
            return
        self._failed_attempts.add(event["attempt"])
        self._failed_s = event["time_s"]
        self._gathering = [event]
        patience_s = _GATHER_S if _says_less(event) < 2 else _GATHER_LONGER_S
        self._gather_until_s = time.time() + patience_s

    def _tell(self, event: Event, words: str) -> None:
        self._say(f"scalellm: {words}")
        self._journal(event)

    def _journal(self, event: Event) -> None:
        """Adds a row to the run folder, if the driver sees it."""
        with suppress(OSError), (self._run_dir / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _says_less(event: Event) -> int:
    """Orders what is known of a failure: the cause itself, a node that is gone, a broken peer."""
    if event["kind"] == "lost":
        return 1
    if event["preempted"]:
        return 3
    return 2 if any(word in event["cause"] for word in _PEER_LOST) else 0


def _print(text: str) -> None:
    stream: Any = sys.stderr if text.startswith("scalellm: ") else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # who listened has left; the run does not depend on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
