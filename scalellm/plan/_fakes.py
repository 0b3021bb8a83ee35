"""What stands in for other ranks in a dry run: a group that answers at once, shards of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as tdist
from torch import Tensor


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """This process is rank 0 of so many; collectives leave their outputs as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tdist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with _own_shards_only():
            yield
    finally:
        tdist.destroy_process_group()


@contextmanager
def _own_shards_only() -> Iterator[None]:
    """Spares FSDP the shards of other ranks: of 1,024 views a parameter it looks at one or two.

    Fake tensors for them took two thirds of a dry run of 1,024 ranks. Where torch has no such
    function any more, nothing is spared.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param
    original = getattr(module, "_chunk_with_empty", None)
    if original is None:
        yield
        return
    module._chunk_with_empty = _Chunks
    try:
        yield
    finally:
        module._chunk_with_empty = original


class _Chunks:
    """The chunks that `torch.chunk` cuts, and empty ones after the last, each made when asked."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim, self._num_chunks = tensor, dim, num_chunks
        self._each = max(1, -(-tensor.shape[dim] // num_chunks))

    def __len__(self) -> int:
        return self._num_chunks

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._num_chunks:
            raise IndexError(f"chunk {index} of {self._num_chunks}")
        start = index * self._each
        length = min(self._each, self._tensor.shape[self._dim] - start)
        if length <= 0 and index > 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, length)
