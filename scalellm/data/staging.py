"""A directory that appears whole or not at all: written beside its target, fsynced, renamed."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scalellm.durable import fsync_path
from scalellm.errors import DataError

_LOCK = ".writer.lock"
_YOUNG_S = 60.0
# Staging directories of this process: a POSIX lock never excludes its own process, so remember.
_OWN: set[Path] = set()


class DiskError(DataError):
    """The disk is full, or will not be written to: nothing that the sources or options say."""


class StagedDirectory:
    """A temporary directory `target.tmp-...` that `commit()` renames to `target`.

    Those that killed processes left beside the same target are removed first. Whether one is alive
    is told by a POSIX lock: the kernel drops it with the process, forked workers do not inherit it.

    Args:
        target: the directory to make; its parents are made.

    Raises:
        DataError: the directory cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._lock_fd = -1
        with disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target)
            self.path = target.with_name(f"{target.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
            _OWN.add(self.path)
            try:
                self.path.mkdir()
                self._lock_fd = _lock(self.path / _LOCK)
            except BaseException:
                self.abort()
                raise

    def commit(self, check: Callable[[Path], None]) -> None:
        """Renames into place; a non-empty target is set aside first and removed after.

        Args:
            check: called with the target just before; raises to refuse it.
        """
        with disk_errors(self.target):
            for folder, _, _ in os.walk(self.path):
                fsync_path(Path(folder))
            check(self.target)
            aside = None
            if self.target.exists() and any(self.target.iterdir()):
                aside = self.target.with_name(f"{self.target.name}.tmp-old-{os.urandom(4).hex()}")
                os.rename(self.target, aside)
            # The lock goes last: without it another writer may take the directory for a dead one's.
            (self.path / _LOCK).unlink()
            os.rename(self.path, self.target)
            self._release()
            fsync_path(self.target.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    def abort(self) -> None:
        """Removes the temporary directory unless it was committed; safe to call twice."""
        if self.path in _OWN:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        _OWN.discard(self.path)
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


class HashedFile:
    """A new unbuffered file that knows its size and sha256; a full disk shows at the write."""

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes, self._hash = path, 0, hashlib.sha256()
        self._fd = -1
        with disk_errors(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with disk_errors(self.path, len(data)):
            while view:
                view = view[os.write(self._fd, view) :]
        self._hash.update(data)
        self.size_bytes += len(data)

    def close(self, *, sync: bool = False) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with disk_errors(self.path):
                try:
                    if sync:
                        os.fsync(fd)
                finally:
                    os.close(fd)


def write_synced(path: Path, data: bytes) -> str:
    """Writes and fsyncs a new file; returns its sha256."""
    file = HashedFile(path)
    try:
        file.write(data)
        file.close(sync=True)
    finally:
        file.close()
    return file.sha256


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns an `OSError` while writing below `path` into a `DataError` with the free bytes."""
    try:
        yield
    except OSError as error:
        what = f"{needed_bytes} bytes to {path}" if needed_bytes else str(error.filename or path)
        raise DiskError(
            f"cannot write {what}: {error.strerror} ({_free_bytes(path)} bytes free); make room or "
            "give a directory on another disk"
        ) from None


def _free_bytes(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return str(shutil.disk_usage(path).free)
    except OSError:
        return "unknown"


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove_stale(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(target.name)}.tmp-*"):
        if path in _OWN or path.is_symlink() or not path.is_dir():
            continue
        if path.name.startswith(f"{target.name}.tmp-old-"):
            # Set aside by an overwrite that was killed; while the target is missing, the only copy.
            stale = target.exists()
        else:
            stale = _is_dead(path)
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def _is_dead(path: Path) -> bool:
    try:
        if not (path / _LOCK).exists():
            # For an instant after mkdir and before the rename a live writer has no lock file.
            return time.time() - path.stat().st_mtime > _YOUNG_S
        os.close(_lock(path / _LOCK))
    except OSError:
        return False
    return True
