"""Importing DeepSpeed quietly, and compiling its kernels once, said aloud."""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor

from scalellm import process
from scalellm.dist import World, together
from scalellm.errors import ConfigError
from scalellm.strategies import _gloo

PATIENCE_S = 3.0  # loading a compiled kernel takes less


def import_deepspeed(world: World, *, join: bool = True) -> Any:
    """Returns the package, told which device to use, with its talk turned down to warnings.

    `join`: let it find the process group, which is there already.
    """
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
    if join:
        # What an engine before left of a process group is not this one's.
        importlib.import_module("deepspeed.comm.comm").cdb = None  # type: ignore[attr-defined]
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        _gather_without_copies()
        all_of_them: Any = tdist.group.WORLD
        if all_of_them.size() == 1 and _gloo.uses_gloo(all_of_them):
            _answer_alone()
    return deepspeed


def load_deepspeed(world: World) -> None:
    """Imports the package and what an engine imports when made, torch's compiler above all.

    And prepares a CPU's heap for an engine, for good: before there is anything large in it.
    """
    if world.device.type == "cpu":
        process.map_large_blocks()
    import_deepspeed(world, join=False)
    with suppress(ModuleNotFoundError):  # not in every version
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _gather_without_copies() -> None:
    """Has DeepSpeed gather over gloo from where parts lie to where they belong, as our FSDP does.

    Gloo's own gather takes a whole copy, in threads whose heaps keep it.
    """
    backend: Any = importlib.import_module("deepspeed.comm.comm").cdb
    # Asked anew: the backend of an engine before has our gather already.
    of_torch, in_place = backend.get_all_gather_function(), _gloo.Gather()

    def gather(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> tdist.Work | None:
        group = tdist.group.WORLD if group is None else group
        if not _gloo.uses_gloo(group):
            return of_torch(output_tensor, input_tensor, group=group, async_op=async_op)
        own = output_tensor.view(group.size(), -1)[group.rank()]
        own.copy_(input_tensor.view(-1))
        return in_place(output_tensor, own, group, async_op)

    backend.all_gather_function = gather


def _answer_alone() -> None:
    """A group of one has nothing to send, so what an engine sends in a step is not handed to gloo.

    Its threads let go of a tensor a moment after it is done, and what the heap takes in between
    lies elsewhere: one and the same run needed 535 or 636 MiB.
    """
    backend: Any = importlib.import_module("deepspeed.comm.comm").cdb

    def reduce(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        return _gloo.done() if async_op else None

    def broadcast(tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
        return _gloo.done() if async_op else None

    def scatter(
        output: Tensor, whole: Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        output.copy_(whole.view_as(output))
        return _gloo.done() if async_op else None

    backend.all_reduce, backend.broadcast = reduce, broadcast
    backend.reduce_scatter_function = scatter


@contextmanager
def keeping_linear() -> Iterator[None]:
    """Puts torch's `linear` back in the end: stage 3 puts its own there and lets it stay."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def leave_process_group() -> None:
    """Takes back what DeepSpeed holds of the process group, which will end before it does.

    A later run in this process would meet the old group, and a forked one would hang in freeing it.
    """
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    clone, groups._WORLD_GROUP, comm.cdb = groups._WORLD_GROUP, None, None
    if clone is not None and tdist.is_initialized():
        tdist.destroy_process_group(clone)
    gc.collect()  # engines are full of cycles


@dataclass(frozen=True)
class Op:
    """A kernel of DeepSpeed that is compiled on its first use on a machine."""

    name: str
    builder: str
    called: str
    instead: str


CPU_ADAM = Op("cpu_adam", "CPUAdamBuilder", "DeepSpeedCPUAdam", "strategy.cpu_adam=torch")
ASYNC_IO = Op(
    "async_io", "AsyncIOBuilder", "DeepSpeed's file access", "strategy.offload_optimizer=cpu"
)


def cpu_adam(optimizer: torch.optim.Optimizer, world: World) -> torch.optim.Optimizer:
    """Returns DeepSpeedCPUAdam with the groups and settings of an AdamW."""
    prepare(CPU_ADAM, world)
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


def replay_steps(adam: Any, steps: int) -> None:
    """Brings a new DeepSpeedCPUAdam to the state of one that has taken `steps` steps.

    Its kernel multiplies the bias corrections up step by step, but takes a power when it jumps,
    which gives other last bits. So it takes the steps again, on one element of nobody's.
    """
    group = adam.param_groups[0]
    nothing = [torch.zeros(1) for _ in range(4)]
    beta1, beta2 = group["betas"]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, 0.0, beta1, beta2, group["eps"], 0.0, True, *nothing
        )


def prepare(op: Op, world: World) -> None:
    """Compiles and loads a kernel; one rank of a machine compiles, the others wait.

    Raises:
        ConfigError: on all ranks, if one cannot.
    """
    for turn in (True, False):
        mine = (world.local_rank == 0) == turn
        together(lambda mine=mine: _load(op, world) if mine else None, world)  # type: ignore[misc]


def _load(op: Op, world: World) -> None:
    # DeepSpeed asks several times a kernel what the CPU is, and each answer costs two seconds.
    cpuinfo: Any = importlib.import_module("cpuinfo")
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    builder = getattr(importlib.import_module("deepspeed.ops.op_builder"), op.builder)()
    if not builder.is_compatible(verbose=False):
        libaio = "the library libaio with its headers (package libaio-dev or libaio-devel)"
        needs = libaio if op is ASYNC_IO else "what this machine lacks"
        raise ConfigError(f"{op.called} needs {needs}; install it, or use {op.instead}")
    folder = _extension_folder(op)
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled already, though torch compiles again where DeepSpeed now lies in another folder.
    is_cached = any(folder.glob("*.so"))
    with (folder.parent / f"{op.name}.scalellm-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run on this machine may be compiling too
        if not is_cached:
            _check_compiler(op)
        _check_lock(folder / "lock", op)
        try:
            with _spinner(f"compiling {op.called}, once for this installation"):
                builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConfigError(
                f"{op.called} could not be compiled ({first[:200]}); install a C++ compiler that "
                f"fits this torch, or use {op.instead}"
            ) from None


def _extension_folder(op: Op) -> Path:
    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    return Path(cpp_extension._get_build_directory(op.name, verbose=False))


def _check_compiler(op: Op) -> None:
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        raise ConfigError(
            f"{op.called} needs a C++ compiler, and there is neither c++ nor g++ on PATH; install "
            f"one (package g++ or build-essential), or use {op.instead}"
        )


def _check_lock(lock: Path, op: Op) -> None:
    """torch waits for ever for the lock of a build that was killed; ours excludes a living one."""
    if lock.exists():
        raise ConfigError(
            f"a build of {op.called} was ended half-way and left its lock {lock}, for which torch "
            "would wait endlessly; delete that file"
        )


@contextmanager
def _spinner(what: str) -> Iterator[None]:
    """Says what is being waited for and for how long, once it has taken `PATIENCE_S`.

    One line in a log, a turning one on a terminal.
    """
    started_s = time.monotonic()
    done = threading.Event()
    on_tty = sys.stderr.isatty()

    def turn() -> None:
        if done.wait(PATIENCE_S):
            return
        if not on_tty:
            print(f"{what} (one to a few minutes) ...", file=sys.stderr, flush=True)
        while on_tty and not done.wait(0.2):
            seconds = time.monotonic() - started_s
            sign = "|/-\\"[int(seconds * 5) % 4]
            print(f"\r{sign} {what}: {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        seconds = time.monotonic() - started_s
        if seconds > PATIENCE_S:
            start = "\r" if on_tty else ""
            print(f"{start}{what}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
