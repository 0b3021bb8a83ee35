"""Plans which rows of tokens one rank reads from each group of blocks, and gathers them.

Legend: n rows, S samples per block, T seq_len, G rows of a global batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalellm.data.decode_ahead import Block, BlockDecoder
from scalellm.data.order import SampleOrder
from scalellm.data.reader import TokenDataset

# More than is asked for is gathered at once where it is there; what is handed out are views.
_GATHER_BYTES = 128 << 10


@dataclass(frozen=True)
class Deal:
    """Which positions of a dataset's order are rows of one rank.

    Alone, position `start + k` is row k of the endless sequence of rows, and batch s is the rows
    [s G, (s + 1) G). In a mixture it is the row that `slots` says: the k-th of this dataset's.

    Attributes:
        start: the position of the first row.
        global_rows: G.
        rank_rows: the half-open range of rows that this rank has of each batch.
        slots: where in every `period` rows this dataset's are, rising; None: everywhere.
        period: rows after which `slots` come again.
        first_row: the row of the mixture that batches are counted from.
    """

    start: int
    global_rows: int
    rank_rows: tuple[int, int]
    slots: np.ndarray | None = None
    period: int = 1
    first_row: int = 0

    def mine(self, start: int, stop: int) -> np.ndarray:
        """Returns this rank's positions in [start, stop), rising: (n,) int64."""
        if self.slots is not None:
            position_n = np.arange(start, stop)
            turn_n, index_n = np.divmod(position_n - self.start, len(self.slots))
            row_n = turn_n * self.period + self.slots[index_n] - self.first_row
            row_n %= self.global_rows
            return position_n[(row_n >= self.rank_rows[0]) & (row_n < self.rank_rows[1])]
        first, last = (
            (position - self.start) // self.global_rows for position in (start, stop - 1)
        )
        batch_s = self.start + np.arange(first, last + 1) * self.global_rows
        mine_n = (batch_s[:, None] + np.arange(*self.rank_rows)).ravel()
        return mine_n[(mine_n >= start) & (mine_n < stop)]


class Rows(NamedTuple):
    """Rows of one rank.

    Attributes:
        tokens_nS: (n, T + 1) stored dtype.
        num_targets_n: (n,) int32, leading targets that are real.
        starts_nT: (n, T) bool, whether an input token begins a document; None without documents.
    """

    tokens_nS: np.ndarray
    num_targets_n: np.ndarray
    starts_nT: np.ndarray | None


@dataclass
class _Plan:
    """What one rank reads from one group: blocks in order of first use, and where each row is."""

    half: int
    blocks: list[Block]
    place_n: np.ndarray
    inner_n: np.ndarray
    num_targets_n: np.ndarray
    num_ready: int = 0


