"""Where the files of a dataset come from: a local folder here, anything else in `_remote.py`."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from scalellm.config.location import RemoteOptions, parse_location
from scalellm.errors import DataError

MANIFEST = "manifest.json"
RESTORE = "prepare the dataset again or restore the file"
MISSING = f"holds no dataset: {MANIFEST} is missing; give a"
# Of a tokenizer, the only file whose size no other file tells.
MAX_TOKENIZER_BYTES = 256 << 20
_HASH_READ_BYTES = 8 << 20

# Says what is wrong with bytes that were fetched, or None: those may be fetched again.
Check = Callable[[bytes], str | None]


class StoredFile(Protocol):
    """A file of a known size and hash, read by offset; safe to share between threads."""

    size_bytes: int

    def read(self, offset: int, size_bytes: int, frame: int, crc32: int) -> bytes:
        """Returns exactly these bytes of a frame; their crc32 is still to be checked."""
        ...

    def read_all(self) -> bytes:
        """Returns the whole file, its sha256 verified."""
        ...

    def verify(self) -> None:
        """Compares the sha256 of the whole file; raises DataError."""
        ...

    def error(self, frame: int | None, problem: str) -> DataError:
        """Returns the error to raise about this file."""
        ...


class Store(Protocol):
    """The files of one dataset.

    Attributes:
        location: the folder or URL.
        fetch_threads: threads that should read at once, since each waits; 0: reading never waits.
    """

    location: Path | str
    fetch_threads: int

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files or the network so far, by all threads of this process."""
        ...

    def describe(self, name: str) -> str:
        """Returns how to call a file in an error: a path or URL, without secrets."""
        ...

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""
        ...

    def read(self, name: str, limit_bytes: int, check: Check | None = None) -> bytes:
        """Returns a whole file of unknown size.

        Raises:
            DataError: it is not there, is larger than the limit, or cannot be read.
        """
        ...

    def open(self, name: str, size_bytes: int, sha256: str) -> StoredFile:
        """Returns a file that must be of this size."""
        ...

    def local_copy(self, name: str, sha256: str) -> Path:
        """Returns the path of a verified file that can be opened by others."""
        ...


class ByteCounter:
    """Counts exactly, without a lock that a fork could leave held: one count per thread."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, size_bytes: int) -> None:
        thread = threading.get_ident()
        self._counts[thread] = self._counts.get(thread, 0) + size_bytes

    @property
    def total(self) -> int:
        return sum(list(self._counts.values()))


class LocalStore:
    """A dataset directory; nothing in it may lead out of it, and nothing is written."""

    fetch_threads = 0

    def __init__(self, root: Path) -> None:
        self.location: Path | str = root
        self._root, self._counter = root, ByteCounter()

    @property
    def bytes_read(self) -> int:
        return self._counter.total

    def describe(self, name: str) -> str:
        return str(self._root / name)

    def size(self, name: str) -> int:
        """Returns 0 for what is not there."""
        path = self._root / name
        return path.stat().st_size if path.is_file() else 0

    def read(self, name: str, limit_bytes: int, check: Check | None = None) -> bytes:
        path = self._root / name
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise DataError(f"{path} is not a regular file; {RESTORE}")
            if info.st_size > limit_bytes:
                raise DataError(
                    f"{path} has {info.st_size} bytes, the limit is {limit_bytes} bytes; {RESTORE}"
                )
            with path.open("rb") as file:
                # Not as much as allowed: Python allocates what is asked for before it reads.
                size_bytes = os.fstat(file.fileno()).st_size
                data = file.read(min(size_bytes, limit_bytes))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path.parent} {MISSING} directory that `scalellm prepare` finished"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {RESTORE}") from None
        self._counter.add(len(data))
        return data

    def open(self, name: str, size_bytes: int, sha256: str) -> LocalFile:
        return LocalFile(self._root, name, size_bytes, sha256, self._counter)

    def local_copy(self, name: str, sha256: str) -> Path:
        self.open(name, self.size(name), sha256).verify()
        return self._root / name


class LocalFile:
    """A regular file of a known size inside the dataset directory, read by offset."""

    def __init__(
        self, root: Path, name: str, size_bytes: int, sha256: str, counter: ByteCounter
    ) -> None:
        self.path, self._sha256, self._counter = root / name, sha256, counter
        real_root = os.path.realpath(root)
        if not os.path.realpath(self.path).startswith(os.path.join(real_root, "")):
            raise DataError(f"{self.path} leads out of the dataset directory; {RESTORE}")
        try:
            # Before open: opening a named pipe would wait for ever.
            info = os.stat(self.path)
            if not stat.S_ISREG(info.st_mode):
                raise DataError(f"{self.path} is not a regular file; {RESTORE}")
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be opened: {error.strerror}; {RESTORE}") from None
        if info.st_size != size_bytes:
            raise DataError(
                f"{self.path} has {info.st_size} bytes, the manifest says {size_bytes} bytes; "
                f"{RESTORE}"
            )
        self.size_bytes = size_bytes

    def read(self, offset: int, size_bytes: int, frame: int | None, crc32: int = 0) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size_bytes, offset)
            while len(data) < size_bytes:
                more = os.pread(self._file.fileno(), size_bytes - len(data), offset + len(data))
                if not more:
                    raise self.error(frame, f"is cut off after {len(data)} of {size_bytes} bytes")
                data += more
        except OSError as error:
            raise self.error(frame, f"cannot be read ({error.strerror})") from None
        self._counter.add(size_bytes)
        return data

    def read_all(self) -> bytes:
        self.verify()
        return self.read(0, self.size_bytes, None)

    def verify(self) -> None:
        digest = hashlib.sha256()
        for at in range(0, self.size_bytes, _HASH_READ_BYTES):
            digest.update(self.read(at, min(_HASH_READ_BYTES, self.size_bytes - at), None))
        if digest.hexdigest() != self._sha256:
            raise self.error(None, "does not match its sha256: it was changed or damaged")

    def error(self, frame: int | None, problem: str) -> DataError:
        where = "" if frame is None else f" frame {frame}"
        return DataError(f"{self.path}:{where} {problem}; {RESTORE}")


def open_store(location: Path | str, remote: RemoteOptions | None = None) -> Store:
    """Returns the store of a folder or URL; nothing is read yet.

    Raises:
        DataError: a URL that cannot be read or holds secrets, or a package for it is missing.
    """
    try:
        location = parse_location(location)
    except ValueError as error:
        raise DataError(str(error)) from None
    if isinstance(location, Path):
        return LocalStore(location)
    from scalellm.data._remote import RemoteStore

    return RemoteStore(location, remote or RemoteOptions())
