"""One shard file of MDS: sizes and hashes checked, unpacked where it is compressed."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from scalellm.data.tools._foreign import size_of
from scalellm.errors import DataError

_BLOCK_BYTES = 1 << 20
_AGAIN = "copy it again"


@dataclass(frozen=True)
class ShardFile:
    """A file as the index describes it; `hashes` by algorithm, in hex."""

    path: Path
    size_bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class Packed:
    """A shard, and the compressed file it may be in instead."""

    raw: ShardFile
    zipped: ShardFile | None
    compression: str

    @property
    def file(self) -> ShardFile:
        """The file that is there; the raw one if both are."""
        return self.raw if self.zipped is None or self.raw.path.exists() else self.zipped


@contextmanager
def raw_shard(packed: Packed) -> Iterator[np.ndarray]:
    """Gives the bytes (n,) of the shard, memory-mapped; a compressed one is in a temporary file.

    Raises:
        DataError: wrong size or hash, a compression that is not known, or damaged.
    """
    file = packed.file
    if (size_bytes := size_of(file.path)) != file.size_bytes:
        raise DataError(
            f"{file.path} has {size_bytes} bytes, its index says {file.size_bytes}; {_AGAIN}"
        )
    with file.path.open("rb") as source:
        check_hashes(file, source)
        if file is packed.raw:
            yield _mapped(source, file.size_bytes)
            return
        with tempfile.TemporaryFile() as target:
            _unpack(packed, source, target)
            check_hashes(packed.raw, target)
            yield _mapped(target, packed.raw.size_bytes)


def check_hashes(file: ShardFile, stream: BinaryIO) -> None:
    """Compares all hashes that this Python can make; xxhash is optional."""
    for kind, wanted in file.hashes.items():
        digest = _hasher(kind)
        if digest is None:
            continue
        stream.seek(0)
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
        if digest.hexdigest() != wanted:
            raise DataError(
                f"{file.path} does not match its {kind}: it was changed or damaged; {_AGAIN}"
            )
    stream.seek(0)


def _hasher(kind: str) -> Any:
    if kind in hashlib.algorithms_guaranteed and not kind.startswith("shake_"):
        return hashlib.new(kind)
    if kind.startswith("xxh"):
        try:
            module = importlib.import_module("xxhash")
        except ImportError:
            return None
        return getattr(module, kind, lambda: None)()
    return None


def _mapped(file: BinaryIO, size_bytes: int) -> np.ndarray:
    if size_bytes == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, mode="r", shape=(size_bytes,)))


def _unpack(packed: Packed, source: BinaryIO, target: BinaryIO) -> None:
    wanted_bytes = packed.raw.size_bytes
    try:
        with _reader(packed, source) as reader:
            # One byte too many tells that there is more, and a bomb never grows beyond it.
            left = wanted_bytes + 1
            while left and (block := reader.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
                target.write(block)
    except (zstandard.ZstdError, EOFError, OSError) as error:
        raise DataError(f"{packed.file.path} cannot be unpacked ({error}); {_AGAIN}") from None
    target.flush()
    if target.tell() != wanted_bytes:
        raise DataError(
            f"{packed.file.path} does not hold the {wanted_bytes} bytes its index says; {_AGAIN}"
        )


def _reader(packed: Packed, source: BinaryIO) -> Any:
    if packed.compression == "zstd":
        return zstandard.ZstdDecompressor().stream_reader(source, closefd=False)
    if packed.compression == "gz":
        return gzip.GzipFile(fileobj=source)
    raise DataError(
        f"{packed.file.path} is compressed with {packed.compression!r}; zstd and gz can be read: "
        "write it again with one of them, or without"
    )
