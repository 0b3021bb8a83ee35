"""The search for duplicates among the fingerprints of a run, and of the runs before it.

On disk it takes, per document, 16 bytes for the digest, 4 bytes a hash for the signature, and while
searching 16 bytes a band: 865 bytes at the defaults. In memory 32 bytes a document and, within
`memory_bytes`, whatever speeds it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalellm.data.dedup.buckets import BucketFiles
from scalellm.data.dedup.components import Components
from scalellm.data.dedup.fingerprint import DIGEST_BYTES, Fingerprints
from scalellm.data.dedup.index import DIGESTS, SHORT, SIGNATURES, FingerprintIndex
from scalellm.data.dedup.memory import Memory
from scalellm.data.dedup.options import DedupOptions
from scalellm.data.dedup.pairs import PairJoiner
from scalellm.data.dedup.rows import Rows
from scalellm.data.dedup.shingles import mix64
from scalellm.data.staging import disk_errors
from scalellm.errors import ConfigError

# Parent in the union-find, flags, and the answer while it is put together.
_DOCUMENT_BYTES = 32
# While it is written to its bucket's file: key, document, record, file, order and the space to make
# it, sorted record.
_WRITTEN_RECORD_BYTES = 80
# Least memory beside the documents' own in which the search makes sense.
_LEAST_WORK_BYTES = 1 << 22
# More in one go makes neither reading nor comparing faster.
_ENOUGH_BYTES = 1 << 26
_BAND_BASE = np.uint64(0x9FB21C651E98DF25)


@dataclass(frozen=True)
class Duplicates:
    """What the search found about the N documents of this run.

    Attributes:
        removed_N: bool.
        duplicate_of_N: int64, the document that stays in its place: its own number for those that
            stay; below 0 for one of an earlier run: -1 is the very first document of the index's
            oldest run, -2 the second, and so on through the runs.
        exact: documents removed as exact duplicates.
        near: documents removed beyond those.
        candidates: pairs that met in a bucket of the near search, once for each bucket.
        peak_bytes: the most memory that the arrays of the search took.
    """

    removed_N: np.ndarray
    duplicate_of_N: np.ndarray
    exact: int
    near: int
    candidates: int
    peak_bytes: int


class Deduplicator:
    """Collects fingerprints in document order, then finds the duplicates among them.

    Of each set of documents connected by pairs of duplicates, the first stays; documents of earlier
    runs come before all of this one. The answer does not depend on the batches nor on the memory.

    Args:
        folder: for this run's files; made if missing. What an earlier process left there is
            removed: nothing of it is believed.
        options: the same that made the fingerprints.
        run_key: names this run in `options.index`; needed with an index only.

    Raises:
        DataError: the folder cannot be written, or the index is damaged or of other options.
    """

    def __init__(self, folder: Path, options: DedupOptions, *, run_key: str = "") -> None:
        if options.index is not None and not run_key:
            raise ValueError("an index needs a run_key")
        self._folder, self._options = folder, options
        self._num_documents = 0
        self._index = None
        if options.index is not None:
            self._index = FingerprintIndex(options.index, run_key, options)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (DIGESTS, SIGNATURES, SHORT):
                (folder / name).write_bytes(b"")
            for path in folder.glob("bucket-*.bin*"):
                path.unlink()

    def add(self, fingerprints: Fingerprints) -> None:
        """Appends the next documents."""
        width = self._options.num_hashes if self._options.near else 0
        if fingerprints.signatures_NK.shape[1] != width:
            raise ValueError("fingerprints of other options")
        for name, rows in (
            (DIGESTS, fingerprints.exact_N16),
            (SIGNATURES, fingerprints.signatures_NK.astype("<u4", copy=False)),
            (SHORT, fingerprints.is_short_N),
        ):
            with disk_errors(self._folder, rows.nbytes), (self._folder / name).open("ab") as file:
                file.write(rows.tobytes())
        self._num_documents += len(fingerprints)

    def find(self) -> Duplicates:
        """Searches; may be called again, after more documents too.

        Raises:
            ConfigError: `memory_bytes` is too little for so many documents.
            DataError: no room on the disk, or a file is not what was written there.
        """
        return _Search(self._folder, self._options, self._parts()).run(self._num_documents)

    def keep(self) -> None:
        """Adds this run's fingerprints to the index, whole or not at all; without one, nothing."""
        if self._index is not None:
            self._index.commit(self._folder, self._num_documents)

    def _parts(self) -> list[tuple[Path, int]]:
        runs = self._index.runs if self._index is not None else []
        earlier = [(run.folder, run.num_documents) for run in runs]
        return [*earlier, (self._folder, self._num_documents)]


