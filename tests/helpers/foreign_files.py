"""Token files of other tools, written byte by byte from their documented formats."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

MEGATRON_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}


def write_megatron(
    prefix: Path,
    documents: Sequence[Sequence[Sequence[int]]],
    dtype: str = "uint16",
    *,
    modes: Sequence[int] | None = None,
    bounds: Sequence[int] | None = None,
) -> Path:
    """Writes PREFIX.bin and PREFIX.idx; a document is a list of sequences."""
    sequences = [np.array(one, dtype) for document in documents for one in document]
    lengths = np.array([len(one) for one in sequences], "<i4")
    pointers = np.cumsum([0, *(one.nbytes for one in sequences)])[: len(sequences)].astype("<i8")
    if bounds is None:
        bounds = np.cumsum([0, *map(len, documents)]).tolist()
    header = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, MEGATRON_CODES[dtype])
    header += struct.pack("<QQ", len(lengths), len(bounds))
    index = header + lengths.tobytes() + pointers.tobytes() + np.array(bounds, "<i8").tobytes()
    index += b"" if modes is None else np.array(modes, "i1").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(map(np.ndarray.tobytes, sequences)))
    return prefix


def write_llm_c(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1) -> Path:
    """Writes a file with the header of llm.c and modded-nanogpt."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def ndarray_bytes(ids: np.ndarray, *, dtype: bool = False, shape: bool = True) -> bytes:
    """An array as MDS writes it: a byte for its type, then its shape in the smallest type, then it.

    Args:
        dtype: whether the array says its type.
        shape: whether it says its shape.
    """
    codes = {"uint8": 8, "uint16": 16, "int32": 33, "int64": 65}
    out = bytes([codes[ids.dtype.name]]) if dtype else b""
    if shape:
        code = next(code for code in range(4) if len(ids) < 1 << (8 << code))
        out += bytes([1 << 2 | code]) + len(ids).to_bytes(1 << code, "little")
    return out + ids.tobytes()


def mds_shard(samples: Sequence[bytes]) -> bytes:
    """The bytes of a raw shard of encoded samples."""
    config = b'{"format": "mds"}'
    first = 4 * (len(samples) + 2) + len(config)
    offsets = np.cumsum([first, *map(len, samples)]).astype("<u4")
    return struct.pack("<I", len(samples)) + offsets.tobytes() + config + b"".join(samples)


def write_mds(
    folder: Path,
    shards: Sequence[Sequence[Sequence[bytes]]],
    columns: dict[str, tuple[str, int | None]],
    *,
    compression: str | None = None,
    hashes: Sequence[str] = ("sha1",),
) -> Path:
    """Writes a folder of MDS shards; a sample is the bytes of each column.

    Args:
        columns: encoding and fixed size of each, in the order of their names.
    """
    folder.mkdir(parents=True)
    sizes = [size for _, size in columns.values()]
    entries = []
    for number, shard in enumerate(shards):
        samples = []
        for values in shard:
            given = [len(v) for v, size in zip(values, sizes, strict=True) if size is None]
            samples.append(np.array(given, "<u4").tobytes() + b"".join(values))
        raw = mds_shard(samples)
        name = f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "column_encodings": [encoding for encoding, _ in columns.values()],
            "column_names": list(columns),
            "column_sizes": sizes,
            "compression": compression,
            "format": "mds",
            "hashes": list(hashes),
            "raw_data": _file_info(name, raw, hashes),
            "samples": len(samples),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if compression is None:
            (folder / name).write_bytes(raw)
        else:
            packed = zstandard.ZstdCompressor(level=3).compress(raw)
            entry["zip_data"] = _file_info(f"{name}.zstd", packed, hashes)
            (folder / f"{name}.zstd").write_bytes(packed)
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return folder


def _file_info(name: str, data: bytes, hashes: Sequence[str]) -> dict[str, Any]:
    digests = {kind: hashlib.new(kind, data).hexdigest() for kind in hashes}
    return {"basename": name, "bytes": len(data), "hashes": digests}
