"""The stream of batches with a cursor: the same global order for every world size and restart.

Legend: B rows of this rank, T seq_len, S seq_len + 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scalellm.data.batch import Batch, Cursor, check_cursor
from scalellm.data.order import SampleOrder
from scalellm.data.reader import TokenDataset
from scalellm.data.rows import Deal, Rows, RowSource
from scalellm.errors import ConfigError, DataError


class Feed:
    """One rank's rows of one dataset, and how many targets all ranks have in as many rows.

    Args:
        dataset: the tokens.
        order: the order of its samples.
        deal: which positions are this rank's.
        start: the first position to read.
        document_mask: also say where documents begin.
        decode_threads: threads that decode ahead; 0 decodes in the calling thread.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: SampleOrder,
        *,
        deal: Deal,
        start: int,
        document_mask: bool,
        decode_threads: int,
    ) -> None:
        self.order, self.position = order, start
        # A tail before `position` in this epoch is stepped over by the first batch.
        check_packing(dataset, order.seq_len)
        self._is_packed = dataset.packed_seq_len is not None
        epoch = start // order.num_samples
        self._next_tail = epoch * order.num_samples + order.tail_position(epoch)
        self._source = RowSource(
            dataset,
            order,
            deal=deal,
            start=start,
            documents=document_mask,
            decode_threads=decode_threads,
        )

    def take(self, count: int) -> Rows:
        """Returns this rank's next rows."""
        return self._source.take(count)

    def advance(self, global_count: int) -> int | None:
        """Counts the targets of the next rows of all ranks, and steps over them.

        None: each rank knows only its own, for the rows are packed.
        """
        stop = self.position + global_count
        missing = self._tails_before(stop) * (self.order.seq_len - self.order.tail_targets)
        self.position = stop
        if self._is_packed:
            return None
        return global_count * self.order.seq_len - missing

    def close(self) -> None:
        """Ends the decode threads; safe to call twice."""
        self._source.close()

    def _tails_before(self, stop: int) -> int:
        """Counts the short samples in [position, stop): one per epoch, found without a search."""
        count, size = 0, self.order.num_samples
        while self._next_tail < stop:
            count += self._next_tail >= self.position
            epoch = self._next_tail // size + 1
            self._next_tail = epoch * size + self.order.tail_position(epoch)
        return count


class TokenStream:
    """Endless batches of one rank, epoch after epoch, each with the cursor to go on after it.

    Global batch s holds positions [sG, (s + 1)G) of the order; rank r takes rows
    [r G / W, (r + 1) G / W). Batches run on across the ends of epochs, so each sample comes exactly
    once per epoch. Resuming costs the same at any place. Neither the world size nor the batch size
    belongs to the order: both may differ on resume.

    A rank decodes only blocks it reads: with G a divisor or a multiple of `lanes` the ranks share
    the decoding, otherwise each may decode all. `seq_len` should divide the dataset's frame_tokens.

    Args:
        dataset: an open split.
        seq_len: T, targets per sample.
        global_batch_size: G, samples of all ranks per batch.
        rank: this rank.
        world_size: W, a divisor of G.
        seed: of the order, any integer.
        lanes: blocks read in turn: more mixes better and holds 2 * lanes blocks in memory.
        document_mask: also give positions and document numbers.
        decode_threads: threads that decode ahead; 0 decodes in the calling thread.
        cursor: go on after this batch.
        shuffle: False reads the samples in order.

    Raises:
        ConfigError: world_size does not divide global_batch_size.
        DataError: the cursor belongs to another dataset or order; while iterating: damaged data.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        lanes: int = 64,
        document_mask: bool = False,
        decode_threads: int = 1,
        cursor: Cursor | None = None,
        shuffle: bool = True,
    ) -> None:
        self._rows = rows_per_rank(global_batch_size, rank, world_size)
        self._global_rows = global_batch_size
        lanes = lanes if shuffle else 0
        self._order = SampleOrder(dataset.num_tokens, seq_len, seed, lanes, dataset.frame_tokens)
        self._fingerprint = dataset.fingerprint
        self._consumed = 0
        if cursor is not None:
            check_cursor(cursor, self.cursor)
            self._consumed = cursor.samples_consumed
        rank_rows = (rank * self._rows, (rank + 1) * self._rows)
        self._feed = Feed(
            dataset,
            self._order,
            deal=Deal(self._consumed, global_batch_size, rank_rows),
            start=self._consumed,
            document_mask=document_mask,
            decode_threads=decode_threads,
        )

    @property
    def cursor(self) -> Cursor:
        """The state after the last batch handed out."""
        order = self._order
        epoch = self._consumed // order.num_samples
        return Cursor(
            self._consumed, epoch, order.seed, self._fingerprint, order.seq_len, order.lanes
        )

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        return self

    def __next__(self) -> tuple[Batch, Cursor]:
        rows = self._feed.take(self._rows)
        global_target_tokens = self._feed.advance(self._global_rows)
        self._consumed += self._global_rows
        return make_batch(rows, global_target_tokens), self.cursor

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decode threads; safe to call twice."""
        self._feed.close()