class _Search:
    """One search over the documents of several folders, in order."""

    def __init__(self, folder: Path, options: DedupOptions, parts: list[tuple[Path, int]]) -> None:
        self._folder, self._options, self._parts = folder, options, parts
        self._total = sum(count for _, count in parts)
        least_bytes = _DOCUMENT_BYTES * self._total + _LEAST_WORK_BYTES
        if options.memory_bytes < least_bytes:
            raise ConfigError(
                f"memory_bytes={options.memory_bytes} bytes is too little to compare {self._total} "
                f"documents, which takes {least_bytes} bytes; give at least that"
            )
        self._work_bytes = options.memory_bytes - _DOCUMENT_BYTES * self._total
        self._memory = Memory()
        self._components = Components(self._total)

    def run(self, num_own: int) -> Duplicates:
        with self._memory.hold(_DOCUMENT_BYTES * self._total):
            exact = candidates = 0
            if self._options.exact:
                self._join_exact()
                exact = self._num_removed(num_own)
            if self._options.near:
                candidates = self._join_near()
            return self._answer(num_own, exact, candidates)

    def _answer(self, num_own: int, exact: int, candidates: int) -> Duplicates:
        earlier = self._total - num_own
        duplicate_of_N = self._components.all_roots()[earlier:] - earlier
        removed_N = duplicate_of_N != np.arange(num_own)
        # Document d of an earlier run is d - earlier here, and -1 - d by contract.
        is_earlier_N = duplicate_of_N < 0
        np.subtract(-1 - earlier, duplicate_of_N, out=duplicate_of_N, where=is_earlier_N)
        near = int(np.count_nonzero(removed_N)) - exact
        peak_bytes = self._memory.peak_bytes
        return Duplicates(removed_N, duplicate_of_N, exact, near, candidates, peak_bytes)

    def _num_removed(self, num_own: int) -> int:
        earlier = self._total - num_own
        roots_N = self._components.all_roots()[earlier:]
        return int(np.count_nonzero(roots_N != np.arange(earlier, self._total)))

    def _rows(self, name: str, dtype: str, width: int) -> Rows:
        return Rows([(folder / name, count) for folder, count in self._parts], dtype, width)

    def _join_exact(self) -> None:
        rows = self._rows(DIGESTS, "u1", DIGEST_BYTES)

        def keys(rows_N16: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
            documents = np.arange(start, start + len(rows_N16))
            return rows_N16[:, :8].copy().view("<u8")[:, 0], documents

        def is_match(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return (left == right).all(1)

        self._join(rows, self._total, 1, keys, is_match, exact=True)

    def _join_near(self) -> int:
        options = self._options
        rows = self._rows(SIGNATURES, "<u4", options.num_hashes)
        takes_part_N = self._takes_part()
        # The threshold in whole hashes; a tiny bit less, since 0.7 * 10 is above 7.
        least = math.ceil(options.threshold * options.num_hashes - 1e-6)

        def keys(rows_NK: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
            documents = np.flatnonzero(takes_part_N[start : start + len(rows_NK)])
            keys_NB = _band_keys(rows_NK[documents], options)
            return keys_NB.ravel(), np.repeat(documents + start, options.num_bands)

        def is_match(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.count_nonzero(left == right, axis=1) >= least

        num_documents = int(np.count_nonzero(takes_part_N))
        return self._join(rows, num_documents, options.num_bands, keys, is_match, exact=False)

    def _takes_part(self) -> np.ndarray:
        """Long enough for shingles, and the first of its exact duplicates."""
        takes_part_N = np.empty(self._total, bool)
        for start, rows in self._rows(SHORT, "?", 1).chunks(1 << 16):
            documents = np.arange(start, start + len(rows))
            takes_part_N[documents] = ~rows[:, 0] & (self._components.roots(documents) == documents)
        return takes_part_N

    def _join(
        self,
        rows: Rows,
        num_documents: int,
        num_bands: int,
        keys: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
        is_match: Callable[[np.ndarray, np.ndarray], np.ndarray],
        *,
        exact: bool,
    ) -> int:
        """Joins the matching documents of all buckets; returns the number of candidates."""
        half, quarter = self._work_bytes // 2, self._work_bytes // 4
        files = BucketFiles(self._folder, num_documents * num_bands, half, self._memory)
        held_bytes = 2 * rows.row_bytes + num_bands * _WRITTEN_RECORD_BYTES
        for start, chunk in rows.chunks(min(quarter, _ENOUGH_BYTES) // held_bytes):
            with self._memory.hold(len(chunk) * held_bytes):
                files.add(*keys(chunk, start))
        joiner = PairJoiner(
            rows,
            is_match,
            self._components,
            exact=exact,
            budget_bytes=min(quarter, _ENOUGH_BYTES),
            memory=self._memory,
        )
        kept_bytes = rows.size_bytes if rows.size_bytes <= quarter else 0
        with self._memory.hold(kept_bytes):
            if kept_bytes:
                rows.hold()
            files.read(joiner.take, joiner.take_huge)
        return joiner.candidates


def _band_keys(signatures_NK: np.ndarray, options: DedupOptions) -> np.ndarray:
    """One 64-bit key for each band of each document; bands do not share keys."""
    size, count = options.band_hashes, options.num_bands
    bands_NBR = signatures_NK[:, : size * count].reshape(len(signatures_NK), count, size)
    keys_NB = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint64), bands_NBR.shape[:2]).copy()
    for at in range(size):
        keys_NB *= _BAND_BASE
        keys_NB += bands_NBR[:, :, at]
    return mix64(keys_NB)
