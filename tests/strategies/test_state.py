"""Flat ranges as rectangles: what ZeRO cuts comes back, at any cut of any shape."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from scalellm.strategies._state import flat_pieces, read_flat, rectangles

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


class Source:
    """A stored tensor, read by rectangles."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole

    def names(self) -> set[str]:
        return {"x"}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.whole.shape)

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        corner = zip(offsets, shape, strict=True)
        return self.whole[tuple(slice(start, start + size) for start, size in corner)]


@given(SHAPES, st.data())
def test_pieces_of_a_flat_range_are_its_elements_in_order(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).reshape(shape)
    flat = whole.flatten()[start:stop]
    found = torch.full(shape, -1)
    for piece in flat_pieces("x", flat, shape, start, stop):
        corner = zip(piece.offsets, piece.tensor.shape, strict=True)
        found[tuple(slice(a, a + n) for a, n in corner)] = piece.tensor
    expected = torch.full((size,), -1)
    expected[start:stop] = torch.arange(start, stop)
    assert torch.equal(found.flatten(), expected)

    read = torch.empty(stop - start, dtype=whole.dtype)
    read_flat(Source(whole), "x", read, shape, start, stop)
    assert torch.equal(read, flat)


def test_a_range_of_a_matrix_is_at_most_three_rectangles() -> None:
    found = [(part.offsets, part.shape) for part in rectangles((4, 5), 3, 17)]
    assert found == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert len(list(rectangles((4, 5), 0, 20))) == 1
    assert not list(rectangles((4, 5), 7, 7))
