"""Keeps a run on Ray alive when its driver is not: starts it again once the cluster answers.

A process that talks to Ray is ended by Ray's own C++ when the head of the cluster is gone for a
minute. So the driver is a child of this small process, which does not talk to Ray. The ranks save
and stop by themselves meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from scalellm.config import ClusterConfig
from scalellm.errors import EXIT_FAILURE

# Set in a driver: how many there were before it, the cluster they used, and whom to tell.
DRIVER = "SCALELLM_RAY_DRIVER"
ADDRESS = "SCALELLM_RAY_DRIVER_ADDRESS"
_TELL = "SCALELLM_RAY_DRIVER_FD"
_AGAIN_AFTER_S = 5.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def is_driver() -> bool:
    return DRIVER in os.environ


def tell(what: str, value: str | int) -> None:
    """Tells the guard of this driver its `address`, or at last its exit `code`.

    A driver that Ray has ended can give no exit code that means anything.
    """
    os.write(int(os.environ[_TELL]), f"{what} {value}\n".encode())


def guard(arguments: Sequence[str], cluster: ClusterConfig) -> int:
    """Runs `python -m scalellm train ARGUMENTS` as a driver, again if it is lost; its exit code."""
    max_failures = cluster.max_failures
    guarded = _Guarded()
    before = {
        number: signal.signal(number, guarded.pass_on) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        number = 0
        while True:
            code = guarded.run(arguments, number)
            if code is not None:
                return code
            number += 1
            if guarded.is_asked_to_stop:
                _say("stopped, but the driver has not told whether the ranks have saved")
                return EXIT_FAILURE
            if 0 <= max_failures < number:
                _say(f"lost the Ray cluster {number} times (cluster.max_failures={max_failures})")
                return EXIT_FAILURE
            limit = f" of at most {max_failures}" if max_failures >= 0 else ""
            _say(
                "lost the Ray cluster, or the driver was killed; going on from the last checkpoint "
                f"when the cluster answers (failure {number}{limit})"
            )
            if not guarded.wait_for_cluster(cluster.wait_for_nodes_s):
                _say(
                    f"the Ray cluster at {guarded.address} has not answered for "
                    f"{cluster.wait_for_nodes_s:g} s (cluster.wait_for_nodes_s); start it, then go "
                    "on with --resume auto"
                )
                return EXIT_FAILURE
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Guarded:
    """One driver at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.is_asked_to_stop = False
        self.address = ""

    def run(self, arguments: Sequence[str], number: int) -> int | None:
        """Returns what the driver delivered; None if it was ended before it could."""
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scalellm", "train", *arguments],
            env=os.environ | {DRIVER: str(number), ADDRESS: self.address, _TELL: str(writing)},
            pass_fds=(writing,),
            # A signal to our whole group would end a Ray of our own before the ranks have saved.
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        os.close(writing)
        if self.is_asked_to_stop:
            self._process.terminate()
        code = None
        with os.fdopen(reading) as told:
            for line in told:
                what, _, value = line.strip().partition(" ")
                if what == "address":
                    self.address = value
                else:
                    code = int(value)
        self._process.wait()
        return code

    def wait_for_cluster(self, patience_s: float) -> bool:
        """Whether the cluster answers again; at once where the driver starts its own."""
        deadline_s = time.monotonic() + patience_s
        host, _, port = self.address.rpartition(":")
        while True:
            time.sleep(_AGAIN_AFTER_S)
            if self.is_asked_to_stop or not host:
                return True
            try:
                socket.create_connection((host.strip("[]"), int(port)), _AGAIN_AFTER_S).close()
                return True
            except OSError:
                if time.monotonic() > deadline_s:
                    return False

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        self.is_asked_to_stop = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _end_with_parent() -> None:
    """If this process is killed, the driver stops its ranks, which save."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(words: str) -> None:
    print(f"scalellm: {words}", file=sys.stderr, flush=True)
