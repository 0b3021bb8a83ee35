"""Ranks, devices and threads: the only reader of RANK, WORLD_SIZE and LOCAL_RANK.

Everything else asks a `World`. Collectives here are the few the training loop needs itself; the
heavy ones (gradients, parameters) belong to the strategies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as tdist

from scalellm.errors import ConfigError, UserError

T = TypeVar("T")

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of one run, and what it computes on."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "python"
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        threads = torch.get_num_threads()
        return f"{ranks} on {self.device.type} by {self.launcher}, {threads} threads each"


def detect() -> World:
    """Reads the launcher's environment. Raises ConfigError if it contradicts itself."""
    world = World(
        rank=_read_int("RANK", 0),
        local_rank=_read_int("LOCAL_RANK", 0),
        world_size=_read_int("WORLD_SIZE", 1),
        launcher=_launcher(),
    )
    world = replace(world, local_world_size=_read_int("LOCAL_WORLD_SIZE", world.world_size))
    if not 0 <= world.rank < world.world_size:
        raise ConfigError(
            f"RANK={world.rank} is outside WORLD_SIZE={world.world_size}: start the ranks with "
            "torchrun or `scalellm train --nproc N`, which set both"
        )
    return world


def _read_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number") from None


def _launcher() -> str:
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate"
    if "SCALELLM_LAUNCHER" in os.environ:
        return os.environ["SCALELLM_LAUNCHER"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "WORLD_SIZE" in os.environ:
        return "another launcher"
    return "python"


def available_cores() -> int:
    """Cores this process may use (its affinity mask, not the machine's size)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def ranks(
    device: Literal["auto", "cpu", "cuda"] = "auto", threads: int = 0, *, process_group: bool = True
) -> Iterator[World]:
    """Joins the ranks for the length of a `with`; leaves the process group whatever happens.

    Args:
        threads: CPU threads per rank; 0 divides this host's cores among its ranks. torchrun sets
            OMP_NUM_THREADS=1, which would leave most cores idle.
        process_group: False for a strategy that talks to nobody; needs world size 1.
    """
    world = detect()
    world = replace(world, device=_pick_device(device, world.local_rank))
    torch.set_num_threads(threads or max(1, available_cores() // world.local_world_size))
    # A cluster or a test may have made the group already; then it is theirs to destroy.
    is_ours = (process_group or world.world_size > 1) and not tdist.is_initialized()
    if is_ours:
        _init_process_group(world)
    try:
        yield world
    finally:
        if is_ours:
            tdist.destroy_process_group()


def _pick_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device; use run.device=cpu")
    if local_rank >= torch.cuda.device_count():
        error = ConfigError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
            "start at most so many ranks on it"
        )
        error.rank_only = True
        raise error
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(world: World) -> None:
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.world_size == 1 and "MASTER_ADDR" not in os.environ:
        # One rank alone: no port, no file.
        store = tdist.HashStore()  # type: ignore[attr-defined]
        tdist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    else:
        tdist.init_process_group(backend, timeout=TIMEOUT)


def barrier() -> None:
    """Waits for all ranks; nothing to wait for without a process group."""
    if tdist.is_initialized():
        tdist.barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device | None = None) -> list[float]:
    """Returns the element-wise sum over ranks, in fp64, the same bits on every rank."""
    if not tdist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    tdist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def together(action: Callable[[], T], world: World, *, main_only: bool = False) -> T | None:
    """Runs `action` on all ranks, or on rank 0 alone, and fails on all ranks if it fails on one.

    A rank that left alone would keep the others waiting in their next collective.

    Raises:
        UserError: what the action raised here, or that it failed elsewhere.
    """
    problem: UserError | None = None
    result: T | None = None
    if world.is_main or not main_only:
        try:
            result = action()
        except UserError as error:
            problem = error
    [failures] = sum_over_ranks([float(problem is not None)], world.device)
    if problem is not None:
        problem.rank_only = failures < world.world_size
        raise problem
    if failures:
        raise UserError(f"{failures:.0f} of {world.world_size} ranks failed; they say why")
    return result
