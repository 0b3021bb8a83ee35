"""What a training process tells the libraries that it is about to load, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterator
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
# would keep the memory around them in pieces: 5 to 18% of a CPU's heap (docs/log.md).
NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"
# The number of the process that did. It stays, so that none does twice; a child has another one.
_BEGUN_ANEW = "SCALELLM_BEGUN_ANEW"


def begin_anew() -> None:
    """Starts this process again, once, with what the C library reads only at its start.

    Call it first of all: what was read or opened is gone. The new process has the same number,
    arguments and files, and hands the setting on to none of its own. Goes on as it is where that
    would bring nothing or be something else: beside a GPU, without glibc, under a debugger, in a
    program that was not started by its own words, or if the user has set it.
    """
    tunables, me = os.environ.get("GLIBC_TUNABLES", ""), str(os.getpid())
    if os.environ.get(_BEGUN_ANEW) == me:
        os.environ["GLIBC_TUNABLES"] = tunables.removesuffix(NO_THREAD_CACHE).removesuffix(":")
        return
    if "tcache" in tunables or not (_is_glibc() and _is_as_started()) or _has_gpu():
        return
    wanted = f"{tunables}:{NO_THREAD_CACHE}" if tunables else NO_THREAD_CACHE
    environment = os.environ | {"GLIBC_TUNABLES": wanted, _BEGUN_ANEW: me}
    with contextlib.suppress(OSError, ValueError):  # it can do without
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_as_started() -> bool:
    """Whether the words that Python was started with would start what runs now, and only that."""
    process = sys.modules.get("multiprocessing.process")
    if sys.gettrace() or sys.getprofile() or (process and process.parent_process()):
        return False
    main = sys.modules["__main__"]
    began = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if not began or [*began, *sys.argv[1:]] != sys.orig_argv[1:]:
        return False
    *options, program = began
    if any(not option.startswith("-") for option in options):  # another program started ours
        return False
    if options[-1:] == ["-m"]:
        name = getattr(getattr(main, "__spec__", None), "name", None)
        return name in (program, f"{program}.__main__")
    file = getattr(main, "__file__", None) or ""
    try:  # a pipe has been read
        return os.path.isfile(file) and os.path.samefile(file, program)
    except OSError:
        return False


def _has_gpu() -> bool:
    try:
        devices = os.listdir("/dev")
    except OSError:
        return False
    return any(name == "kfd" or name.startswith("nvidia") for name in devices)


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):
        return False


# glibc's mallopt(3), and the words of its environment variables and of GLIBC_TUNABLES.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MXFAST = -1, -3, 1
KEPT_BYTES = 1 << 30
MAPPED_FROM_BYTES = 16 << 20
# glibc refused a higher threshold for mapping once (HEAP_MAX_SIZE / 2; RHEL 9 has such a one).
_OLD_LIMIT_BYTES = 32 << 20
_keeps = False  # whether this process keeps what it frees


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
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
    ):
        return
    if not _is_chosen("trim_threshold"):
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    global _keeps
    _keeps = True


def map_large_blocks() -> None:
    """Has blocks of 16 MiB and more come from the system and go back to it one by one.

    For libraries whose large buffers of many sizes come and go, as DeepSpeed's: kept ones lie in
    pieces, and chance decides which is used again. Its stage 3 needs 8% less memory so, and a step
    of 512 tokens a tenth more time (docs/log.md). Does nothing unless `keep_freed_memory` did.
    """
    if _keeps and not _is_chosen("mmap_threshold"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


# How many free blocks of each size in bytes, with what the library has beside: about four times
# what a decoder of 6 blocks had alive, under FSDP or DeepSpeed, whichever had more.
_STOCK = {
    **dict.fromkeys(range(32, 1024, 16), 64),
    **{32: 10_000, 48: 2_600, 64: 300, 80: 300, 96: 300, 112: 2_800, 144: 200, 192: 4_300},
    **{272: 250, 320: 1_000, 480: 520, 496: 800, 528: 370, 544: 600, 656: 400, 752: 240},
    **{784: 250, 976: 160},
}
_HEAD_BYTES = 8


def stock_small_blocks() -> None:
    """Has small objects lie among each other from here on, and not between tensors; takes 7 MiB.

    Torch asks for aligned blocks, and glibc gives small objects what it cuts off in front of one
    and behind it. Where they outlive the tensor, its place is too small for the next one of its
    size. So here are places for them: blocks of each size, kept apart by used ones. And what was
    freed last is not handed out first any more (glibc's fast bins): what was cut off is still there
    when its tensor is freed, and is joined with it. Worth up to a fifth of a CPU's memory, and all
    that was left to chance (docs/log.md). Does nothing unless `keep_freed_memory` did.
    """
    if _keeps and not _is_chosen("mxfast"):
        _stock_once()


@functools.cache
def _stock_once() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.mallopt(_M_MXFAST, 0)
    blocks = []
    for size_bytes, count in _STOCK.items():
        for _ in range(count):
            blocks.append(libc.malloc(size_bytes - _HEAD_BYTES))
            libc.malloc(_HEAD_BYTES)  # stays
    for block in blocks:
        libc.free(block)


def _is_chosen(name: str) -> bool:
    """Whether the user has set it."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables


@contextlib.contextmanager
def collecting_when_told(*, freezing: bool = False) -> Iterator[None]:
    """Inside, Python looks for objects that hold each other only in `gc.collect`.

    By itself it does after so many new objects: in the midst of a step, and on each rank at another
    moment, while the others wait (torchtitan has it tell too, every 50 steps). What it frees is
    then free sooner or later by chance, and so is what the heap needs (docs/log.md).

    Args:
        freezing: tidies up first, and does not look again at what is there at the beginning.
    """
    was_enabled, freezing = gc.isenabled(), freezing and not gc.get_freeze_count()
    gc.disable()
    try:
        if freezing:
            gc.collect()
            gc.freeze()
        yield
    finally:
        if freezing:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


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
