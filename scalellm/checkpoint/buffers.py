"""The copy of the state that a save in the background writes from, in memory used again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from scalellm.cores import step_back
from scalellm.strategies import Piece

# Memory is taken in slabs: a power of two, since CUDA's pinned memory is handed out in those.
_SLAB_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64
# A thread copies about as much at once: a part of a large tensor, or many small ones.
_BATCH_BYTES = 8 << 20


class Copying:
    """Copies of pieces that are under way."""

    def __init__(
        self, pieces: list[Piece], moving: list[Future[None]], events: list[torch.cuda.Event]
    ) -> None:
        self._pieces, self._moving, self._events = pieces, moving, events

    def wait_for_sources(self) -> None:
        """Returns once what was copied may change.

        On a GPU that is so at once: later work of a stream comes after the copies made in it.
        """
        for batch in self._moving:
            batch.result()

    def result(self) -> list[Piece]:
        """Returns the pieces with tensors of their own, once they are filled."""
        self.wait_for_sources()
        for event in self._events:
            event.synchronize()
        return self._pieces


class Buffers:
    """Copies of pieces in host memory, which the next copies overwrite.

    The first copy is several times slower than those after it: the system hands out and clears
    the pages, which costs more than the copying. Hence the memory is kept. It is pinned where the
    state is on a GPU.
    """

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._copies: dict[tuple[str, tuple[int, ...]], Piece] = {}

    def begin(self, pieces: Iterable[Piece]) -> Copying:
        """Starts copying the pieces, over those of the last call, and returns without waiting.

        What the pieces hold must not change before `Copying.wait_for_sources` has returned.
        """
        copies: list[Piece] = []
        streams: set[torch.cuda.Stream] = set()
        with _Mover() as mover:
            for piece in pieces:
                source = piece.tensor.detach()
                copy = self._copy_like(piece)
                if source.is_cuda:
                    copy.tensor.copy_(source, non_blocking=True)
                    streams.add(torch.cuda.current_stream(source.device))
                elif source.device.type == "cpu" and source.is_contiguous():
                    mover.add(copy.tensor, source)
                else:
                    copy.tensor.copy_(source)
                copies.append(copy)
        return Copying(copies, mover.moving, [stream.record_event() for stream in streams])

    def free(self) -> None:
        """Forgets the memory; it is gone when nobody has a copy any more."""
        self._slabs.clear()
        self._copies.clear()

    def _copy_like(self, piece: Piece) -> Piece:
        """Returns the piece with memory of its own: that which it had before, if it fits."""
        key, like = (piece.name, piece.offsets), piece.tensor
        held = self._copies.get(key)
        if held is None or (held.tensor.dtype, held.tensor.shape) != (like.dtype, like.shape):
            held = self._copies[key] = replace(piece, tensor=self._take(like))
        return held

    def _take(self, like: Tensor) -> Tensor:
        for slab in self._slabs:
            if slab.fits(like):
                return slab.take(like)
        slab = _Slab(like.nbytes, pinned=like.is_cuda)
        self._slabs.append(slab)
        return slab.take(like)


class _Slab:
    def __init__(self, at_least_bytes: int, *, pinned: bool) -> None:
        size_bytes = max(_SLAB_BYTES, 1 << (at_least_bytes - 1).bit_length())
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._pinned = pinned
        self._used_bytes = 0

    def fits(self, like: Tensor) -> bool:
        has_room = self._used_bytes + like.nbytes <= self._memory.nbytes
        return has_room and (self._pinned or not like.is_cuda)

    def take(self, like: Tensor) -> Tensor:
        part = self._memory[self._used_bytes : self._used_bytes + like.nbytes]
        self._used_bytes += -(-like.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return part.view(like.dtype).view(like.shape)


class _Mover:
    """Copies contiguous tensors on the CPU, in as many threads as torch has.

    Torch's own threads would wait for each other at every tensor, which is slow where others need
    the cores too.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=step_back)
        self.moving: list[Future[None]] = []
        self._batch: list[tuple[Tensor, Tensor, int, int]] = []
        self._batch_bytes = 0

    def __enter__(self) -> _Mover:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Starts the rest; after an error waits, since nobody else will."""
        self._start()
        self._pool.shutdown(wait=kind is not None)

    def add(self, target: Tensor, source: Tensor) -> None:
        for start in range(0, source.nbytes, _BATCH_BYTES):
            size_bytes = min(_BATCH_BYTES, source.nbytes - start)
            self._batch.append((target, source, start, size_bytes))
            self._batch_bytes += size_bytes
            if self._batch_bytes >= _BATCH_BYTES:
                self._start()

    def _start(self) -> None:
        self.moving.append(self._pool.submit(_move, self._batch))
        self._batch, self._batch_bytes = [], 0


def _move(batch: list[tuple[Tensor, Tensor, int, int]]) -> None:
    for target, source, start, size_bytes in batch:
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, size_bytes)
