"""Lines of a file as bytes, plain, gzip or zstd, in bounded memory; damage is found and named."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from scalellm.errors import DataError

MAX_LINE_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20
# Small, because a few bytes of zstd may stand for a block of 128 KiB.
_ZSTD_BLOCK_BYTES = 1 << 12


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line without its end); `.gz` and `.zst` are decompressed.

    Raises:
        DataError: damaged compression, or a line above `MAX_LINE_BYTES`.
        OSError: the file cannot be read.
    """
    number, pending = 0, bytearray()
    for block in _blocks(path):
        *whole, last = block.split(b"\n")
        for part in whole:
            number += 1
            yield number, bytes(pending + part) if pending else part
            pending.clear()
        pending += last
        if len(pending) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number + 1} is longer than {MAX_LINE_BYTES} bytes; is it JSON lines, one "
                "object a line?"
            )
    if pending:
        yield number + 1, bytes(pending)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks, decompressed."""
    if path.suffix.lower() == ".zst":
        yield from _zstd_blocks(path)
        return
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}; copy or download it again") from None


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import zstandard

    # `decompressobj` and not `stream_reader`: the latter takes a truncated file for a whole one.
    decoder = None
    with path.open("rb") as file:
        while block := file.read(_ZSTD_BLOCK_BYTES):
            while block:
                if decoder is None:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield decoder.decompress(block)
                except zstandard.ZstdError as error:
                    raise DataError(
                        f"{path} is damaged: {error}; copy or download it again"
                    ) from None
                block = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise DataError(f"{path} is damaged: it ends too early; copy or download it again")
