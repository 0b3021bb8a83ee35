"""Reads frames of one shard and believes nothing: every number and byte is checked before use."""

from __future__ import annotations

import threading
import zlib

import numpy as np
import zstandard

from scalellm.data.format import (
    DOCUMENT_END_DTYPE,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_RECORD,
    NO_CARRY,
    VERSION,
    Manifest,
    Shard,
)
from scalellm.data.store import Store, StoredFile
from scalellm.errors import DataError

_thread = threading.local()


class ShardReader:
    """One open shard: its verified index in memory, its files opened when first needed.

    Safe to share between threads; the files close with the last reference.

    Args:
        store: holds the dataset's files.
        manifest: gives dtype, vocabulary and frame length.
        shard: the shard's entry in the manifest.
        is_last: whether the split ends with this shard.

    Raises:
        DataError: the index does not match the manifest or points outside the shard.
    """

    def __init__(self, store: Store, manifest: Manifest, shard: Shard, is_last: bool) -> None:
        self._store, self._shard, self._is_last = store, shard, is_last
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._vocab_size, self._frame_tokens = manifest.vocab_size, manifest.frame_tokens
        self._tokens = store.open(shard.file, shard.size_bytes, shard.sha256)
        self._docs: StoredFile | None = None
        self._records = self._read_index()

    def frame(self, number: int, out: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """Returns the verified ids (tokens,) of a frame and its carry token.

        The carry is the first token of the next frame, also across shards; NO_CARRY ends a split.

        Args:
            number: of the frame in this shard.
            out: (tokens or more,) contiguous, of the stored dtype, to decode into without a copy.
        """
        offset, size_bytes, tokens, crc32, carry = self._records[number].item()[:5]
        data = self._tokens.read(offset, size_bytes, number, crc32)
        content_bytes = tokens * self._dtype.itemsize
        _check(data, crc32, range(content_bytes, content_bytes + 1), self._tokens, number)
        ids = np.empty(tokens, self._dtype) if out is None else out[:tokens]
        _decode(data, ids, self._tokens, number)
        # Not max(): its AVX-512 kernel lowers the clock and slowed the next zstd decode by a sixth.
        if np.count_nonzero(ids >= self._vocab_size):
            raise self._tokens.error(
                number, f"holds token id {ids.max()}, the vocabulary ends below {self._vocab_size}"
            )
        return ids, carry

    def carry_error(self, number: int) -> DataError:
        """Returns the error for a frame that does not start with the carry of the one before."""
        return self._tokens.error(number, "does not start with the carry token of the frame before")

    def document_ends(self, number: int) -> np.ndarray:
        """Returns the document ends inside a frame: (ends,) uint32, rising, in 1..tokens."""
        _, _, tokens, _, _, offset, size_bytes, crc32 = self._records[number].item()
        docs = self._docs = self._docs or self._open_documents()
        data = docs.read(offset, size_bytes, number, crc32)
        item = DOCUMENT_END_DTYPE.itemsize
        size = _check(data, crc32, range(0, tokens * item + 1, item), docs, number)
        ends = np.empty(size // item, DOCUMENT_END_DTYPE)
        _decode(data, ends, docs, number)
        if len(ends) and not (
            ends[0] >= 1 and ends[-1] <= tokens and bool((ends[1:] > ends[:-1]).all())
        ):
            raise docs.error(number, f"has document ends that do not rise within 1..{tokens}")
        return ends

    def verify_files(self) -> None:
        """Compares the sha256 of the whole token and document files with the manifest."""
        self._tokens.verify()
        self._open_documents().verify()

    def _open_documents(self) -> StoredFile:
        shard = self._shard
        return self._store.open(shard.documents, shard.documents_size_bytes, shard.documents_sha256)

    def _read_index(self) -> np.ndarray:
        shard = self._shard
        size_bytes = INDEX_HEADER.itemsize + shard.num_frames * INDEX_RECORD.itemsize
        file = self._store.open(shard.index, size_bytes, shard.index_sha256)
        data = file.read_all()
        header = np.frombuffer(data, INDEX_HEADER, count=1)[0].item()
        if header != (INDEX_MAGIC, VERSION, INDEX_RECORD.itemsize, shard.num_frames):
            raise file.error(None, "has a header of another format or length")
        records = np.frombuffer(data, INDEX_RECORD, offset=INDEX_HEADER.itemsize)
        self._check_records(file, records)
        return records

    def _check_records(self, file: StoredFile, records: np.ndarray) -> None:
        shard, last = self._shard, self._shard.num_frames - 1
        tokens = np.full(shard.num_frames, self._frame_tokens, np.uint64)
        tokens[last] = shard.num_tokens - last * self._frame_tokens
        carry_ok = records["carry"] < self._vocab_size
        if self._is_last:
            carry_ok[last] = records["carry"][last] == NO_CARRY
        for name, good in (
            ("tokens", records["tokens"] == tokens),
            ("carry", carry_ok),
            ("offset", _adjoin(records["offset"], records["size_bytes"], shard.size_bytes)),
            (
                "docs_offset",
                _adjoin(
                    records["docs_offset"], records["docs_size_bytes"], shard.documents_size_bytes
                ),
            ),
        ):
            if not good.all():
                frame = int(np.argmin(good))
                value = int(records[name][frame])
                raise file.error(frame, f"has a wrong {name} {value}")


def _adjoin(offset: np.ndarray, size_bytes: np.ndarray, end: int) -> np.ndarray:
    """Returns per frame whether it starts where the one before ends and stops by `end`."""
    ends = np.cumsum(size_bytes, dtype=np.uint64)
    starts = ends - size_bytes
    good: np.ndarray = (offset == starts) & (ends <= end) & (size_bytes > 0)
    return good


def _check(data: bytes, crc32: int, sizes: range, file: StoredFile, frame: int) -> int:
    """Returns the declared content size in bytes of a zstd frame; it must be one of `sizes`."""
    if zlib.crc32(data) != crc32:
        raise file.error(frame, "does not match its crc32: it was changed or damaged")
    try:
        header = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise file.error(frame, f"is not a zstd frame ({error})") from None
    if header.content_size not in sizes:
        raise file.error(
            frame, f"declares {header.content_size} bytes of content, the limit is {sizes[-1]}"
        )
    if not header.has_checksum or header.dict_id:
        raise file.error(frame, "has no content checksum or needs a dictionary")
    size: int = header.content_size
    return size


def _decode(data: bytes, out: np.ndarray, file: StoredFile, frame: int) -> None:
    """Fills `out` with exactly its bytes; zstd cannot write beyond it and checks its checksum."""
    decompressor = getattr(_thread, "decompressor", None)
    if decompressor is None:
        decompressor = _thread.decompressor = zstandard.ZstdDecompressor()
    try:
        reader = decompressor.stream_reader(data)
        size_bytes = reader.readinto(out) if len(out) else 0
        # The read beyond the end makes sure that the checksum was reached.
        rest = reader.read(1)
    except zstandard.ZstdError as error:
        raise file.error(frame, f"cannot be decoded ({error})") from None
    if size_bytes != out.nbytes or rest:
        raise file.error(frame, f"does not hold the {out.nbytes} bytes of content it declares")
