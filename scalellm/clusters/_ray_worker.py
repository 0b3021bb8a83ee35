"""What a Ray Train worker does: start one rank as a process of its own, watch it, report.

The rank is the same `python -m scalellm train` that any launcher starts: it has its own signals and
main thread (Ray runs a training function in a side thread, where Python handles none), it can be
asked to save when its worker dies, and nothing of Ray runs beside its steps.
"""

from __future__ import annotations

import json
import os
import queue
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalellm.clusters._ray_board import Event, Status
from scalellm.clusters._ray_causes import cause_of_end
from scalellm.errors import EXIT_DONE, EXIT_STOPPED_BY_SIGNAL, EXIT_USER_ERROR

POLL_S = 1.0  # what is said here must not cost the ranks anything: they share these cores
_REPORT_WITHIN_S = 30.0
TRACEBACK = "Traceback (most recent call last):"
LOG_FOLDER = "ray"


class RankDiedError(Exception):
    """A rank ended without having said that it was done: Ray starts all of them again."""


def work(job: dict[str, Any]) -> dict[str, int]:
    """Runs one rank to its end; returns `{"code": exit code}`. Called by Ray on every worker.

    Args:
        job: `config` (YAML text), `resume`, `run_dir`, `path` (import path), `usable` (how many
            ranks can train, by how many there are), `board`.

    Raises:
        RankDiedError: the rank was killed, raised, or stopped because its node is taken away.
    """
    import ray.train.collective

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    meeting: dict[str, Any] = ray.train.collective.broadcast_from_rank_zero(
        _meeting(job) if rank == 0 else None
    )
    usable = job["usable"][world_size]
    watch = _Watch(job, rank, meeting["attempt"])
    if rank == 0 and usable < world_size:
        watch.say("surplus", world_size=world_size, usable=usable)
    if rank < usable:
        first_here = rank - context.get_local_rank()
        environment = {
            "RANK": rank,
            "WORLD_SIZE": usable,
            "LOCAL_RANK": context.get_local_rank(),
            "LOCAL_WORLD_SIZE": min(context.get_local_world_size(), usable - first_here),
            "MASTER_ADDR": meeting["address"],
            "MASTER_PORT": meeting["port"],
            "SCALELLM_RESTARTS": meeting["attempt"] + job["restarts"],
        }
        watch.start({name: str(value) for name, value in environment.items()})
    return {"code": watch.follow()}


