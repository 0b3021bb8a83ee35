"""A contestant: a worker process that is stopped whenever it is not its turn."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from _processes import descendants, end_tree, start

from scalellm.process import ENVIRONMENT

# Lines of a log that say why, as Python and our command write them; else its last line counts.
_REASONS = ("scalellm: ", "Error", "Exception")


class PeerError(Exception):
    """The worker ended or gave no answer; the message is its last words."""


class PeerProcess:
    """Starts a worker and waits until it says that it is ready; see peer_workers/_worker.py.

    Between its turns all its processes are stopped (SIGSTOP): a background save or a spinning
    thread goes on in its own turn only, and takes nothing from the others.

    Args:
        command: the interpreter, the worker, the task.
        log: file for all it prints.
        threads: for OpenMP, before torch is loaded.
        limit_s: longest wait for an answer, compiling included.
        settings: for libraries, in the environment; those that our own command has set, and that
            this process has inherited, are left out otherwise.

    Raises:
        PeerError: it never got ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        threads: int,
        limit_s: float,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._log, self._limit_s = log, limit_s
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ENVIRONMENT},
            **(settings or {}),
            "OMP_NUM_THREADS": str(threads),
            # Each compiles for itself, or the first step would be shorter for who comes later.
            "TORCHINDUCTOR_CACHE_DIR": str(log.with_suffix(".inductor")),
        }
        began_s = time.perf_counter()
        with log.open("wb") as file:
            self._process = start(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self.ready = self._answer()
        self.start_s = time.perf_counter() - began_s
        self._send(signal.SIGSTOP)

    def turn(self, count: int) -> dict[str, Any]:
        """Lets it run `count` steps (or passes) and returns its answer.

        Raises:
            PeerError: it has ended; it may not be asked again.
        """
        self._send(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"run {count}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        answer = self._answer()
        self._send(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        end_tree(self._process)

    def _send(self, number: signal.Signals) -> None:
        for pid in descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._limit_s)[0]:
            self.end()
            raise PeerError(f"no answer within {self._limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> PeerError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        code = self._process.poll()
        self.end()
        if code == -signal.SIGKILL:
            return PeerError("killed, as by Linux when memory runs out")
        lines = self._log.read_text(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
        reasons = [line for line in lines if any(word in line[:60] for word in _REASONS)]
        return PeerError(f"exit code {code}: {(reasons or lines)[-1][:300]}")
