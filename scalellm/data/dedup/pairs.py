"""From buckets to joined documents: which pairs are compared, and what is too many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from scalellm.data.dedup.buckets import Buckets
from scalellm.data.dedup.components import Components
from scalellm.data.dedup.memory import Memory
from scalellm.data.dedup.rows import Rows

# Of a small bucket all pairs are compared. In a larger one, a document is compared with up to 16
# leaders: the first document, the first that is like no leader before it, and so on. That is linear
# in the bucket. A document is then missed if it is like others of the bucket only that are no
# leaders (there were 16 kinds before, or it is like a follower, not like the leader) and it meets
# them in no smaller bucket of the other bands either.
_ALL_PAIRS = 16
_LEADERS = 16
# Documents, roots and the outcome of a pair, beside its two rows.
_PAIR_BYTES = 96


class PairJoiner:
    """Compares the candidates of buckets and joins those that match.

    Args:
        rows: what is compared, one row a document.
        is_match: which of the rows of two arrays match.
        components: where matches are joined.
        exact: buckets are (but for 64-bit accidents) of equal documents: compare with the first.
        budget_bytes: the most memory that comparing takes.
        memory: counts it.

    Attributes:
        candidates: pairs that were candidates, counted once for each bucket they meet in.
    """

    def __init__(
        self,
        rows: Rows,
        is_match: Callable[[np.ndarray, np.ndarray], np.ndarray],
        components: Components,
        *,
        exact: bool,
        budget_bytes: int,
        memory: Memory,
    ) -> None:
        self._rows, self._is_match, self._components = rows, is_match, components
        self._exact, self._leaders = exact, 1 if exact else _LEADERS
        # Two rows, one of them read with the gaps between its neighbours, and the comparison.
        self._pair_bytes = 12 * rows.row_bytes + _PAIR_BYTES
        self._max_pairs = max(budget_bytes // self._pair_bytes, 1)
        self._memory = memory
        self.candidates = 0

    def take(self, buckets: Buckets) -> None:
        """Joins the documents of buckets that fit into the memory."""
        sizes = buckets.stops - buckets.starts
        if self._exact:
            self._take_equal(buckets, sizes)
            return
        for size in range(2, _ALL_PAIRS + 1):
            self._take_small(buckets.documents, buckets.starts[sizes == size], size)
        large = sizes > _ALL_PAIRS
        for start, stop in zip(buckets.starts[large], buckets.stops[large], strict=True):
            self.take_huge([buckets.documents[start:stop]])

    def take_huge(self, slices: Iterable[np.ndarray]) -> None:
        """Joins the documents of one bucket, given in order, with its leaders."""
        leaders: list[np.ndarray] = []
        for documents in slices:
            for start in range(0, len(documents), self._max_pairs):
                self._follow(leaders, documents[start : start + self._max_pairs])

    def _take_equal(self, buckets: Buckets, sizes: np.ndarray) -> None:
        """Compares every document with the first of its bucket."""
        last = np.cumsum(sizes - 1)
        for low in range(0, int(last[-1]) if len(last) else 0, self._max_pairs):
            pairs = np.arange(low, min(low + self._max_pairs, last[-1]))
            owners = np.searchsorted(last, pairs, "right")
            places = buckets.stops[owners] - (last[owners] - pairs)
            self._join_apart(buckets.documents[buckets.starts[owners]], buckets.documents[places])

    def _take_small(self, documents: np.ndarray, starts: np.ndarray, size: int) -> None:
        first, second = np.triu_indices(size, 1)
        step = max(self._max_pairs // len(first), 1)
        for at in range(0, len(starts), step):
            block = starts[at : at + step, None]
            left, right = documents[block + first].ravel(), documents[block + second].ravel()
            self._join_apart(left, right)

    def _join_apart(self, left: np.ndarray, right: np.ndarray) -> None:
        """Leaves out pairs that are joined already: they stay so whatever this pair says."""
        self.candidates += len(left)
        with self._memory.hold(len(left) * self._pair_bytes):
            apart = self._components.roots(left) != self._components.roots(right)
            self._join(left[apart], right[apart])

    def _follow(self, leaders: list[np.ndarray], documents: np.ndarray) -> None:
        """Compares with the leaders in turn; who matches none becomes one while there is room."""
        number = 0
        while len(documents) and number < self._leaders:
            if number == len(leaders):
                leaders.append(documents[:1])
                documents = documents[1:]
            self.candidates += len(documents)
            with self._memory.hold(len(documents) * self._pair_bytes):
                left = np.repeat(leaders[number], len(documents))
                documents = documents[~self._join(left, documents)]
            number += 1

    def _join(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        matches = self._is_match(self._rows.gather(left), self._rows.gather(right))
        self._components.join(left[matches], right[matches])
        return matches
