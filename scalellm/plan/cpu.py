"""What the resident set of a rank on a CPU has beside its tensors, measured, with the reasons.

Figures of torch 2.13 on Linux with glibc, above the size a process has before its model is built.
"""

from __future__ import annotations

import itertools
from typing import cast

from scalellm import strategies
from scalellm.config import Config
from scalellm.plan._packed import Packing
from scalellm.plan._ranks import batches_of, ranks_of
from scalellm.plan._record import engine_runs_dry, has_pipeline, is_deepspeed
from scalellm.plan.allocator import LIBRARY, MIB
from scalellm.plan.heap import heap_bytes
from scalellm.plan.memory import events_of
from scalellm.plan.types import Memory
from scalellm.process import KEPT_BYTES, MAPPED_FROM_BYTES

# Pages of libraries that the first step touches, and small objects: the median of what 176 runs
# took above their heap as simulated (docs/planning.md).
_PROCESS_BYTES = 17 * MIB

_HOLES: dict[str, float] = {}


def beside_tensors(config: Config, world_size: int, memory: Memory) -> int:
    """Returns the bytes to add to a prediction made for a CPU: what is loaded, and holes."""
    return _PROCESS_BYTES + _heap_bytes(config, world_size, memory)


def _heap_bytes(config: Config, world_size: int, memory: Memory) -> int:
    """What the heap reaches beyond the tensors' peak; without a simulation, what libraries keep."""
    if not _is_simulated(config, world_size):
        return _packed_bytes(config, world_size)
    key, events_of_step = events_of(config, world_size)
    if key not in _HOLES:
        events = events_of_step()
        heap = heap_bytes(events, MAPPED_FROM_BYTES if is_deepspeed(config) else KEPT_BYTES)
        tensors = (event.size_bytes for event in events if event.stream != LIBRARY)
        _HOLES[key] = heap / max(itertools.accumulate(tensors)) - 1
    return max(0, int(_HOLES[key] * memory.peak_bytes))


def _is_simulated(config: Config, world_size: int) -> bool:
    if config.strategy.name not in strategies.names():
        return False
    if is_deepspeed(config):
        return engine_runs_dry(config, world_size)
    # Of a pipeline, measured: 2 to 10% too much without holes, twice as much with those simulated.
    parallel = config.strategy.name == "parallel"
    return not (parallel and has_pipeline(ranks_of(config, world_size).options))


def _packed_bytes(config: Config, world_size: int) -> int:
    """What products of a decoder's sizes have their library keep."""
    model, packing = config.model, Packing()
    rows = batches_of(config, world_size).micro_batch_size * model.seq_len
    hidden = model.hidden_size
    for columns in (
        hidden,
        hidden,
        model.mlp_size,
        cast(int, model.vocab_size),
    ):
        packing.multiply(rows, hidden, columns)
    return packing.kept_bytes
