"""Importing DeepSpeed quietly, and compiling its CPU optimizer once, said aloud."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scalellm.dist import World, together
from scalellm.errors import ConfigError

STALE_LOCK_S = 600
_OP = "cpu_adam"


def import_deepspeed(world: World) -> Any:
    """Returns the package, told which device to use, with its talk turned down to warnings."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated")
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A shared-memory all-reduce for inference: 20 seconds to compile, never called in training.
    ops = importlib.import_module("deepspeed.ops")
    if world.device.type == "cpu":
        compatible = ops.__dict__.setdefault("__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    # The process group is ours; DeepSpeed only has to find it.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    return deepspeed


def cpu_adam(optimizer: torch.optim.Optimizer, world: World) -> torch.optim.Optimizer:
    """Returns DeepSpeedCPUAdam with the groups and settings of an AdamW.

    Its kernel is compiled on the first use on a machine; one rank does it, the others wait.
    """
    is_builder = world.local_rank == 0
    together(lambda: _build(is_builder, world), world)
    adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    values = optimizer.param_groups[0]
    made: torch.optim.Optimizer = adam(
        groups, lr=values["lr"], betas=values["betas"], eps=values["eps"], adamw_mode=True
    )
    return made


def _build(is_builder: bool, world: World) -> None:
    if not is_builder:
        return
    folder = _extension_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _check_tools(folder)
    builder = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder()
    with (folder.parent / f"{_OP}.scalellm-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run on this machine may be compiling too
        _check_lock(folder / "lock")
        is_cached = any(folder.glob("*.so"))
        try:
            if is_cached:
                builder.load(verbose=False)
            else:
                _with_spinner("compiling DeepSpeedCPUAdam, once on this machine", builder, world)
        except (RuntimeError, OSError, ImportError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConfigError(
                f"DeepSpeedCPUAdam could not be compiled ({first[:200]}); install a C++ compiler "
                "that fits this torch, or use strategy.cpu_adam=torch"
            ) from None


def _extension_folder() -> Path:
    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    return Path(cpp_extension._get_build_directory(_OP, verbose=False))


def _check_tools(folder: Path) -> None:
    if any(folder.glob("*.so")):
        return
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) or shutil.which("g++")):
        raise ConfigError(
            "DeepSpeedCPUAdam needs a C++ compiler, and there is neither c++ nor g++ on PATH; "
            "install one (package g++ or build-essential), or use strategy.cpu_adam=torch"
        )


def _check_lock(lock: Path) -> None:
    """torch waits for ever for the lock of a build that was killed."""
    try:
        age_s = time.time() - lock.stat().st_mtime
    except OSError:
        return
    if age_s > STALE_LOCK_S:
        raise ConfigError(
            f"a build of DeepSpeedCPUAdam left its lock {lock} {age_s:,.0f} s ago and would be "
            "waited for endlessly; delete that file if nothing is compiling"
        )


def _with_spinner(what: str, builder: Any, world: World) -> None:
    with _spinner(what, shown=world.is_main):
        builder.load(verbose=False)


@contextmanager
def _spinner(what: str, *, shown: bool) -> Iterator[None]:
    """Says what is being waited for and for how long; one line in a log, a turning one on a tty."""
    started_s = time.monotonic()
    done = threading.Event()
    on_tty = sys.stderr.isatty()

    def turn() -> None:
        while not done.wait(0.2):
            seconds = time.monotonic() - started_s
            sign = "|/-\\"[int(seconds * 5) % 4]
            print(f"\r{sign} {what}: {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    if shown and not on_tty:
        print(f"{what} (about a minute) ...", file=sys.stderr, flush=True)
    thread = threading.Thread(target=turn, daemon=True)
    if shown and on_tty:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
        if shown:
            start = "\r" if on_tty else ""
            seconds = time.monotonic() - started_s
            print(f"{start}{what}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