def evaluation_batches(
    dataset: TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    document_mask: bool = False,
    limit_samples: int | None = None,
    decode_threads: int = 1,
) -> Iterator[Batch]:
    """Yields a split once, in order, every sample on exactly one rank, equally often on all ranks.

    Args:
        dataset: an open split.
        seq_len: T, targets per sample.
        batch_size: rows per rank; a global batch has batch_size * world_size samples.
        rank: this rank.
        world_size: number of ranks.
        document_mask: also give positions and document numbers.
        limit_samples: stop after this many samples of all ranks.
        decode_threads: threads that decode ahead; 0 decodes in the calling thread.

    Yields:
        Batches of `batch_size` rows. In the last one rows beyond the end have num_targets 0.

    Raises:
        ConfigError: impossible sizes; DataError: the split is too short or damaged.
    """
    global_rows = batch_size * world_size
    rows_per_rank(global_rows, rank, world_size)
    check_packing(dataset, seq_len)
    order = SampleOrder(dataset.num_tokens, seq_len, 0, 0, dataset.frame_tokens)
    stop = order.num_samples
    if limit_samples is not None:
        if limit_samples < 1:
            raise ConfigError(f"limit_samples={limit_samples} must be 1 sample or more")
        stop = min(stop, limit_samples)
    source = RowSource(
        dataset,
        order,
        deal=Deal(0, global_rows, (rank * batch_size, (rank + 1) * batch_size)),
        start=0,
        stop=stop,
        documents=document_mask,
        decode_threads=decode_threads,
    )
    is_counted = dataset.packed_seq_len is None
    return _evaluate(source, order, stop, batch_size, global_rows, dataset.eos_id, is_counted)


def _evaluate(
    source: RowSource,
    order: SampleOrder,
    stop: int,
    batch_size: int,
    global_rows: int,
    eos_id: int,
    is_counted: bool,
) -> Iterator[Batch]:
    try:
        for first in range(0, stop, global_rows):
            rows = source.take(batch_size)
            short = batch_size - len(rows.num_targets_n)
            last = min(first + global_rows, stop)
            missing = order.seq_len - order.tail_targets if last == order.num_samples else 0
            targets = (last - first) * order.seq_len - missing if is_counted else None
            yield make_batch(_pad(rows, short, eos_id), targets)
    finally:
        source.close()


def _pad(rows: Rows, count: int, eos_id: int) -> Rows:
    """Adds rows without a target."""
    starts_nT = None if rows.starts_nT is None else np.pad(rows.starts_nT, ((0, count), (0, 0)))
    tokens_nS = np.pad(rows.tokens_nS, ((0, count), (0, 0)), constant_values=eos_id)
    return Rows(tokens_nS, np.pad(rows.num_targets_n, (0, count)), starts_nT)


def check_packing(dataset: TokenDataset, seq_len: int) -> None:
    """Raises DataError if rows of `seq_len` tokens are not those the dataset was packed into."""
    if dataset.packed_seq_len not in (None, seq_len):
        raise DataError(
            f"{dataset.path} was packed into rows of {dataset.packed_seq_len} tokens, not of "
            f"{seq_len}; set model.seq_len={dataset.packed_seq_len}, or prepare it again with "
            f"--pack {seq_len}"
        )


def make_batch(
    rows: Rows, global_target_tokens: int | None, sources_B: np.ndarray | None = None
) -> Batch:
    """Makes a rank's batch of its rows; with documents if the rows say where they begin."""
    positions_BT = documents_BT = None
    if rows.starts_nT is not None:
        positions_BT, documents_BT = _documents(rows.starts_nT)
    return Batch(
        rows.tokens_nS,
        rows.num_targets_n,
        global_target_tokens,
        positions_BT,
        documents_BT,
        sources_B,
    )


def rows_per_rank(global_batch_size: int, rank: int, world_size: int) -> int:
    """Returns how many rows of a global batch one rank has; ConfigError if they do not divide."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} must be 0 to world_size - 1 = {world_size - 1}")
    if global_batch_size < 1 or global_batch_size % world_size:
        nearest = max(1, round(global_batch_size / world_size)) * world_size
        raise ConfigError(
            f"global_batch_size={global_batch_size} samples is not a positive multiple of "
            f"world_size={world_size}; try {nearest}"
        )
    return global_batch_size // world_size


def _documents(starts_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions_BT and documents_BT, int32, from where documents begin."""
    starts_BT = starts_BT.copy()
    starts_BT[:, 0] = False
    documents_BT = np.cumsum(starts_BT, axis=1, dtype=np.int32)
    index_T = np.arange(starts_BT.shape[1], dtype=np.int32)
    first_BT = np.maximum.accumulate(np.where(starts_BT, index_T, np.int32(0)), axis=1)
    return index_T - first_BT, documents_BT
