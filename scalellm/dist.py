"""Ranks, devices and threads: the only reader of RANK, WORLD_SIZE and what launchers set instead.

Everything else asks a `World`. Collectives here are the few the training loop needs itself; the
heavy ones (gradients, parameters) belong to the strategies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as tdist

from scalellm import launched
from scalellm.cores import available_cores, bound_to_share
from scalellm.errors import ConfigError, UserError
from scalellm.launched import read_int
from scalellm.products import fast_fp32

T = TypeVar("T")

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=10)
_LIMIT = "OMP_THREAD_LIMIT"
# Ranks that write a checkpoint wait for the slowest disk among them.
SIDE_TIMEOUT = timedelta(hours=2)
Group = tdist.ProcessGroup | None
_NAMES = launched.Names("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of one run, and what it computes on.

    `launcher_asks` is what the launcher was told besides a number of ranks, and what only the
    config can grant: see `launched.accelerate_asks`. `restarts`: how often the launcher has started
    the ranks of this run before.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "python"
    device: torch.device = CPU
    launcher_asks: Mapping[str, str] = field(default_factory=dict, compare=False)
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        threads = torch.get_num_threads()
        return f"{ranks} on {self.device.type} by {self.launcher}, {threads} threads each"


def detect() -> World:
    """Reads the launcher's environment. Raises ConfigError if it contradicts itself."""
    has_rank = bool(os.environ.get(_NAMES.rank))
    launcher = launched.name(has_rank=has_rank)
    names = _NAMES if has_rank else launched.WITHOUT_RANK.get(launcher, _NAMES)
    world_size = read_int(names.world_size, 1)
    if world_size > 1 and not os.environ.get(names.rank):
        raise ConfigError(
            f"{names.world_size}={world_size}, but {names.rank} is not set: {_START_THE_RANKS}"
        )
    rank = read_int(names.rank, 0)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names.rank}={rank} is outside {names.world_size}={world_size}: {_START_THE_RANKS}"
        )
    local_world_size = launched.local_world_size(names) or world_size
    asks = launched.accelerate_asks(has_rank=has_rank) if launcher == "accelerate" else {}
    return World(
        rank=rank,
        local_rank=read_int(names.local_rank, rank % local_world_size),
        world_size=world_size,
        local_world_size=local_world_size,
        launcher=launcher,
        launcher_asks=asks,
        restarts=launched.restarts(),
    )


_START_THE_RANKS = "start the ranks with torchrun or `scalellm train --nproc N`, which set both"


