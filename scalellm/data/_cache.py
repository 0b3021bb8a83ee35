"""Keeps compressed frames that came over the network, on disk for all ranks of a host or in memory.

Nothing in a cache is trusted: who reads a frame checks its crc32, and a damaged one is dropped.
A folder looks so:

    scalellm-frames/<sha256 of the shard's file>-<frame>    compressed bytes as they came
    scalellm-frames/.writing/<bytes>-<process>-<number>     locked by its writer while it lives
    scalellm-frames/.lock, .total                           who reserves room; bytes reserved so far
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scalellm.errors import DataError

_FOLDER = "scalellm-frames"
_KEY = re.compile(r"[0-9a-f]{64}-(\d{1,10}|whole)")
# Room for `.total`, so that the whole folder stays below the cap.
_OWN_BYTES = 64
# Evicting somewhat more than needed makes looking through the folder rare.
_KEPT_FRACTION = 0.9
_LOCK_WAIT_S, _LOCK_POLL_S = 2.0, 0.001
_numbers = itertools.count()


class MemoryCache:
    """The frames used last, up to a number of bytes; safe to share between threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._total_bytes = limit_bytes, 0
        self._frames: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, size_bytes: int) -> bytes | None:
        """Returns what was put, or None if it is not there or of another size."""
        with self._lock:
            data = self._frames.get(key)
            if data is None or len(data) != size_bytes:
                return None
            self._frames.move_to_end(key)
            return data

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._total_bytes += len(data) - len(self._frames.pop(key, b""))
            self._frames[key] = data
            while self._total_bytes > self._limit_bytes:
                _, dropped = self._frames.popitem(last=False)
                self._total_bytes -= len(dropped)

    def drop(self, key: str) -> None:
        with self._lock:
            self._total_bytes -= len(self._frames.pop(key, b""))


class DiskCache:
    """A folder that any number of processes of a host share.

    Its bytes are reserved under a lock before they are written, so it never holds more than the
    cap. What a killed writer left is removed by the next process that opens the cache.

    Args:
        folder: where `scalellm-frames` is made; nothing else in it is touched.
        limit_bytes: the cap.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder / _FOLDER, limit_bytes - _OWN_BYTES
        self._writing = self._folder / ".writing"
        self._is_off = False
        try:
            self._writing.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked() as is_locked:
                if is_locked:
                    self._remove_leftovers()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"data.cache_dir={folder} cannot be written: {error.strerror}; choose another "
                    "folder, or null for none"
                ) from None
            self._switch_off(error)

    def get(self, key: str, size_bytes: int) -> bytes | None:
        """Returns what was put, or None if it is not there or of another size."""
        path = self._folder / key
        try:
            with path.open("rb") as file:
                data = file.read(size_bytes + 1)
            os.utime(path)  # the time of the last use, for eviction
        except OSError:
            return None
        return data if len(data) == size_bytes else None

    def put(self, key: str, data: bytes) -> None:
        """Keeps the bytes if it can; a full disk switches the cache off with one warning."""
        if self._is_off or len(data) > self._limit_bytes:
            return
        temporary = self._writing / f"{len(data)}-{os.getpid()}-{next(_numbers)}"
        file = None
        try:
            with self._locked() as is_locked:
                if not is_locked or (self._folder / key).exists():
                    return
                self._reserve(len(data))
                file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                fcntl.flock(file, fcntl.LOCK_EX)
            _write_all(file, data)
            temporary.rename(self._folder / key)
        except OSError as error:
            self._switch_off(error)
            with suppress(OSError):
                temporary.unlink()
        finally:
            if file is not None:
                os.close(file)

    def drop(self, key: str) -> None:
        """Forgets damaged bytes."""
        with suppress(OSError):
            (self._folder / key).unlink()

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Gives whether the lock is held; a stopped process must not hold up all others."""
        file = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        try:
            while not (is_locked := _try_lock(file)) and time.monotonic() < deadline_s:
                time.sleep(_LOCK_POLL_S)
            yield is_locked
        finally:
            os.close(file)

    def _reserve(self, size_bytes: int) -> None:
        total = self._read_total()
        if total is None or total + size_bytes > self._limit_bytes:
            total = self._evict(size_bytes)
        # Before the bytes are there: a kill in between makes the total too large, never too small.
        self._write_total(total + size_bytes)

    def _evict(self, size_bytes: int) -> int:
        """Removes the frames used longest ago until there is room; returns the bytes left."""
        self._remove_leftovers()
        total = sum(_reserved_bytes(path) for path in self._writing.iterdir())
        frames = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _KEY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        frames.append((info.st_mtime_ns, info.st_size, entry.path))
                        total += info.st_size
        frames.sort()
        wanted = min(self._limit_bytes - size_bytes, int(self._limit_bytes * _KEPT_FRACTION))
        for _, frame_bytes, path in frames:
            if total <= wanted:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= frame_bytes
        return total

    def _remove_leftovers(self) -> None:
        """Removes files whose writer is dead: its lock went with it."""
        for path in self._writing.iterdir():
            with suppress(OSError):
                file = os.open(path, os.O_RDONLY)
                try:
                    if _try_lock(file):
                        path.unlink()
                finally:
                    os.close(file)

    def _read_total(self) -> int | None:
        try:
            return int((self._folder / ".total").read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def _write_total(self, total: int) -> None:
        (self._folder / ".total").write_text(f"{total:020d}", encoding="ascii")

    def _switch_off(self, error: OSError) -> None:
        if not self._is_off:
            self._is_off = True
            print(
                f"warning: {self._folder} takes no more frames ({error.strerror}); training goes "
                "on, and reads the rest from the network again",
                file=sys.stderr,
            )


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _reserved_bytes(path: Path) -> int:
    text = path.name.partition("-")[0]
    return int(text) if text.isdigit() else 0
