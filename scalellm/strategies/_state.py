"""What strategies give to a checkpoint and take from it: rectangles of named global tensors.

`model.<fqn>` is a parameter (master weights), `optim.<fqn>.{exp_avg,exp_avg_sq,step}` its AdamW
state; FQNs are those of the bare model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scalellm.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A rectangle of one named global tensor, as this rank holds it."""

    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


class StateSource(Protocol):
    """Where `load_state` reads from: a verified checkpoint, whatever ranks wrote it."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Rectangle:
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Yields, in order, the rectangles of elements `start` to `stop` of a row-major tensor.

    ZeRO cuts flattened tensors anywhere; the format knows rectangles only. A range of a matrix is
    at most three: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Rectangle((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    begin, end = start - first * row, stop - last * row
    if first == last and (begin, end) != (0, row):
        yield from _in_row(shape, first, begin, end)
        return
    if begin:
        yield from _in_row(shape, first, begin, row)
        first += 1
    whole_rows = last + 1 if end == row else last
    if first < whole_rows:
        rest = shape[1:]
        yield Rectangle((first, *(0 for _ in rest)), (whole_rows - first, *rest))
    if end != row:
        yield from _in_row(shape, last, 0, end)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Rectangle]:
    for inner in rectangles(shape[1:], start, stop):
        yield Rectangle((row, *inner.offsets), (1, *inner.shape))


def flat_pieces(
    name: str, flat: Tensor, shape: tuple[int, ...], start: int, stop: int
) -> Iterator[Piece]:
    """Yields elements `start` to `stop` of tensor `name`, which `flat` holds, as pieces."""
    done = 0
    for part in rectangles(shape, start, stop):
        size = math.prod(part.shape)
        yield Piece(name, flat[done : done + size].view(part.shape), shape, part.offsets)
        done += size


def read_flat(
    source: StateSource, name: str, flat: Tensor, shape: tuple[int, ...], start: int, stop: int
) -> None:
    """Fills `flat` with elements `start` to `stop` of the stored tensor `name`."""
    done = 0
    for part in rectangles(shape, start, stop):
        size = math.prod(part.shape)
        flat[done : done + size].copy_(source.read(name, part.offsets, part.shape).flatten())
        done += size


def check_names(shapes: dict[str, tuple[int, ...]], source: StateSource) -> None:
    """Refuses a checkpoint of another model. `shapes` are the global shapes by FQN."""
    stored = source.names()
    parameters = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    moments = {f"optim.{name}.{key}" for name in shapes for key in (*MOMENTS, "step")}
    unknown = {name for name in stored if name.startswith("optim.")} - moments
    for problem, odd in (
        ("lacks", sorted(set(shapes) - parameters)),
        ("has, but this model lacks,", sorted(parameters - set(shapes))),
        ("has, but this optimizer lacks,", sorted(unknown)),
    ):
        if odd:
            raise CheckpointError(
                f"the checkpoint {problem} {odd[0]} (and {len(odd) - 1} more): it is of another "
                "architecture; use the config in its run folder"
            )
    for name, shape in shapes.items():
        wanted = {f"model.{name}": shape}
        if f"optim.{name}.step" in stored:
            wanted |= {f"optim.{name}.{key}": shape for key in MOMENTS}
        for full_name, expected in wanted.items():
            if full_name not in stored or source.shape(full_name) != expected:
                found = source.shape(full_name) if full_name in stored else "nothing"
                raise CheckpointError(
                    f"the checkpoint has {found} for {full_name}, this model wants {expected}: it "
                    "is of another architecture; use the config in its run folder"
                )
