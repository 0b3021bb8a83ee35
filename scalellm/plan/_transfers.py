"""What `traffic` is told in, and the transfers of sharded units, which several strategies have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scalellm.plan.types import CollectiveKind

FLOAT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
Shape = tuple[int, ...]
Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Widths:
    """Bytes of a number of parameters as stored, as gathered (and computed with), of gradients."""

    stored_bytes: int
    gathered_bytes: int
    reduced_bytes: int

    @classmethod
    def of(cls, precision: str, param_dtype: str | None, reduce_dtype: str | None) -> Widths:
        stored = FLOAT_BYTES["fp64" if precision == "fp64" else "fp32"]
        gathered = FLOAT_BYTES[param_dtype] if param_dtype else stored
        reduced = FLOAT_BYTES[reduce_dtype] if reduce_dtype else gathered
        return cls(stored, gathered, reduced)


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind, over one optimizer step.

    `ranks` take part, `stride` apart (1: neighbours). `micro_batches` is in how many of them it
    happens; the forward or backward of those may hide it where `overlaps` is true.
    """

    kind: CollectiveKind
    phase: Phase
    count: int
    payload_bytes: int
    ranks: int
    stride: int = 1
    overlaps: bool = False
    micro_batches: int = 1


@dataclass(frozen=True)
class Shards:
    """How FSDP divides units among `ranks`, `stride` apart, and repeats them `replicas` times.

    `gathers` and `reductions` are in how many micro-batches of a step they happen; the backward
    gathers again if `reshards`. Bytes are of a number on the wire.
    """

    ranks: int
    gathers: int
    reductions: int
    gathered_bytes: int
    reduced_bytes: int
    reshards: bool = True
    stride: int = 1
    replicas: int = 1


def elements(shapes: Iterable[Shape], ranks: int = 1) -> int:
    """Numbers of the shapes, their first dimension padded to a multiple of `ranks`."""
    return sum(-(-s[0] // ranks) * ranks * math.prod(s[1:]) for s in shapes)


def sharded(unit_shapes: Sequence[Sequence[Shape]], shards: Shards) -> list[Transfer]:
    """Transfers of blocks, in order, and of what is outside of blocks, the last unit."""
    units = [elements(shapes, shards.ranks) for shapes in unit_shapes]

    def both(kind: CollectiveKind, phase: Phase, times: int, size: int) -> list[Transfer]:
        """The first gathers or last reductions, of the root and a block, hide behind nothing."""
        split = [([units[0], units[-1]], False), (units[1:-1], True)]
        return [
            Transfer(
                kind,
                phase,
                count=times * len(part),
                payload_bytes=times * size * sum(part),
                ranks=shards.ranks,
                stride=shards.stride,
                overlaps=overlaps,
                micro_batches=times,
            )
            for part, overlaps in split
            if part
        ]

    transfers = both("all_gather", "forward", shards.gathers, shards.gathered_bytes)
    if shards.reshards:
        transfers += both("all_gather", "backward", shards.gathers, shards.gathered_bytes)
    reductions = both("reduce_scatter", "backward", shards.reductions, shards.reduced_bytes)
    if shards.replicas == 1:
        return transfers + reductions
    replicas = [
        replace(
            part,
            kind="all_reduce",
            payload_bytes=part.payload_bytes // shards.ranks,
            ranks=shards.replicas,
            stride=shards.ranks * shards.stride,
        )
        for part in reductions
    ]
    return transfers + reductions + replicas
