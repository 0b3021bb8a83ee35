"""Which CPU cores a rank runs on: all of them, or a share of its own near its memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from scalellm.errors import ConfigError

_SYSTEM = Path("/sys/devices/system")
# Shares of a core of threads that have stepped back from one that has not: a tenth, a seventieth.
BEHIND, FAR_BEHIND = 10, 19


def available_cores() -> int:
    """Cores this process may use (its affinity mask, not the machine's size)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def bound_to_share(index: int, num_shares: int) -> Iterator[None]:
    """Keeps this thread, and those it starts, on one of `num_shares` equal parts of the cores.

    Neighbours share: first the threads of one core, then the cores of one NUMA node, so that Linux,
    which gives memory where it is first touched, gives it on the rank's own node.

    Raises:
        ConfigError: there are fewer cores than shares, as also where a launcher has given each rank
            its own already, or the system cannot bind.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("run.bind_cores=true needs Linux; set it to false")
    before = os.sched_getaffinity(0)
    if len(before) < num_shares:
        raise ConfigError(
            f"run.bind_cores=true needs a core for each of the {num_shares} ranks of this host, "
            f"but this rank may use {len(before)}; start fewer ranks, or set it to false, as where "
            "the launcher has given each rank its own cores"
        )
    os.sched_setaffinity(0, share_of(by_place(before), index, num_shares))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def share_of(cores: Sequence[int], index: int, num_shares: int) -> list[int]:
    """Returns the `index`-th of `num_shares` runs of neighbours; all have the same length."""
    size = len(cores) // num_shares
    return list(cores[index * size : (index + 1) * size])


def by_place(cores: set[int], system: Path = _SYSTEM) -> list[int]:
    """Orders logical cores by NUMA node, then package, then physical core."""

    def place(core: int) -> tuple[int, int, int, int]:
        folder = system / "cpu" / f"cpu{core}"
        nodes = [int(path.name.removeprefix("node")) for path in folder.glob("node[0-9]*")]
        package = _read_int(folder / "topology" / "physical_package_id")
        return (min(nodes, default=0), package, _read_int(folder / "topology" / "core_id"), core)

    return sorted(cores, key=place)


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def step_back(niceness: int = BEHIND) -> None:
    """Lets the calling thread, and those it starts, take mostly what cores the others leave idle.

    For what goes on beside the training: OpenMP's threads wait for the slowest of them, so one that
    shares its core holds up all. Linux only: elsewhere priorities belong to whole processes.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