class RowSource:
    """One rank's rows in order; only the blocks this rank touches are decoded, each once a group.

    Memory is two groups of blocks, 2 * lanes * S * T tokens: one is read while the next is decoded.

    Args:
        dataset: the tokens.
        order: the order of its samples; positions count on through all epochs.
        deal: which positions are this rank's.
        start: the first position to read, at or after the first one of `deal`.
        stop: the position to stop at, or None to go on for ever.
        documents: also yield where documents begin.
        decode_threads: 0 decodes in the calling thread, when a block's first row is due.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: SampleOrder,
        *,
        deal: Deal,
        start: int,
        stop: int | None = None,
        documents: bool,
        decode_threads: int,
    ) -> None:
        self._order, self._deal = order, deal
        self._is_packed, self._documents = dataset.packed_seq_len is not None, documents
        self._start, self._stop = start, stop
        self._decoder = BlockDecoder(
            dataset,
            order,
            documents=documents or self._is_packed,
            threads=max(decode_threads, dataset.fetch_threads),
        )
        nothing = np.empty(0, np.int64)
        self._plan, self._at = _Plan(0, [], nothing, nothing, nothing.astype(np.int32)), 0
        self._plans = self._make_plans()
        self._ahead: deque[_Plan] = deque()
        self._pending: Rows | None = None
        self._error: BaseException | None = None

    def __del__(self) -> None:
        if hasattr(self, "_decoder"):
            self._decoder.stop()

    def close(self) -> None:
        """Ends the threads; later calls of `take` raise ValueError."""
        self._error = ValueError("the stream is closed")
        self._pending = None
        self._decoder.stop()
        self._decoder.join()

    def take(self, count: int) -> Rows:
        """Returns the rank's next `count` rows; fewer or none at the end.

        Raises:
            DataError: a block of these rows is damaged; every later call raises it again, since
                rows after a gap would not be the rows they claim to be.
        """
        if self._pending is None or len(self._pending.num_targets_n) < count:
            if self._error is not None:
                raise self._error
            try:
                self._pending = self._gather_more(count)
            except BaseException as error:
                self._error = error
                raise
        rows = _slice(self._pending, 0, count)
        rest = len(self._pending.num_targets_n) - count
        self._pending = _slice(self._pending, count, count + rest) if rest > 0 else None
        return rows

    def _gather_more(self, count: int) -> Rows:
        """Gathers `count` rows, or several times as many at once when their blocks are there."""
        plan, start = self._plan, self._at
        if self._pending is None and len(plan.place_n) - start >= count > 0:
            times = 1
            if plan.num_ready == len(plan.blocks):
                row_bytes = self._decoder.windows.itemsize * self._order.seq_len
                left = len(plan.place_n) - start
                times = max(1, min(left, _GATHER_BYTES // row_bytes) // count)
            self._at = start + times * count
            return self._gather(plan, start, self._at)
        had = [] if self._pending is None else [self._pending]
        missing = count - sum(len(rows.num_targets_n) for rows in had)
        return _join([*had, *self._gather_across(missing)])

    def _gather_across(self, count: int) -> list[Rows]:
        parts: list[Rows] = []
        while True:
            stop = min(self._at + count, len(self._plan.place_n))
            parts.append(self._gather(self._plan, self._at, stop))
            count -= stop - self._at
            self._at = stop
            if count == 0 or not self._advance():
                return parts

    def _advance(self) -> bool:
        """Goes to the next group's plan; its predecessor's half of the ring is decoded into."""
        while len(self._ahead) < self._decoder.halves:
            plan = next(self._plans, None)
            if plan is None:
                break
            self._ahead.append(plan)
            for block in plan.blocks:
                self._decoder.submit(block)
        if not self._ahead:
            return False
        self._plan, self._at = self._ahead.popleft(), 0
        return True

    def _gather(self, plan: _Plan, start: int, stop: int) -> Rows:
        place_n, inner_n = plan.place_n[start:stop], plan.inner_n[start:stop]
        if plan.num_ready < len(plan.blocks) and stop > start:
            for block in plan.blocks[plan.num_ready : int(place_n.max()) + 1]:
                self._decoder.wait(block)
                plan.num_ready += 1
        decoder = self._decoder
        tokens_nS = decoder.windows[plan.half][place_n, inner_n]
        starts_nT, num_targets_n = None, plan.num_targets_n[start:stop]
        if decoder.start_windows is not None:
            starts_nS = decoder.start_windows[plan.half][place_n, inner_n]
            starts_nT = starts_nS[:, :-1] if self._documents else None
            if self._is_packed:
                # What begins last is the padding, or the next row.
                last_n = self._order.seq_len - np.argmax(starts_nS[:, :0:-1], axis=1)
                num_targets_n = (last_n - 1).astype(np.int32)
        return Rows(tokens_nS, num_targets_n, starts_nT)

    def _make_plans(self) -> Iterator[_Plan]:
        order, size = self._order, self._order.num_samples
        position, number = self._start, 0
        while self._stop is None or position < self._stop:
            epoch, within = divmod(position, size)
            group = order.group_of(within, epoch)
            end = epoch * size + order.group_start(group + 1, epoch)
            if self._stop is not None:
                end = min(end, self._stop)
            mine_n = self._deal.mine(position, end) - epoch * size
            if len(mine_n):
                yield self._make_plan(mine_n, group, epoch, number % self._decoder.halves)
                number += 1
            position = end

    def _make_plan(self, positions_n: np.ndarray, group: int, epoch: int, half: int) -> _Plan:
        order, n = self._order, len(positions_n)
        _, lane_n, slot_n = order.deal(positions_n, epoch)
        block_of_lane = order.group_blocks(group, epoch)
        first_use = np.full(len(block_of_lane), n)
        # The last assignment wins, hence backwards.
        first_use[lane_n[::-1]] = np.arange(n)[::-1]
        lanes = np.argsort(first_use, kind="stable")[: np.count_nonzero(first_use < n)]
        place_of_lane = np.empty(len(block_of_lane), np.int64)
        place_of_lane[lanes] = np.arange(len(lanes))
        block_n = block_of_lane[lane_n]
        inner_n = order.permute_inside(slot_n, block_n, epoch)
        is_tail_n = block_n * order.block_samples + inner_n == order.num_samples - 1
        num_targets_n = np.where(is_tail_n, order.tail_targets, order.seq_len).astype(np.int32)
        blocks = [Block(int(block_of_lane[lane]), half, place) for place, lane in enumerate(lanes)]
        return _Plan(half, blocks, place_of_lane[lane_n], inner_n, num_targets_n)


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    starts_nT = None if rows.starts_nT is None else rows.starts_nT[start:stop]
    return Rows(rows.tokens_nS[start:stop], rows.num_targets_n[start:stop], starts_nT)


def _join(parts: list[Rows]) -> Rows:
    parts = [rows for rows in parts if len(rows.num_targets_n)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    starts = [rows.starts_nT for rows in parts if rows.starts_nT is not None]
    return Rows(
        np.concatenate([rows.tokens_nS for rows in parts]),
        np.concatenate([rows.num_targets_n for rows in parts]),
        np.concatenate(starts) if starts else None,
    )
