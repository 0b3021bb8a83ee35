"""What a training process tells the libraries that it is about to load, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
from typing import NoReturn

ENVIRONMENT = {
    # Read by OpenMP when torch loads. Its own default lets a waiting thread spin for milliseconds,
    # which costs up to six times the speed when anything else runs on the machine (docs/log.md).
    "GOMP_SPINCOUNT": "20000",
    # Read when torch loads. DDP warns on every rank that walking the graph found nothing.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_environment() -> None:
    """Sets `ENVIRONMENT`, but for what the user has set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


# glibc's, read before Python starts: a thread keeps no small blocks that it freed for itself. They
# would keep the memory around them in pieces; 5 to 15% of a rank on a CPU (docs/log.md).
NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"


def begin_anew() -> None:
    """Starts this process again, once, with what the C library reads only at its start.

    Nothing may have been read or opened. The new process has the same number, arguments and files.
    It hands nothing of it on to processes of its own. Left as it is where it brings nothing:
    beside a GPU, without glibc, under a debugger, or if the user has set it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if tunables.endswith(NO_THREAD_CACHE):
        rest = tunables.removesuffix(NO_THREAD_CACHE).removesuffix(":")
        if rest:
            os.environ["GLIBC_TUNABLES"] = rest
        else:
            del os.environ["GLIBC_TUNABLES"]
        return
    is_from_file = sys.argv[0] not in ("", "-")  # else what was typed is read, and gone
    if not is_from_file or sys.gettrace() or "tcache" in tunables or _has_gpu() or not _is_glibc():
        return
    wanted = f"{tunables}:{NO_THREAD_CACHE}" if tunables else NO_THREAD_CACHE
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(command[0], command, os.environ | {"GLIBC_TUNABLES": wanted})


def _has_gpu() -> bool:
    return any(name == "kfd" or name.startswith("nvidia") for name in os.listdir("/dev"))


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):
        return False


# glibc's mallopt(3), and the words of its environment variables and of GLIBC_TUNABLES.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
# glibc refused a higher threshold for mapping once (HEAP_MAX_SIZE / 2; RHEL 9 has such a one).
_OLD_LIMIT_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, up to 1 GiB a block, for the next step to use again.

    Otherwise blocks of 32 MiB and more, such as logits, go back to the system every time, which
    clears them before it hands them out again. Worth 4% of a step, at the same peak (docs/log.md).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is None:
        return
    # This one first: any setting stops glibc from raising it by itself, and at 128 KiB, where it
    # would stay if it were refused, every larger block is mapped anew.
    if not _is_chosen("mmap_threshold") and not (
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
    ):
        return
    if not _is_chosen("trim_threshold"):
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _is_chosen(name: str) -> bool:
    """Whether the user has set it."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables


def leave(code: int) -> NoReturn:
    """Ends the process with the exit code; one that may be a rank without Python's own teardown.

    Gloo's threads let go of the tensors of their last collective a moment after it is done. One
    that needs the interpreter for it while that is taken down ends the process with SIGABRT, after
    all its work (pytorch/pytorch#179291; 3 of 200 processes on a busy machine).
    """
    if "torch.distributed" not in sys.modules:
        sys.exit(code)
    # What Python does first of all too: it ends idle pools of threads, and waits for the others.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # the reader has left
            stream.flush()
    os._exit(code)
