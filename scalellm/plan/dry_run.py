"""One optimizer step without numbers: real wrapping, sharding and collectives, no memory.

The strategy, the decoder and the optimizer run on fake tensors, which have shapes and no data, over
a process group that answers at once: a thousand ranks are simulated by their first. DDP's reducer
reads data and cannot run like that: what it does to memory is done by `_buckets` instead.
DeepSpeed's engine reads numbers too, which are answered (`_zero_steps`), as on a CPU; for a GPU it
has an estimate only (`memory.estimate`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scalellm.config import Config
from scalellm.plan._ranks import ranks_of
from scalellm.plan._record import Trace, record
from scalellm.plan._steps import FEW_LAYERS, FIRST, MIDDLE
from scalellm.plan.live import KINDS, Kind
from scalellm.plan.types import Collective, CollectiveKind, Memory
from scalellm.strategies._mesh import ParallelOptions

_MIDDLE_LABELS = (f"forward {MIDDLE}", f"backward {MIDDLE}")

_TRACES: dict[str, Trace] = {}


@dataclass(frozen=True)
class DryRun:
    """What a step needs and sends; `seconds` is what the dry run itself took."""

    memory: Memory
    collectives: list[Collective]
    seconds: float


def dry_run(config: Config, world_size: int, device_type: str = "cuda") -> DryRun:
    """Runs one optimizer step of rank 0 of `world_size` on fake tensors, after a warm-up step.

    Of a pipeline it is the memory of the first or the last rank, whichever has more.

    Accumulation beyond two micro-batches repeats the second: its memory is the same and its traffic
    is counted. Compiling, which changes what is kept for the backward, is left out. The few numbers
    that ranks add up (gradient norm, loss, DDP's map of unused parameters) are not counted.

    Args:
        device_type: "cpu" or "cuda": which attention kernel is taken, and whether offloaded tensors
            lie elsewhere.

    Raises:
        UserError: DeepSpeed for a GPU or with a disk; or this process is a rank of a process group.
        ConfigError: the config cannot run in such a world.
    """
    started_s = time.perf_counter()
    trace = record(config, world_size, device_type)
    memory, collectives = summarize(trace)
    options = ranks_of(config, world_size).options
    if isinstance(options, ParallelOptions) and options.mesh.pp > 1:
        # The first rank keeps most micro-batches, the last one has the logits.
        last = world_size - world_size // options.mesh.pp
        other, _ = summarize(record(config, world_size, device_type, last))
        memory = max(memory, other, key=lambda one: one.peak_bytes)
    return DryRun(memory, collectives, time.perf_counter() - started_s)


def summarize(trace: Trace) -> tuple[Memory, list[Collective]]:
    """Returns the worst moment of a trace, and all its traffic."""
    level, most = Counter(trace.start), Counter(trace.start)
    counts: Counter[CollectiveKind] = Counter()
    payloads: Counter[CollectiveKind] = Counter()
    for segment in trace.segments:
        moment = _plus(level, segment.peak)
        if _counted_bytes(moment, trace) > _counted_bytes(most, trace):
            most = moment
        level = _plus(level, segment.change)
        times = trace.first_times if segment.label.startswith(FIRST) else 1
        for one in segment.traffic:
            counts[one.kind] += times
            payloads[one.kind] += times * one.payload_bytes
    collectives = [Collective(kind, counts[kind], payloads[kind]) for kind in sorted(counts)]
    here = {f"{kind}_bytes": 0 if kind in trace.offloaded else most[kind] for kind in KINDS}
    host_bytes = sum(most[kind] for kind in trace.offloaded)
    return Memory(**here, host_bytes=host_bytes), collectives


def stretched(trace: Trace, layers: int) -> Trace:
    """The trace of `FEW_LAYERS` blocks as that of `layers` blocks: the middle one is repeated.

    Also right where the worst moment is another one: each repetition changes what is held.
    """
    extra = layers - FEW_LAYERS
    segments = []
    for segment in trace.segments:
        is_middle = segment.label.partition(" ")[2] in _MIDDLE_LABELS
        segments += [segment] * (1 + extra if is_middle else 1)
    start = Counter(trace.start)
    for kind, size_bytes in trace.layer_bytes.items():
        start[kind] += extra * size_bytes
    return replace(trace, start=dict(start), segments=segments)


def remembered(key: str, make: Callable[[], Trace]) -> Trace:
    """Returns the trace made before under this key; plans that are compared share most of them."""
    if key not in _TRACES:
        _TRACES[key] = make()
    return _TRACES[key]


def _plus(level: Counter[Kind], change: Mapping[Kind, int]) -> Counter[Kind]:
    total = Counter(level)
    total.update(change)  # unlike `+`, it keeps what is negative
    return total


def _counted_bytes(level: Counter[Kind], trace: Trace) -> int:
    return sum(size for kind, size in level.items() if kind not in trace.offloaded)
