"""What the fullest rank of a pipeline holds: its schedule, played with the steps of one decoder.

A trace of the decoder on one rank says what a block keeps and what it needs beyond. A stage is some
of these blocks, with the embedding or the loss at its ends, and a rank's schedule says how many
micro-batches of it are there at once. Zero bubble's first half of a backward is taken to free
nothing, and to keep the gradients of all products' results for the second one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scalellm.config import BatchPlan, Config, ModelConfig
from scalellm.plan._record import Trace
from scalellm.plan._steps import FEW_LAYERS, LAST, MIDDLE
from scalellm.plan._transfers import Widths
from scalellm.plan.live import KINDS, Kind, Segment
from scalellm.plan.traffic import unit_shapes
from scalellm.plan.types import Memory
from scalellm.strategies._mesh import ParallelOptions
from scalellm.strategies._pipeline_cut import split_layers
from scalellm.strategies._pipeline_schedule import Action, order_of, stages_of, stages_per_rank

Level = Counter[Kind]
_HELD: tuple[Kind, ...] = ("parameters", "optimizer", "gradients")


def pipeline_memory(
    config: Config,
    options: ParallelOptions,
    batches: BatchPlan,
    size: Mapping[str, int],
    trace: Trace,
    trace_shards: int = 1,
) -> Memory:
    """Returns the worst moment of the fullest rank.

    Args:
        size: ranks along each dimension of the mesh.
        trace: a step of `FEW_LAYERS` blocks on ranks of the same tensor and context groups; of two
            micro-batches if there are as many.
        trace_shards: among how many ranks its parameters are divided.
    """
    per_rank = stages_per_rank(options.schedule, options.stages_per_rank or 2)
    layers = split_layers(config.model, size["pp"] * per_rank)
    orders = order_of(options.schedule, size["pp"], batches.grad_accumulation, per_rank)
    shards = size["fsdp"] * size["cp"] if size["fsdp"] > 1 else 1
    if trace_shards > 1:
        trace = _without_buffers(trace)
    widths = Widths.of(config.train.precision, options.param_dtype, options.reduce_dtype)
    border_bytes = _border_numbers(config, options, batches, size) * widths.gathered_bytes
    fullest: Level = Counter()
    for rank, order in enumerate(orders):
        stages = {
            index: _Stage(
                config.model, trace, size["tp"], len(layers[index]), index == 0,
                index == len(layers) - 1, border_bytes, trace_shards, widths,
            )
            for index in stages_of(options.schedule, rank, size["pp"], per_rank)
        }  # fmt: skip
        buffers = border_bytes * batches.grad_accumulation
        buffers *= sum((not one.is_first) + (not one.is_last) for one in stages.values())
        moment = _fullest(_moments(stages, order, shards, buffers))
        fullest = max(fullest, moment, key=_total)
    return Memory(**{f"{kind}_bytes": fullest[kind] for kind in KINDS})


def _without_buffers(trace: Trace) -> Trace:
    """Shards are gathered in each pass there, and by a pipeline once a step."""
    segments = [
        replace(
            segment,
            peak={kind: size for kind, size in segment.peak.items() if kind != "buffers"},
            change={kind: size for kind, size in segment.change.items() if kind != "buffers"},
        )
        for segment in trace.segments
    ]
    return replace(trace, segments=segments)


def _border_numbers(
    config: Config, options: ParallelOptions, batches: BatchPlan, size: Mapping[str, int]
) -> int:
    """Of the activations of a micro-batch between two stages."""
    divided = size["cp"] * (size["tp"] if options.sequence_parallel else 1)
    tokens = batches.micro_batch_size * config.model.seq_len // divided
    return tokens * config.model.hidden_size


@dataclass(frozen=True)
class _Stage:
    model: ModelConfig
    trace: Trace
    tp: int
    layers: int
    is_first: bool
    is_last: bool
    border_bytes: int
    trace_shards: int
    widths: Widths

    @property
    def gathered_bytes(self) -> int:
        return self.held("parameters") * self.widths.gathered_bytes // self.widths.stored_bytes

    @property
    def gradients_bytes(self) -> int:
        """Of a step's, before they are divided."""
        return self.held("parameters") * self.widths.reduced_bytes // self.widths.stored_bytes

    @property
    def result_gradients_bytes(self) -> int:
        """Of the results of a micro-batch's products, as wide as the residual stream."""
        shapes = [shape for shape in unit_shapes(self.model)[0] if len(shape) == 2]
        features = self.layers * sum(rows for rows, _ in shapes)
        features += (self.model.vocab_size or 0) * self.is_last
        return self.border_bytes * features // self.model.hidden_size

    def held(self, kind: Kind) -> int:
        """Bytes of its parameters, or of what is as large as they are."""
        layer_bytes = self.trace.layer_bytes.get(kind, 0) * self.trace_shards
        whole_bytes = self.trace.start.get(kind, 0) * self.trace_shards
        root_bytes = whole_bytes - FEW_LAYERS * layer_bytes
        words = -(-(self.model.vocab_size or 0) // self.tp) * self.model.hidden_size
        places = self.model.seq_len if self.model.positions == "learned" else 0
        places *= self.model.hidden_size
        norm = sum(math.prod(shape) for shape in unit_shapes(self.model)[-1] if len(shape) == 1)
        root = places + norm + words * (1 if self.model.tie_embeddings else 2)
        mine = (places + words) * self.is_first + (words + norm) * self.is_last
        return self.layers * layer_bytes + root_bytes * mine // root

    @property
    def forward(self) -> list[Segment]:
        ends = [f"forward {FEW_LAYERS - 1}"] if self.is_last else []
        middle = [f"forward {MIDDLE}"] * (self.layers - len(ends))
        return self._segments(["embedding"] * self.is_first + middle + ends)

    @property
    def backward(self) -> list[Segment]:
        begin = ["loss", f"backward {FEW_LAYERS - 1}"] if self.is_last else []
        ends = ["backward 0"] if self.is_first else []
        middle = self.layers - min(1, len(begin)) - len(ends)
        return self._segments(begin + [f"backward {MIDDLE}"] * middle + ends)

    def _segments(self, labels: Sequence[str]) -> list[Segment]:
        known = {segment.label: segment for segment in self.trace.segments}
        return [known[f"{LAST} {label}"] for label in labels]

    @property
    def update(self) -> Level:
        """What the optimizer needs beside, as much as the stage's parameters have of all."""
        found = next(one for one in self.trace.segments if one.label == "update")
        whole = self.trace.start["parameters"] * self.trace_shards
        return Counter(
            {kind: size * self.held("parameters") // whole for kind, size in _passing(found.peak)}
        )


def _passing(level: Mapping[Kind, int]) -> Iterator[tuple[Kind, int]]:
    return ((kind, size) for kind, size in level.items() if kind not in _HELD)


def _moments(
    stages: Mapping[int, _Stage], order: Sequence[Action], shards: int, buffers: int
) -> Iterator[Level]:
    """Yields the worst moment of each computation of a rank's step, and of the update."""
    level: Level = Counter({"buffers": buffers})
    for stage in stages.values():
        for kind in ("parameters", "optimizer"):
            level[kind] += stage.held(kind) // shards
        if shards > 1:  # gathered for the whole step
            level["buffers"] += stage.gathered_bytes
    static = Counter(level)
    plays = {index: _Play(stage) for index, stage in stages.items()}
    for action in order:
        play = plays[action.stage]
        if action.kind != "W":
            yield _plus(level, play.worst(action.kind))
        level.update(play.after(action.kind))
    for stage in stages.values():
        static["gradients"] += stage.gradients_bytes
    for stage in stages.values():
        static.update(stage.update)
    yield static


class _Play:
    """The computations of a stage: what each needs at worst, and what it leaves."""

    def __init__(self, stage: _Stage) -> None:
        self.gradients_bytes = stage.gradients_bytes
        self.has_gradients = False
        self._result_gradients_bytes = stage.result_gradients_bytes
        self.kept: Level = Counter()
        for segment in stage.forward:
            self.kept.update(dict(_passing(segment.change)))
        self._forward = self._worst(stage.forward, 0)
        self._first_backward = self._worst(stage.backward, self.gradients_bytes)
        self._backward = self._worst(stage.backward, 0)
        passing = [Counter(dict(_passing(segment.peak))) for segment in stage.backward]
        self._half_backward = max(passing, key=_total)
        self._half_backward["temporary"] += self._result_gradients_bytes

    @staticmethod
    def _worst(segments: Sequence[Segment], gradients_bytes: int) -> Level:
        """Gradients come little by little."""
        level: Level = Counter()
        found: list[Level] = [Counter()]
        for index, segment in enumerate(segments):
            moment = _plus(level, dict(_passing(segment.peak)))
            moment["gradients"] += gradients_bytes * (index + 1) // len(segments)
            found.append(moment)
            level.update(dict(_passing(segment.change)))
        return max(found, key=_total)

    def worst(self, kind: str) -> Level:
        if kind == "F":
            return self._forward
        if kind == "I":
            return self._half_backward
        return self._backward if self.has_gradients else self._first_backward

    def after(self, kind: str) -> Level:
        """What is there more, or less, when it is done."""
        if kind == "F":
            return self.kept
        change: Level = Counter()
        if not self.has_gradients:
            change["gradients"], self.has_gradients = self.gradients_bytes, True
        if kind != "I":
            change.subtract(self.kept)
        if kind in ("I", "W"):
            change["temporary"] += self._result_gradients_bytes * (1 if kind == "I" else -1)
        return change


def _plus(level: Level, change: Mapping[Kind, int]) -> Level:
    total = Counter(level)
    total.update(change)
    return total


def _fullest(moments: Iterator[Level]) -> Level:
    return max(moments, key=_total)


def _total(level: Level) -> int:
    return sum(level.values())
