"""Which documents belong together: union-find over one integer array."""

from __future__ import annotations

import numpy as np

DOCUMENT_BYTES = 8
_COMPRESS_DOCUMENTS = 1 << 16


class Components:
    """Sets of documents 0 .. N-1, joined by pairs; each is named by its first document.

    A parent is never behind its child, so the result does not depend on the order of the pairs.
    Takes 8 bytes a document.
    """

    def __init__(self, num_documents: int) -> None:
        self._parent_N = np.arange(num_documents, dtype=np.int64)

    def roots(self, documents: np.ndarray) -> np.ndarray:
        """The first document of each one's set; paths are shortened on the way."""
        parent_N = self._parent_N
        while True:
            parents = parent_N[documents]
            grandparents = parent_N[parents]
            if np.array_equal(parents, grandparents):
                return parents
            parent_N[documents] = grandparents

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Joins the sets of `left[i]` and `right[i]` for every i."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            apart = left != right
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent_N, np.maximum(left, right), np.minimum(left, right))

    def all_roots(self) -> np.ndarray:
        """The first document of every document's set; the array itself, not a copy."""
        for start in range(0, len(self._parent_N), _COMPRESS_DOCUMENTS):
            # Parents are in front, so those of earlier slices are roots already: one step does.
            stop = min(start + _COMPRESS_DOCUMENTS, len(self._parent_N))
            self._parent_N[start:stop] = self.roots(np.arange(start, stop))
        return self._parent_N
