"""Texts on disk between two stages of `prepare`, in a work folder that outlives an interruption.

A text file of the work folder holds zstd frames of JSON, each a batch of [split, origin, text]; a
mark, written last, says which options made it. Without the mark nothing in the folder is believed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import zstandard

from scalellm.data.staging import HashedFile, disk_errors, write_synced
from scalellm.errors import DataError

_LEVEL = 3
_LENGTH = struct.Struct("<Q")
_MARK, _TEXTS, _LOCK = "mark.json", "texts.zst", "scalellm-work.lock"

Record = tuple[str, str, str]


def work_path(out: Path) -> Path:
    real = Path(os.path.realpath(out))
    return real.with_name(f"{real.name}.work")


def remove_work(out: Path) -> None:
    """Removes what a process left that was killed after the dataset was done."""
    if (work_path(out) / _LOCK).is_file():
        with suppress(DataError):
            WorkFolder(out, "").close(remove=True)


class WorkFolder:
    """`OUT.work` beside a dataset that is being made; removed when it is done.

    Args:
        out: the dataset.
        key: what the work depends on; work left for another key is removed.

    Raises:
        DataError: the folder is somebody else's, in use, or cannot be made.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.path, self._key = work_path(out), key
        with disk_errors(self.path):
            if self.path.exists() and not (self.path / _LOCK).is_file():
                raise DataError(
                    f"{self.path} is where the work for {out} is kept, and it is taken; move it "
                    "away or give another --out"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"another process prepares {out} (it holds {self.path}); wait for it or give "
                "another --out"
            ) from None
        if self.mark() is None:
            self._empty()

    def mark(self) -> dict[str, Any] | None:
        """Returns what was noted when the texts were complete, or None if they are not."""
        try:
            mark = json.loads((self.path / _MARK).read_bytes())
            size_bytes = (self.path / _TEXTS).stat().st_size
        except (OSError, ValueError):
            return None
        if not isinstance(mark, dict) or mark.get("key") != self._key:
            return None
        return mark["notes"] if mark.get("texts_bytes") == size_bytes else None

    def complete(self, texts: TextsWriter, notes: dict[str, Any]) -> None:
        """Notes that the texts are all there."""
        texts.close()
        mark = {"key": self._key, "texts_bytes": texts.size_bytes, "notes": notes}
        write_synced(self.path / f"{_MARK}.new", json.dumps(mark).encode())
        with disk_errors(self.path):
            (self.path / f"{_MARK}.new").replace(self.path / _MARK)

    def texts_writer(self) -> TextsWriter:
        return TextsWriter(self.path / _TEXTS)

    def texts(self) -> Iterator[Record]:
        """Yields (split, origin, text) in the order in which they were written."""
        yield from _read_texts(self.path / _TEXTS)

    def close(self, *, remove: bool) -> None:
        """Lets go of the folder; safe to call twice."""
        if remove and not self._lock.closed:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()


class TextsWriter:
    """Appends batches of texts; `close` makes them durable."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    def add(self, records: list[Record]) -> None:
        if records:
            frame = self._compressor.compress(json.dumps(records).encode())
            self._file.write(_LENGTH.pack(len(frame)) + frame)

    def close(self) -> None:
        self._file.close(sync=True)


def _read_texts(path: Path) -> Iterator[Record]:
    decompressor = zstandard.ZstdDecompressor()
    try:
        with path.open("rb") as file:
            while header := file.read(_LENGTH.size):
                [size_bytes] = _LENGTH.unpack(header)
                yield from map(tuple, json.loads(decompressor.decompress(file.read(size_bytes))))
    except (OSError, ValueError, struct.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path} cannot be read again ({error}); remove {path.parent} and prepare anew"
        ) from None
