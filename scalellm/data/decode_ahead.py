"""Decodes blocks of samples into a ring of memory, in threads ahead of their use.

Worker processes would cost several times the CPU of the work itself on pre-tokenized data; zstd,
crc32 and file reads release the GIL, so threads are enough.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from numpy.lib.stride_tricks import as_strided

from scalellm.data.order import SampleOrder
from scalellm.data.reader import TokenDataset

_JOIN_S = 5.0


def _held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class Block:
    """One block to decode into `half`, `place` of the ring.

    `pending` is held until the block is there or has failed: a one-shot event at a tenth of the
    price of `threading.Event`, of which every group would make one per lane.
    """

    number: int
    half: int
    place: int
    pending: threading.Lock = field(default_factory=_held_lock)
    error: BaseException | None = None


class BlockDecoder:
    """A ring of (halves, lanes) decoded blocks and the threads that fill it.

    Args:
        dataset: where the tokens come from.
        order: decides the blocks.
        documents: also note where documents begin.
        threads: how many decode ahead; 0 decodes in `wait`, with one half only.

    Attributes:
        halves: groups of blocks the ring holds.
        windows: (halves, lanes, S, T + 1) overlapping read-only view: a sample and its targets.
        start_windows: same shape, bool: the token begins a document; None without documents.
    """

    def __init__(
        self, dataset: TokenDataset, order: SampleOrder, *, documents: bool, threads: int
    ) -> None:
        self._dataset, self._order = dataset, order
        self.halves = 2 if threads else 1
        shape = (self.halves, order.group_lanes, order.block_samples * order.seq_len + 1)
        # Pages of lanes that are never touched are never committed.
        self._ring = np.empty(shape, dataset.dtype)
        self._starts = np.empty(shape, np.bool_) if documents else None
        self.windows = self._as_windows(self._ring)
        self.start_windows = None if self._starts is None else self._as_windows(self._starts)
        self._queue: SimpleQueue[Block | None] = SimpleQueue()
        # No block may enter the queue behind the None that ends its thread: it would wait for ever.
        self._closing, self._closed = threading.Lock(), False
        self._threads = [
            threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, block: Block) -> None:
        """Hands a block to the threads, which take blocks in the order of submission."""
        with self._closing:
            if self._closed:
                _fail(block)
            elif self._threads:
                self._queue.put(block)

    def wait(self, block: Block) -> None:
        """Returns when the block is in the ring.

        Raises:
            DataError: the block is damaged.
        """
        if not self._threads and block.pending.locked():
            self._fill(block)
        with block.pending:
            pass
        if block.error is not None:
            raise block.error

    def stop(self) -> None:
        """Tells the threads to end; blocks queued or submitted later fail, so no waiter is left."""
        with self._closing:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)

    def join(self) -> None:
        """Waits for the threads, but never for ever: a read from a dead disk may not return."""
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self) -> None:
        while (block := self._queue.get()) is not None:
            self._fill(block)

    def _fill(self, block: Block) -> None:
        if self._closed:
            _fail(block)
            return
        try:
            self._decode(block)
        except BaseException as error:
            block.error = error
        block.pending.release()

    def _decode(self, block: Block) -> None:
        row = self._ring[block.half, block.place]
        start = block.number * (len(row) - 1)
        stop = min(start + len(row), self._dataset.num_tokens)
        self._dataset.read_into(start, row[: stop - start])
        row[stop - start :] = self._dataset.eos_id
        if self._starts is not None:
            starts = self._starts[block.half, block.place]
            starts[:] = False
            starts[self._dataset.document_ends(start, min(stop, start + len(row) - 1)) - start] = (
                True
            )

    def _as_windows(self, ring: np.ndarray) -> np.ndarray:
        halves, lanes, _ = ring.shape
        T, item = self._order.seq_len, ring.itemsize
        return as_strided(
            ring,
            (halves, lanes, self._order.block_samples, T + 1),
            (*ring.strides[:2], T * item, item),
            writeable=False,
        )


def _fail(block: Block) -> None:
    block.error = ValueError("the stream is closed")
    block.pending.release()
