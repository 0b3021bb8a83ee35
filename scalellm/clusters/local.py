"""Ranks on this machine, without torchrun's ceremony.

torchrun would do, but it answers a rank's one sentence with forty lines of its own, and kills ranks
30 seconds after a signal, whether or not they have saved. The ranks meet as torchrun's do: over a
store that the launcher holds, on a port the system picked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from scalellm.errors import EXIT_DONE, EXIT_FAILURE

MAX_RANKS = 1024
POLL_S = 0.05
# A rank whose peer has failed waits in a collective; it has this long to notice.
GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs `python -m scalellm ARGUMENTS` in `nproc` ranks and returns the run's exit code.

    SIGTERM and SIGINT are passed on, and the ranks may take as long as they need to save. If one
    rank fails the others are ended, and its exit code is returned.
    """
    import torch.distributed as tdist

    store = tdist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    processes = [_start(arguments, rank, nproc, store.port) for rank in range(nproc)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(processes)
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins the store instead of opening one
        "SCALELLM_LAUNCHER": f"--nproc {nproc}",
    }
    command = [sys.executable, "-m", "scalellm", *arguments]
    # One system call, in a library loaded before: safe although the store has threads.
    prepare = _die_with_parent if sys.platform == "linux" else None
    return subprocess.Popen(command, env=environment, preexec_fn=prepare)  # noqa: PLW1509


def _die_with_parent() -> None:
    """Asks Linux to end this rank if the launcher is killed: an orphan would train on unseen."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Returns 0 if all ranks did, else the code of the first rank that failed."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code not in (None, EXIT_DONE)]
        if failed:
            _name_killed(processes)
            _settle(processes)
            codes = [process.poll() for process in processes]
            # A mistake found by one rank makes its peers fail differently: the mistake counts.
            return next((code for code in sorted(filter(None, codes)) if code > 1), EXIT_FAILURE)
        if None not in codes:
            return EXIT_DONE
        time.sleep(POLL_S)


def _name_killed(processes: list[subprocess.Popen[bytes]]) -> None:
    """A rank that was killed cannot say so, and its peers only see their connection break."""
    for rank, process in enumerate(processes):
        code = process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            print(
                f"scalellm: rank {rank} was ended by {name}{hint}; go on with --resume auto",
                file=sys.stderr,
                flush=True,
            )


def _settle(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + GRACE_S
    while time.monotonic() < deadline_s and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
    _end(processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
