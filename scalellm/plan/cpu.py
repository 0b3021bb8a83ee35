"""What the resident set of a rank on a CPU has beside its tensors, measured, with the reasons.

Figures of torch 2.13 on Linux with glibc, above the size a process has before its model is built.
"""

from __future__ import annotations

import itertools

from scalellm import strategies
from scalellm.config import Config
from scalellm.plan._ranks import ranks_of
from scalellm.plan._record import engine_runs_dry, has_pipeline, is_deepspeed
from scalellm.plan.allocator import MIB
from scalellm.plan.heap import heap_bytes
from scalellm.plan.memory import events_of
from scalellm.plan.types import Memory
from scalellm.process import KEPT_BYTES, MAPPED_FROM_BYTES

# Pages of libraries that the first step touches (15 to 20 MiB), and what MKL packs matrices into
# and keeps (24 to 41 MiB, more for larger ones): the median of what 176 runs took above their heap
# as simulated (docs/planning.md).
_PROCESS_BYTES = 55 * MIB

_HOLES: dict[str, float] = {}


def beside_tensors(config: Config, world_size: int, memory: Memory) -> int:
    """Returns the bytes to add to a prediction made for a CPU: what is loaded, and holes."""
    return _PROCESS_BYTES + _hole_bytes(config, world_size, memory)


def _hole_bytes(config: Config, world_size: int, memory: Memory) -> int:
    """What the heap reaches beyond the tensors' peak; 0 for a strategy that cannot run dry."""
    if config.strategy.name not in strategies.names():
        return 0
    if is_deepspeed(config) and not engine_runs_dry(config, world_size):
        return 0
    if config.strategy.name == "parallel" and has_pipeline(ranks_of(config, world_size).options):
        return 0  # measured: 2 to 10% too much without any, twice as much with those simulated
    key, events_of_step = events_of(config, world_size)
    if key not in _HOLES:
        events = events_of_step()
        peak_bytes = max(itertools.accumulate(event.size_bytes for event in events))
        heap = heap_bytes(events, MAPPED_FROM_BYTES if is_deepspeed(config) else KEPT_BYTES)
        _HOLES[key] = heap / peak_bytes - 1
    return max(0, int(_HOLES[key] * memory.peak_bytes))
