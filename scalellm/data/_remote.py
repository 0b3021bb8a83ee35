"""A dataset behind a URL: ranged requests with retries, a cache of frames, nothing ever written."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from scalellm.config.location import RemoteOptions
from scalellm.data._cache import DiskCache, MemoryCache
from scalellm.data._fetch_error import FetchError
from scalellm.data._transport import Transport, check_packages, make_transport
from scalellm.data.store import MANIFEST, MAX_TOKENIZER_BYTES, MISSING, RESTORE, ByteCounter, Check
from scalellm.errors import DataError

# A few frames under way hide the network's delay; more would read much before the first batch.
_FETCH_THREADS = 4
_MEMORY_CACHE_BYTES = 32 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 20.0
# A server that asks to wait longer than this is not waited for.
_LONGEST_RETRY_AFTER_S = 300.0
_HASH_READ_BYTES = 4 << 20

T = TypeVar("T")


class RemoteStore:
    """The files of one dataset behind a URL.

    May be opened before or after a fork: connections and locks are each process' own.

    Raises:
        DataError: a package that reads this kind of URL is missing.
    """

    fetch_threads = _FETCH_THREADS

    def __init__(self, url: str, options: RemoteOptions) -> None:
        check_packages(url)
        self.location: Path | str = url
        self._url, self._options = url, options
        self._processes: dict[int, _Process] = {}

    @property
    def bytes_read(self) -> int:
        return self._process().counter.total

    def describe(self, name: str) -> str:
        return f"{self._url}/{name}"

    def size(self, name: str) -> int:
        return self._retry(name, None, lambda requests: requests.size(name))

    def read(self, name: str, limit_bytes: int, check: Check | None = None) -> bytes:
        return self._retry(
            name, None, lambda requests: requests.fetch_whole(name, limit_bytes), check
        )

    def open(self, name: str, size_bytes: int, sha256: str) -> RemoteFile:
        return RemoteFile(self, name, size_bytes, sha256)

    def local_copy(self, name: str, sha256: str) -> Path:
        data = self.read(name, MAX_TOKENIZER_BYTES, lambda found: _sha256_problem(found, sha256))
        folder = Path(tempfile.mkdtemp(prefix="scalellm-"))
        weakref.finalize(self, _remove, folder, os.getpid())
        path = folder / PurePosixPath(name).name
        path.write_bytes(data)
        return path

    def read_part(
        self,
        name: str,
        part: range,
        *,
        frame: int | None = None,
        key: str | None = None,
        check: Check | None = None,
    ) -> bytes:
        """Returns exactly these bytes of a file, from the cache if they are there and right.

        Args:
            name: of the file.
            part: of its bytes.
            frame: named in errors.
            key: in the cache; None: past it.
            check: wrong bytes are fetched again.
        """
        cache = self._process().cache
        if key is not None:
            data = cache.get(key, len(part))
            if data is not None and (check is None or check(data) is None):
                return data
            cache.drop(key)
        data = self._retry(name, frame, lambda requests: _fetch(requests, name, part), check)
        if key is not None:
            cache.put(key, data)
        return data

    def _process(self) -> _Process:
        """What this process has open; made anew after a fork."""
        pid = os.getpid()
        # No lock, which a fork could leave held: of two made at once one is dropped unused.
        return self._processes.get(pid) or self._processes.setdefault(
            pid, _Process(self._url, self._options)
        )

    def _retry(
        self,
        name: str,
        frame: int | None,
        request: Callable[[Transport], T],
        check: Callable[[T], str | None] | None = None,
    ) -> T:
        """Tries until the bytes are right, waiting longer each time.

        Raises:
            DataError: it cannot succeed, or did not after `data.retries` tries.
        """
        began_s, tries = time.monotonic(), 0
        while True:
            tries += 1
            failure: FetchError
            try:
                found = request(self._process().transport)
            except FetchError as error:
                failure = error
            else:
                problem = check(found) if check else None
                if problem is None:
                    return found
                failure = _WrongBytesError(problem)
            if (
                failure.fix is not None
                or tries == self._options.retries
                or failure.retry_after_s > _LONGEST_RETRY_AFTER_S
            ):
                passed_s = time.monotonic() - began_s
                raise self._error(name, frame, failure, tries, passed_s) from None
            longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (tries - 1))
            # At random, so that ranks that failed together do not come back together.
            time.sleep(failure.retry_after_s + random.uniform(longest_s / 2, longest_s))

    def _error(
        self, name: str, frame: int | None, failure: FetchError, tries: int, passed_s: float
    ) -> DataError:
        if failure.is_missing and name == MANIFEST:
            return DataError(f"{self._url} {MISSING} URL whose folder `scalellm prepare` finished")
        where = self.describe(name) + ("" if frame is None else f": frame {frame}")
        spent = f"{tries} {'try' if tries == 1 else 'tries'} in {passed_s:.1f} s"
        if isinstance(failure, _WrongBytesError):
            sentence = f"{where} {failure.cause} ({spent}); {RESTORE}"
        elif failure.fix is not None:
            sentence = f"{where} cannot be read ({spent}): {failure.cause}; {failure.fix}"
        else:
            asked_s = failure.retry_after_s
            asks = f", and the server asks to wait {asked_s:.0f} s" if asked_s else ""
            sentence = (
                f"{where} cannot be read ({spent}), the last time because of: "
                f"{failure.cause}{asks}; "
                f"check the server and the network, or raise data.retries={self._options.retries} "
                f"tries or data.timeout_s={self._options.timeout_s:g} s"
            )
        error = DataError(sentence)
        # A manifest fails for all ranks alike, the rest perhaps for this one only.
        error.rank_only = name != MANIFEST
        return error


class _WrongBytesError(FetchError):
    """Bytes arrived, but not those that were written."""


class _Process:
    """The connections, the cache and the count of one process."""

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.counter = ByteCounter()
        self.cache: DiskCache | MemoryCache = (
            MemoryCache(_MEMORY_CACHE_BYTES)
            if options.cache_dir is None
            else DiskCache(options.cache_dir, options.cache_bytes)
        )
        self.transport = make_transport(url, options.timeout_s, self.counter.add)


class RemoteFile:
    """A file behind a URL; its size is believed until a read shows another."""

    def __init__(self, store: RemoteStore, name: str, size_bytes: int, sha256: str) -> None:
        self.size_bytes = size_bytes
        self._store, self._name, self._sha256 = store, name, sha256

    def read(self, offset: int, size_bytes: int, frame: int, crc32: int) -> bytes:
        def check(data: bytes) -> str | None:
            if zlib.crc32(data) == crc32:
                return None
            return "does not match its crc32: it was changed or damaged"

        part = range(offset, offset + size_bytes)
        key = f"{self._sha256}-{frame}"
        return self._store.read_part(self._name, part, frame=frame, key=key, check=check)

    def read_all(self) -> bytes:
        part, key = range(self.size_bytes), f"{self._sha256}-whole"
        return self._store.read_part(
            self._name, part, key=key, check=lambda data: _sha256_problem(data, self._sha256)
        )

    def verify(self) -> None:
        size_bytes = self._store.size(self._name)
        if size_bytes != self.size_bytes:
            raise self.error(
                None, f"has {size_bytes} bytes, the manifest says {self.size_bytes} bytes"
            )
        digest = hashlib.sha256()
        for at in range(0, size_bytes, _HASH_READ_BYTES):
            part = range(at, min(at + _HASH_READ_BYTES, size_bytes))
            digest.update(self._store.read_part(self._name, part))
        if digest.hexdigest() != self._sha256:
            raise self.error(None, "does not match its sha256: it was changed or damaged")

    def error(self, frame: int | None, problem: str) -> DataError:
        where = "" if frame is None else f" frame {frame}"
        return DataError(f"{self._store.describe(self._name)}:{where} {problem}; {RESTORE}")


def _fetch(requests: Transport, name: str, part: range) -> bytes:
    data = requests.fetch(name, part.start, len(part)) if len(part) else b""
    if len(data) != len(part):
        raise FetchError(f"{len(data)} of {len(part)} bytes came")
    return data


def _sha256_problem(data: bytes, sha256: str) -> str | None:
    if hashlib.sha256(data).hexdigest() == sha256:
        return None
    return "does not match its sha256: it was changed or damaged"


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork, which has a copy of this object
        shutil.rmtree(folder, ignore_errors=True)
