"""Writes one shard: zstd frames of ids with a seek table, frames of document ends, an index."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import zstandard

from scalellm.data.format import (
    DOCUMENT_END_DTYPE,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_RECORD,
    VERSION,
    Shard,
)
from scalellm.data.staging import HashedFile, write_synced

# https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md
_SEEK_TABLE_MAGIC = 0x184D_2A5E
_SEEK_FOOTER_MAGIC = 0x8F92_EAB1


class ShardWriter:
    """The three files of one shard; `stem` is their common path without the suffixes."""

    def __init__(self, stem: Path, level: int) -> None:
        self._stem = stem
        self._compressor = zstandard.ZstdCompressor(
            level=level, write_checksum=True, write_content_size=True
        )
        self._tokens = HashedFile(stem.with_name(f"{stem.name}.tokens.zst"))
        self._docs = HashedFile(stem.with_name(f"{stem.name}.docs.zst"))
        self._records: list[tuple[int, ...]] = []
        self._seek_entries: list[tuple[int, int]] = []
        self._num_tokens = self._num_documents = 0

    @property
    def num_frames(self) -> int:
        return len(self._records)

    def add(self, tokens: np.ndarray, ends: list[int], carry: int) -> None:
        frame = self._compressor.compress(tokens.tobytes())
        docs = self._compressor.compress(np.array(ends, DOCUMENT_END_DTYPE).tobytes())
        at, docs_at = self._tokens.size_bytes, self._docs.size_bytes
        crc32, docs_crc32 = zlib.crc32(frame), zlib.crc32(docs)
        self._records.append(
            (at, len(frame), len(tokens), crc32, carry, docs_at, len(docs), docs_crc32)
        )
        self._seek_entries.append((len(frame), tokens.nbytes))
        self._tokens.write(frame)
        self._docs.write(docs)
        self._num_tokens += len(tokens)
        self._num_documents += len(ends)

    def finish(self) -> Shard:
        self._tokens.write(_seek_table(self._seek_entries))
        self._tokens.close(sync=True)
        self._docs.close(sync=True)
        header = (INDEX_MAGIC, VERSION, INDEX_RECORD.itemsize, self.num_frames)
        records = np.array(self._records, INDEX_RECORD)
        index = self._stem.with_name(f"{self._stem.name}.index")
        sha256 = write_synced(index, np.array(header, INDEX_HEADER).tobytes() + records.tobytes())
        folder = self._stem.parent.name
        return Shard(
            file=f"{folder}/{self._tokens.path.name}",
            size_bytes=self._tokens.size_bytes,
            sha256=self._tokens.sha256,
            index=f"{folder}/{index.name}",
            index_sha256=sha256,
            documents=f"{folder}/{self._docs.path.name}",
            documents_size_bytes=self._docs.size_bytes,
            documents_sha256=self._docs.sha256,
            num_tokens=self._num_tokens,
            num_frames=self.num_frames,
            num_documents=self._num_documents,
        )

    def close(self) -> None:
        self._tokens.close()
        self._docs.close()


def _seek_table(entries: list[tuple[int, int]]) -> bytes:
    """Returns zstd's skippable seek table of (compressed, decompressed) bytes per frame."""
    table = np.array(entries, "<u4").tobytes()
    footer = struct.pack("<IBI", len(entries), 0, _SEEK_FOOTER_MAGIC)
    return struct.pack("<II", _SEEK_TABLE_MAGIC, len(table) + len(footer)) + table + footer