def _meeting(job: dict[str, Any]) -> dict[str, Any]:
    """Where the ranks meet: on the node of rank 0, at a port that is free now."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    attempt = ray.get(job["board"].attempt.remote())
    return {"address": ray.util.get_node_ip_address(), "port": port, "attempt": attempt}


class _Watch:
    """One rank's process, or none if this worker has nothing to do; and what is told of it."""

    def __init__(self, job: dict[str, Any], rank: int, attempt: int) -> None:
        import ray

        self._job, self._rank, self._attempt = job, rank, attempt
        self._board = job["board"]
        self._node = ray.util.get_node_ip_address()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._ended: int | None = None
        self._readers: list[threading.Thread] = []
        self._last_words: deque[str] = deque(maxlen=200)
        self._newest_save: str | None = None
        self._num_chosen = self._num_reported = self._num_done = 0
        self._reports: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reporter = threading.Thread(target=self._report_all, daemon=True)
        self._reporter.start()
        self._is_asked_to_stop = False

    def say(self, kind: str, **values: Any) -> None:
        self._events.put({"kind": kind, "rank": self._rank, "node": self._node, **values})

    def start(self, environment: dict[str, str]) -> None:
        """Starts the rank and the threads that read what it says."""
        # By a pipe, which holds more than a config: a worker that is killed leaves no file.
        config, config_end = os.pipe()
        os.write(config_end, self._job["config"].encode())
        os.close(config_end)
        lifeline, self._lifeline = os.pipe()
        events, events_end = os.pipe()
        resume = ["--resume", self._job["resume"]] if self._job["resume"] else []
        paths = [*(path for path in sys.path if path), *self._job["path"]]
        module = __name__.replace("worker", "rank")
        command = [sys.executable, "-m", module, "train", "--config", f"/dev/fd/{config}"]
        self._process = subprocess.Popen(
            [*command, *resume],
            env=_without_ray(os.environ)
            | environment
            | {
                "SCALELLM_LAUNCHER": "ray",
                "SCALELLM_LIFELINE_FD": str(lifeline),
                "SCALELLM_EVENTS_FD": str(events_end),
                "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": str(max(1, int(self._job["cpus"]))),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(config, lifeline, events_end),
        )
        for descriptor in (config, lifeline, events_end):
            os.close(descriptor)
        with suppress(AttributeError, OSError):  # a system without them: Linux has
            self._ended = os.pidfd_open(self._process.pid)
        self.say("spawned", pid=self._process.pid)
        for target, arguments in ((self._read_text, ()), (self._read_events, (events,))):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            self._readers.append(thread)

    def follow(self) -> int:
        """Passes on what the rank says until the run is over; returns its exit code.

        Raises:
            RankDiedError: see `work`.
        """
        while True:
            code = None if self._process is None else self._process.poll()
            if code is not None:
                return self._end(code)
            status = self._exchange()
            if status.is_over and self._process is None:
                self._finish_reports()
                return EXIT_DONE
            if _is_preempted() and not self._is_asked_to_stop:
                self.say("preempted")
                self._ask_to_stop()
            self._wait()

    def _wait(self) -> None:
        """Waits for the next turn, or until the rank ends.

        Python's own wait with a time limit looks twenty times a second.
        """
        if self._ended is None:
            time.sleep(POLL_S)
        else:
            select.select([self._ended], [], [], POLL_S)

    def _exchange(self) -> Status:
        import ray

        self._choose_report()
        events: list[Event] = []
        while not self._events.empty():
            events.append(self._events.get())
        try:
            status: Status = ray.get(self._board.post.remote(self._attempt, events))
        except ray.exceptions.RayError:  # the driver is gone, and with it the run
            self._ask_to_stop()
            return Status(stop="the driver's end")
        if status.stop:
            self._ask_to_stop()
        if status.kill and self._process is not None:
            self._process.kill()
        for path in status.reports[self._num_reported :]:
            self._num_reported += 1
            self._reports.put(path)
        return status

    def _report_all(self) -> None:
        """A barrier of all workers, so a thread of its own: one that has died is waited for."""
        while (path := self._reports.get()) is not None:
            self._report(path)
            self._num_done += 1

    def _choose_report(self) -> None:
        """Rank 0 says what to report, one at a time: Ray takes seconds, saves may come faster."""
        if self._newest_save is not None and self._num_done == self._num_chosen:
            self._num_chosen += 1
            self.say("reporting", path=self._newest_save)
            self._newest_save = None

    def _report(self, path: str) -> None:
        """Gives Ray the path of a checkpoint and the last metrics."""
        import ray.train

        metrics = _last_row(Path(self._job["run_dir"], "metrics.jsonl")) | {"checkpoint": path}
        pointer = None
        with tempfile.TemporaryDirectory(prefix="scalellm-pointer-") as folder:
            if self._rank == 0:
                Path(folder, "checkpoint.json").write_text(json.dumps({"path": path}) + "\n")
                pointer = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=pointer)

    def _ask_to_stop(self) -> None:
        if self._lifeline >= 0 and not self._is_asked_to_stop:
            self._is_asked_to_stop = True
            with suppress(BrokenPipeError):  # it has ended
                os.write(self._lifeline, b"s")

    def _end(self, code: int) -> int:
        for reader in self._readers:
            reader.join(timeout=10.0)
        self._exchange()  # another rank may have heard the order to stop before this worker did
        os.close(self._lifeline)
        self._lifeline = -1
        if self._ended is not None:
            os.close(self._ended)
        preempted = code == EXIT_STOPPED_BY_SIGNAL and (
            _is_preempted() or not self._is_asked_to_stop
        )
        died = preempted or code not in (EXIT_DONE, EXIT_USER_ERROR, EXIT_STOPPED_BY_SIGNAL)
        cause = cause_of_end(code, list(self._last_words))
        self.say("exited", code=code, died=died, preempted=preempted, cause=cause)
        status = self._exchange()
        if died:
            raise RankDiedError(f"rank {self._rank} on {self._node}: {cause}")
        while not status.is_over and status.stop != "the driver's end":
            time.sleep(POLL_S)
            status = self._exchange()
        self._finish_reports()
        return code

    def _finish_reports(self) -> None:
        self._reports.put(None)
        self._reporter.join(timeout=_REPORT_WITHIN_S)

    def _read_text(self) -> None:
        """Passes on lines, but keeps tracebacks: of forty, one line at the end is enough."""
        assert self._process is not None and self._process.stdout is not None
        log = Path(self._job["run_dir"], LOG_FOLDER, f"rank-{self._rank}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        in_traceback = False
        with log.open("ab") as file:
            for line in self._process.stdout:
                file.write(line)
                file.flush()
                text = line.decode(errors="replace").rstrip("\n")
                in_traceback = in_traceback or TRACEBACK in text
                self._last_words.append(text)
                if not in_traceback:
                    self.say("line", text=text)

    def _read_events(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                event = json.loads(line)
                if self._rank == 0:
                    self.say(**event)
                    self._newest_save = event.get("path", self._newest_save)


def _without_ray(environment: Any) -> dict[str, str]:
    """The rank is no Ray process: a library in it that looks for Ray must not find our worker."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def _is_preempted() -> bool:
    # `ray.train.get_preemption_info()` says the same, but is a barrier of all workers.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _last_row(path: Path) -> dict[str, Any]:
    """The newest numbers of the run; empty before there are any."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
        row: dict[str, Any] = json.loads(rows[-1])
    except (OSError, IndexError, ValueError):
        return {}
    return row
