"""Figures of one split: lengths of its documents, use of its vocabulary. Bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from scalellm.data.reader import TokenDataset

# Above it the counts alone would take more than 128 MiB.
_MAX_COUNTED_VOCABULARY = 1 << 24
_RUN_TOKENS = 1 << 20


class Lengths:
    """How many documents there are of each length in tokens, exactly.

    N tokens have at most sqrt(2 N) different lengths: 1.4 million of them in 10^12 tokens.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, lengths: np.ndarray) -> None:
        values, counts = np.unique(lengths, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._counts[value] = self._counts.get(value, 0) + count

    @property
    def count(self) -> int:
        return sum(self._counts.values())

    @property
    def longest(self) -> int:
        return max(self._counts, default=0)

    def quantile(self, share: float) -> int:
        """The shortest length that at least `share` of the documents do not exceed."""
        wanted, passed = share * self.count, 0
        for value in sorted(self._counts):
            passed += self._counts[value]
            if passed >= wanted:
                return value
        return 0

    def bins(self) -> list[tuple[int, int, int]]:
        """(first length, last length, documents) for 1, 2-3, 4-7, ... up to the longest."""
        counts = [0] * self.longest.bit_length()
        for value, count in self._counts.items():
            counts[value.bit_length() - 1] += count
        return [(1 << bit, (2 << bit) - 1, count) for bit, count in enumerate(counts)]


@dataclass
class SplitStats:
    """What reading a split has shown.

    Attributes:
        tokens_read: ids read; fewer than the split has if it was sampled.
        lengths: of the documents that end in what was read.
        counts_V: (vocab_size,) how often each id occurs, or None for a very large vocabulary.
    """

    tokens_read: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    counts_V: np.ndarray | None = None


def read_stats(
    dataset: TokenDataset, max_tokens: int | None, progress: Callable[[int], object]
) -> SplitStats:
    """Reads a split, or whole frames spread evenly over it, about `max_tokens` ids in all.

    A document counts where it ends, with its whole length, so a sample of frames is fair to long
    documents.

    Args:
        progress: called with the number of ids after each piece.

    Raises:
        DataError: a frame is damaged.
    """
    stats = SplitStats()
    if dataset.vocab_size <= _MAX_COUNTED_VOCABULARY:
        stats.counts_V = np.zeros(dataset.vocab_size, np.int64)
    last_end, last_stop = 0, 0
    for start, stop in runs(dataset, max_tokens):
        ids = dataset.read(start, stop)
        stats.tokens_read += len(ids)
        if stats.counts_V is not None:
            stats.counts_V += np.bincount(ids, minlength=dataset.vocab_size)
        ends = dataset.document_ends(start, stop)
        if len(ends):
            if last_stop != start:
                last_end = previous_end(dataset, start)
            stats.lengths.add(piece_lengths(dataset, ends, last_end))
            last_end, last_stop = int(ends[-1]), stop
        elif last_stop == start:
            last_stop = stop
        progress(len(ids))
    return stats


def piece_lengths(dataset: TokenDataset, ends: np.ndarray, last_end: int) -> np.ndarray:
    """Returns the lengths of the documents that end at `ends`, without the padding before them."""
    starts = np.concatenate([[last_end], ends[:-1]])
    if dataset.packed_seq_len is not None:
        row_starts = (ends - 1) // dataset.packed_seq_len * dataset.packed_seq_len
        starts = np.maximum(starts, row_starts)
    lengths: np.ndarray = ends - starts
    return lengths


def runs(dataset: TokenDataset, max_tokens: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of ids to read: all, or single frames spread evenly."""
    size, total = dataset.frame_tokens, dataset.num_tokens
    frames = -(-total // size)
    wanted = frames if max_tokens is None else max(1, -(-max_tokens // size))
    if wanted >= frames:
        step = max(1, _RUN_TOKENS // size) * size
        yield from ((start, min(start + step, total)) for start in range(0, total, step))
        return
    for number in range(wanted):
        start = (2 * number + 1) * frames // (2 * wanted) * size
        yield start, min(start + size, total)


def previous_end(dataset: TokenDataset, position: int) -> int:
    """The last document end at or before `position`, or 0."""
    while position > 0:
        start = max(0, position - dataset.frame_tokens)
        ends = dataset.document_ends(start, position)
        if len(ends):
            return int(ends[-1])
        position = start
    return 0


def next_end(dataset: TokenDataset, position: int) -> int:
    """The first document end after `position`."""
    while position < dataset.num_tokens:
        stop = min(position + dataset.frame_tokens, dataset.num_tokens)
        ends = dataset.document_ends(position, stop)
        if len(ends):
            return int(ends[0])
        position = stop
    return dataset.num_tokens
