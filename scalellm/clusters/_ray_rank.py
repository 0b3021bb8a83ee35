"""A training process below a Ray worker: `python -m scalellm`, tied to the worker's life.

The worker holds the other end of a pipe, SCALELLM_LIFELINE_FD. A byte on it, or its end, which the
system brings about even if the worker is killed, asks this rank to save and stop. A rank that
cannot, because a peer is gone and its collective hangs, is ended after `GRACE_S`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from types import FrameType

from scalellm import launched
from scalellm.errors import EXIT_STOPPED_BY_SIGNAL
from scalellm.process import begin_anew

GRACE_S = 120.0


def main() -> None:
    begin_anew()  # before the thread, which hears only once that it shall stop
    # Ray starts its processes with Ctrl-C blocked, and children inherit that.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, _on_signal)
    lifeline = int(os.environ["SCALELLM_LIFELINE_FD"])
    threading.Thread(target=_follow, args=(lifeline,), daemon=True).start()
    runpy.run_module("scalellm", run_name="__main__", alter_sys=True)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """While it trains, the loop answers. Before there is nothing to save; after, it ends anyway."""
    if "started" not in launched.told:
        sys.exit(EXIT_STOPPED_BY_SIGNAL)


def _follow(lifeline: int) -> None:
    asked = os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    while asked:  # the worker waits for us; only its end sets a limit
        asked = os.read(lifeline, 1)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
