"""Documents that share a key, found out of core: keys are spread over files, each file is sorted.

A record is 16 bytes on disk: key (uint64) and document (int64). Files are written in the order of
documents and sorted stably, so every bucket lists its documents in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalellm.data.dedup.memory import Memory
from scalellm.data.staging import disk_errors

RECORD_BYTES = 16
# In memory a record takes this while its file is sorted: itself, its sorted key and document, its
# place in the order, the sort's own half of that, the limits of its bucket.
SORTED_RECORD_BYTES = 80
_RECORD = np.dtype([("key", "<u8"), ("document", "<i8")])
# A file of so many is sorted faster than one of more, however much memory there is.
_GOOD_RECORDS = 1 << 19
_MAX_FILES = 4096
_PIVOT_SAMPLES = 1001


@dataclass(frozen=True)
class Buckets:
    """Buckets of two documents and more: the i-th is `documents[starts[i] : stops[i]]`."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


# A bucket too big for the memory comes as slices of its documents, in order.
HugeBucket = Iterator[np.ndarray]


class BucketFiles:
    """Takes (key, document) records in the order of documents, gives buckets.

    Args:
        folder: where the files are written; they are removed as they are read.
        num_records: how many records will come, to choose the number of files.
        budget_bytes: the most memory that reading takes.
        memory: counts it.
    """

    def __init__(self, folder: Path, num_records: int, budget_bytes: int, memory: Memory) -> None:
        self._limit_records = max(budget_bytes // SORTED_RECORD_BYTES, 1)
        # Files differ in size, so twice as many as would do.
        wanted = 2 * num_records // min(self._limit_records, _GOOD_RECORDS)
        self._bits = min(wanted, _MAX_FILES - 1).bit_length()
        self._folder, self._memory = folder, memory
        self._paths = [folder / f"bucket-{number}.bin" for number in range(1 << self._bits)]
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, keys: np.ndarray, documents: np.ndarray) -> None:
        records = np.empty(len(keys), _RECORD)
        records["key"], records["document"] = keys, documents
        if not self._bits:
            _append(self._paths[0], records)
            return
        files = (keys >> np.uint64(64 - self._bits)).astype(np.uint16)
        records = records[np.argsort(files, kind="stable")]
        stops = np.cumsum(np.bincount(files, minlength=len(self._paths))).tolist()
        for path, start, stop in zip(self._paths, [0, *stops], stops, strict=False):
            if start < stop:
                _append(path, records[start:stop])

    def read(
        self, take: Callable[[Buckets], None], take_huge: Callable[[HugeBucket], None]
    ) -> None:
        """Hands over all buckets of two documents or more, file by file."""
        for path in self._paths:
            if path.exists():
                self._read_file(path, take, take_huge, is_one_key=False)

    def _read_file(
        self,
        path: Path,
        take: Callable[[Buckets], None],
        take_huge: Callable[[HugeBucket], None],
        *,
        is_one_key: bool,
    ) -> None:
        num_records = path.stat().st_size // RECORD_BYTES
        if num_records <= self._limit_records:
            with self._memory.hold(num_records * SORTED_RECORD_BYTES):
                take(_sorted(np.fromfile(path, _RECORD)))
        elif is_one_key:
            with self._memory.hold(self._limit_records * SORTED_RECORD_BYTES):
                take_huge(self._slices(path))
        else:
            for part, is_one in self._split(path, num_records):
                self._read_file(part, take, take_huge, is_one_key=is_one)
            return
        path.unlink()

    def _slices(self, path: Path) -> HugeBucket:
        for records in self._chunks(path):
            yield records["document"].copy()

    def _split(self, path: Path, num_records: int) -> list[tuple[Path, bool]]:
        """Cuts a file at one of its keys, the median of some: below, that key alone, above."""
        keys = np.memmap(path, _RECORD, "r")["key"]
        samples = keys[np.linspace(0, num_records - 1, _PIVOT_SAMPLES).astype(np.int64)]
        pivot = np.sort(samples)[_PIVOT_SAMPLES // 2]
        del keys
        low, same, high = (path.with_name(f"{path.name}.{part}") for part in ("low", "same", "hi"))
        for part in (low, same, high):
            part.unlink(missing_ok=True)
        with self._memory.hold(self._limit_records * SORTED_RECORD_BYTES):
            for records in self._chunks(path):
                _append(low, records[records["key"] < pivot])
                _append(same, records[records["key"] == pivot])
                _append(high, records[records["key"] > pivot])
        path.unlink()
        return [(low, False), (same, True), (high, False)]

    def _chunks(self, path: Path) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            while len(records := np.fromfile(file, _RECORD, self._limit_records)):
                yield records


def _append(path: Path, records: np.ndarray) -> None:
    with disk_errors(path, records.nbytes), path.open("ab", buffering=0) as file:
        view = records.view(np.uint8).data
        while view:
            view = view[file.write(view) :]


def _sorted(records: np.ndarray) -> Buckets:
    order = np.argsort(records["key"], kind="stable")
    keys, documents = records["key"][order], records["document"][order]
    bounds = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    starts = np.concatenate([np.zeros(min(len(keys), 1), np.int64), bounds])
    stops = np.append(bounds, len(keys))[: len(starts)]
    several = stops - starts > 1
    return Buckets(documents, starts[several], stops[several])