def threads_per_rank(world: World) -> int:
    """Divides this host's cores among its ranks, unless the launcher already has.

    torchrun sets OMP_NUM_THREADS=1, which would leave most cores idle, so it is not asked.
    """
    cores = min(available_cores(), _most_threads())
    if world.launcher == "ray":
        return max(1, min(cores, read_int("OMP_NUM_THREADS", 1)))  # the CPUs it reserved
    if world.launcher == "srun" and has_own_cores(world):
        return max(1, min(cores, read_int("SLURM_CPUS_PER_TASK", cores)))
    return cores if has_own_cores(world) else max(1, cores // world.local_world_size)


def _most_threads() -> int:
    """With fewer threads than torch counts on, oneDNN leaves parts of a product unwritten."""
    return max(1, read_int(_LIMIT, sys.maxsize))


def has_own_cores(world: World) -> bool:
    """Whether the launcher has divided this host's cores among its ranks already."""
    if world.launcher == "srun":
        return "SLURM_CPUS_PER_TASK" in os.environ
    # --bind_cores_to_rank
    return world.launcher == "deepspeed" and available_cores() < _cores_of_parent()


def _cores_of_parent() -> int:
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except (AttributeError, OSError):
        return 0


def _tell_libraries(world: World) -> None:
    """Sets what torchrun would have set: DeepSpeed and Accelerate read it too."""
    values = (world.rank, world.local_rank, world.world_size, world.local_world_size)
    os.environ |= {name: str(value) for name, value in zip(_NAMES, values, strict=True)}
    os.environ["SCALELLM_LAUNCHER"] = world.launcher


@contextmanager
def ranks(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    *,
    process_group: bool = True,
    bind_cores: bool = False,
) -> Iterator[World]:
    """Joins the ranks for the length of a `with`; leaves the process group whatever happens.

    Args:
        threads: CPU threads per rank; 0: see `threads_per_rank`.
        process_group: False for a strategy that talks to nobody; needs world size 1.
        bind_cores: keep each rank of a host on a share of its cores, unless the launcher does.

    Raises:
        ConfigError: the launcher's environment, the device or the cores do not allow it.
    """
    if threads > _most_threads():
        raise ConfigError(
            f"run.threads={threads} threads, but {_LIMIT}={os.environ[_LIMIT]} in the environment "
            "lets OpenMP start no more than that, and products would be wrong; change one of them"
        )
    world = detect()
    world = replace(world, device=_pick_device(device, world.local_rank))
    share = bound_to_share(world.local_rank, world.local_world_size)
    bound = share if bind_cores and not has_own_cores(world) else nullcontext()
    with _threads(threads or threads_per_rank(world)), bound, fast_fp32():
        yield from _in_group(world, process_group)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Lets torch compute in so many threads meanwhile; a program that calls us keeps its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_group(world: World, process_group: bool) -> Iterator[World]:
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
    elif not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise ConfigError(
            f"{world.launcher} started {world.world_size} ranks, but MASTER_ADDR and MASTER_PORT "
            "do not say where they meet; under slurm submit launch/slurm.sh, which sets both, "
            "elsewhere start the ranks with torchrun"
        )
    else:
        if world.launcher in launched.WITHOUT_RANK:
            _tell_libraries(world)
        if world.local_world_size < world.world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
            interface = interface_towards(os.environ["MASTER_ADDR"])
            if interface is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        tdist.init_process_group(backend, timeout=TIMEOUT)
        if backend == "gloo":
            # A rank that leaves at once, for a mistake that all of them meet, would cut off one
            # that is still connecting: that one would show a traceback beside the sentence.
            tdist.barrier()


def interface_towards(host: str) -> str | None:
    """Names the network interface over which this machine reaches `host`; None if unknown.

    Gloo itself asks what its own host name means, which on many machines is 127.0.1.1: the other
    hosts are then told to connect to themselves. If `host` is this machine by such a name, it is
    the interface that leads out of here.
    """
    for target in (host, _ELSEWHERE):
        try:
            address = socket.getaddrinfo(target, 1, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # asks the routing table; nothing is sent
                own_address = probe.getsockname()[0]
                for _, name in socket.if_nameindex():
                    if _ipv4_address(probe, name) == own_address and name != "lo":
                        return name
        except OSError:
            continue
    return None


def _ipv4_address(probe: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    except OSError:
        return None  # it has none
    return socket.inet_ntoa(answer[20:24])


_SIOCGIFADDR = 0x8915  # Linux: see netdevice(7)
_ELSEWHERE = "192.0.2.1"  # nobody's, see RFC 5737: the way to it is the default route


def side_group() -> Group:
    """Makes a second group of all ranks, on the CPU, for the collectives of another thread.

    Two threads that used one group would meet the wrong partner. All ranks must call it, once.
    Returns None without a process group.
    """
    if not tdist.is_initialized():
        return None
    return tdist.new_group(backend="gloo", timeout=SIDE_TIMEOUT)


@contextmanager
def local_rank_shown(world: World) -> Iterator[None]:
    """Puts LOCAL_RANK into the environment for a backend that reads it, if no launcher did."""
    is_ours = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        yield
    finally:
        if is_ours:
            del os.environ["LOCAL_RANK"]


def barrier(group: Group = None) -> None:
    """Waits for all ranks; nothing to wait for without a process group."""
    if tdist.is_initialized():
        tdist.barrier(group=group)


def sum_over_ranks(
    values: Sequence[float], device: torch.device | None = None, group: Group = None
) -> list[float]:
    """Returns the element-wise sum over ranks, in fp64, the same bits on every rank."""
    if not tdist.is_initialized() or tdist.get_world_size(group) == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    tdist.all_reduce(total, group=group)
    return [float(value) for value in total.tolist()]


def gather_over_ranks(values: Sequence[float], world: World) -> list[list[float]]:
    """Returns the values of every rank, a list each, the same on every rank; all give as many."""
    table = [0.0] * (len(values) * world.world_size)
    table[world.rank * len(values) : (world.rank + 1) * len(values)] = map(float, values)
    total = sum_over_ranks(table, world.device)
    return [total[at : at + len(values)] for at in range(0, len(total), len(values))]


def ranks_where(condition: bool, world: World) -> list[int]:
    """Returns the ranks on which `condition` holds, lowest first, the same list on every rank."""
    votes = [float(condition and rank == world.rank) for rank in range(world.world_size)]
    return [rank for rank, vote in enumerate(sum_over_ranks(votes, world.device)) if vote]


def same_on_all_ranks(text: str, world: World) -> bool:
    """Whether all ranks gave the same text, by its hash; the same answer on every rank."""
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
    [total] = sum_over_ranks([value], world.device)
    return not ranks_where(total != value * world.world_size, world)


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
