"""Rows of a fixed size in files, read by ranges or by number, in bounded memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scalellm.errors import DataError

# Rows nearer than this are read in one go: a read costs as much as so many rows of 512 bytes.
_GAP_ROWS = 8
_COPY_ROWS = 1 << 12


class Rows:
    """Several files of rows, seen as one array.

    Args:
        parts: (file, number of rows) in order.
        dtype: of a row's items.
        width: items of a row.

    Raises:
        DataError: a file is not as long as its rows.
    """

    def __init__(self, parts: Sequence[tuple[Path, int]], dtype: str, width: int) -> None:
        self._parts = [(path, count) for path, count in parts if count]
        self._dtype, self._width = np.dtype(dtype), width
        self.row_bytes = self._dtype.itemsize * width
        self._starts = np.cumsum([0] + [count for _, count in self._parts])
        self._held: np.ndarray | None = None
        for path, count in self._parts:
            found = path.stat().st_size if path.exists() else 0
            if found != count * self.row_bytes:
                raise DataError(
                    f"{path} has {found} bytes, not the {count * self.row_bytes} that were written "
                    "there; run again in an empty folder"
                )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def size_bytes(self) -> int:
        return len(self) * self.row_bytes

    def hold(self) -> None:
        """Keeps all rows in memory from now on."""
        held = np.empty((len(self), self._width), self._dtype)
        for start, rows in self.chunks(_COPY_ROWS):
            held[start : start + len(rows)] = rows
        self._held = held

    def chunks(self, max_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first row, rows) in order, at most `max_rows` rows at a time."""
        for (path, count), start in zip(self._parts, self._starts[:-1].tolist(), strict=True):
            with path.open("rb", buffering=0) as file:
                for first in range(0, count, max_rows):
                    wanted = min(max_rows, count - first)
                    yield start + first, self._read(file.fileno(), path, first, wanted)

    def gather(self, numbers_N: np.ndarray) -> np.ndarray:
        """The rows of these numbers; memory is twice theirs, or eight times at the worst."""
        if self._held is not None:
            return self._held[numbers_N]
        wanted, places_N = np.unique(numbers_N, return_inverse=True)
        rows = np.empty((len(wanted), self._width), self._dtype)
        cuts = np.searchsorted(wanted, self._starts)
        for (path, _), start, low, high in zip(
            self._parts, self._starts[:-1].tolist(), cuts[:-1], cuts[1:], strict=True
        ):
            if low < high:
                with path.open("rb", buffering=0) as file:
                    self._gather(file.fileno(), path, wanted[low:high] - start, rows[low:high])
        return rows[places_N]

    def _gather(self, fd: int, path: Path, wanted: np.ndarray, rows: np.ndarray) -> None:
        """Reads sorted rows of one file, neighbours together."""
        breaks = np.flatnonzero(np.diff(wanted) > _GAP_ROWS) + 1
        bounds = [0, *breaks.tolist(), len(wanted)]
        for low, high in itertools.pairwise(bounds):
            first = int(wanted[low])
            run = self._read(fd, path, first, int(wanted[high - 1]) - first + 1)
            rows[low:high] = run[wanted[low:high] - first]

    def _read(self, fd: int, path: Path, first: int, count: int) -> np.ndarray:
        rows = np.empty((count, self._width), self._dtype)
        view = rows.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], first * self.row_bytes + done)
            if not got:
                raise DataError(f"{path} became shorter while it was read; run again")
            done += got
        return rows
