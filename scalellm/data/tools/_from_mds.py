"""MosaicML's streaming format MDS, version 2: `index.json` and shards, raw or compressed.

A shard (little-endian): number of samples u32, where each begins and the last ends as u32, the
writer's options as JSON, the samples. A sample: the size u32 of each of its columns that has no
fixed size, then the columns. A column of ids is `ndarray[:dtype[:shape]]` or plain `bytes`.
Columns that hold pickles are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.data.tools._foreign import (
    INTEGER_TYPES,
    Foreign,
    ForeignSplit,
    Parts,
    ReadForeign,
    integer_dtype,
    pick_column,
    size_of,
    split_of_name,
)
from scalellm.data.tools._mds_shard import Packed, ShardFile, raw_shard
from scalellm.errors import DataError, UserError

INDEX = "index.json"
_MAX_INDEX_BYTES = 64 << 20
_AGAIN = "copy it again or write it again with MDSWriter"
# Codes of the ids' type, and of the shape's type, in arrays that carry their own.
_DTYPES = {8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}


@dataclass(frozen=True)
class _Column:
    """Where the ids are in a sample, and how they are written.

    Attributes:
        sizes: of all columns in bytes; None: the sample says it.
        place: of the column of ids among them.
        dtype: of the ids, or None if each array says it.
        shape: whether each array begins with its shape.
    """

    sizes: tuple[int | None, ...]
    place: int
    dtype: np.dtype[Any] | None
    shape: bool


@dataclass(frozen=True)
class _Shard:
    packed: Packed
    num_samples: int
    column: _Column


def is_mds(path: Path) -> bool:
    """Whether there is an index in this folder or in the folders of its splits."""
    return bool(_folders(path))


def open_mds(path: Path, read: ReadForeign) -> Foreign:
    """Opens a folder with an index.json, or one with a folder for each split.

    Raises:
        DataError: no index, a damaged one, or no column of ids.
        UserError: a column of bytes, without a word about the type of its ids.
    """
    folders = _folders(path)
    if not folders:
        raise DataError(f"{path} holds no {INDEX}; give the folder that MDSWriter wrote")
    splits, files = [], []
    for name, folder in folders:
        shards = _read_index(folder, read)
        splits.append(ForeignSplit(name, None, _Documents(shards)))
        files += [folder / INDEX, *(shard.packed.file.path for shard in shards)]
    return Foreign("mds", path, tuple(files), tuple(splits))


@dataclass(frozen=True)
class _Documents:
    shards: list[_Shard]

    def __call__(self, eos_id: int | None) -> Iterator[Parts]:
        for shard in self.shards:
            with raw_shard(shard.packed) as data:
                offsets = _offsets(shard, data)
                for number, (start, stop) in enumerate(pairwise(offsets)):
                    try:
                        ids = _ids(data[start:stop], shard.column)
                    except (ValueError, IndexError, KeyError) as error:
                        raise DataError(
                            f"{shard.packed.file.path}: sample {number} is no row of ids "
                            f"({error}); {_AGAIN}"
                        ) from None
                    yield (ids,)


def _folders(path: Path) -> list[tuple[str | None, Path]]:
    if (path / INDEX).is_file():
        return [(None, path)]
    if not path.is_dir():
        return []
    found = [(split_of_name(one.name), one) for one in sorted(path.iterdir()) if one.is_dir()]
    return [(name, one) for name, one in found if name and (one / INDEX).is_file()]


def _read_index(folder: Path, read: ReadForeign) -> list[_Shard]:
    path = folder / INDEX
    if (size_bytes := size_of(path)) > _MAX_INDEX_BYTES:
        raise DataError(f"{path} has {size_bytes} bytes, the limit is {_MAX_INDEX_BYTES}; {_AGAIN}")
    try:
        entries = json.loads(path.read_bytes())["shards"]
        if not isinstance(entries, list):
            raise ValueError("its shards are no list")
        return [_shard(path, entry, read) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no index of MDS shards ({error!r}); {_AGAIN}") from None


def _shard(path: Path, entry: dict[str, Any], read: ReadForeign) -> _Shard:
    if entry["format"] != "mds" or entry["version"] != 2:
        raise DataError(
            f"{path} speaks of shards of format {entry['format']!r}, version {entry['version']!r}; "
            "only mds, version 2, can be converted"
        )
    names, sizes = [str(name) for name in entry["column_names"]], entry["column_sizes"]
    encodings = [str(one) for one in entry["column_encodings"]]
    if not len(names) == len(sizes) == len(encodings) or not all(
        one is None or (type(one) is int and 0 < one < 1 << 32) for one in sizes
    ):
        raise ValueError("its columns and their sizes do not fit together")
    place = names.index(pick_column(names, read.column, path))
    dtype, shape = _parse_encoding(path, names[place], encodings[place], read)
    zipped = entry["zip_data"]
    packed = Packed(
        _shard_file(path, entry["raw_data"]),
        _shard_file(path, zipped) if zipped else None,
        str(entry["compression"] or "").partition(":")[0],
    )
    samples = entry["samples"]
    if type(samples) is not int or not 0 <= samples <= packed.raw.size_bytes // 4:
        raise ValueError(f"a shard of {packed.raw.size_bytes} bytes with {samples} samples")
    return _Shard(packed, samples, _Column(tuple(sizes), place, dtype, shape))


def _shard_file(index: Path, entry: dict[str, Any]) -> ShardFile:
    name, size_bytes = entry["basename"], entry["bytes"]
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{str(name)[:80]!r} is no plain file name")
    if type(size_bytes) is not int or not 0 <= size_bytes < 1 << 40:
        raise ValueError(f"{name} with {str(size_bytes)[:40]} bytes")
    hashes = {str(kind): str(value) for kind, value in (entry.get("hashes") or {}).items()}
    return ShardFile(index.parent / name, size_bytes, hashes)


def _parse_encoding(
    path: Path, name: str, encoding: str, read: ReadForeign
) -> tuple[np.dtype[Any] | None, bool]:
    """The ids' type, None if each array says it, and whether each array says its shape."""
    kind, _, rest = encoding.partition(":")
    if kind == "bytes":
        if read.dtype is None:
            raise UserError(
                f"column {name!r} of {path} is plain bytes: say which integers they are with "
                "--dtype (int64 for llm-foundry's older files)"
            )
        return integer_dtype(read.dtype, "--dtype"), False
    dtype, _, shape = rest.partition(":")
    if kind != "ndarray" or (dtype and dtype not in INTEGER_TYPES):
        raise DataError(
            f"column {name!r} of {path} holds {encoding}, no row of integers; name another with "
            "--column"
        )
    return (integer_dtype(dtype, "--dtype") if dtype else None), not shape


def _offsets(shard: _Shard, data: np.ndarray) -> list[int]:
    """Where each sample begins and the last one ends."""
    head_bytes = 4 * (shard.num_samples + 2)
    if len(data) < head_bytes:
        raise DataError(f"{shard.packed.file.path} is too short for its samples; {_AGAIN}")
    numbers = data[:head_bytes].view("<u4").astype(np.int64)
    offsets = numbers[1:]
    fits = offsets[0] >= head_bytes and offsets[-1] == len(data) and (np.diff(offsets) >= 0).all()
    if numbers[0] != shard.num_samples or not fits:
        raise DataError(
            f"{shard.packed.file.path} has a header that lies: {int(numbers[0])} samples where the "
            f"index says {shard.num_samples}, or samples outside its {len(data)} bytes; {_AGAIN}"
        )
    return [int(one) for one in offsets]


def _ids(sample: np.ndarray, column: _Column) -> np.ndarray:
    at = 4 * column.sizes.count(None)
    given = iter(sample[:at].view("<u4").tolist())
    sizes = [next(given) if size is None else size for size in column.sizes]
    if at + sum(sizes) != len(sample):
        raise ValueError(f"columns of {sum(sizes)} bytes in {len(sample) - at}")
    at += sum(sizes[: column.place])
    data = sample[at : at + sizes[column.place]]
    dtype = column.dtype
    if dtype is None:
        dtype, data = np.dtype(_DTYPES[int(data[0])]), data[1:]
    if column.shape:
        data = _without_shape(data, dtype)
    return data.view(dtype)


def _without_shape(data: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The values of an array that begins with its shape, which must be one long row."""
    axes, width = int(data[0]) >> 2, 1 << (int(data[0]) & 3)
    shape = data[1 : 1 + axes * width].view(f"<u{width}").tolist()
    data = data[1 + axes * width :]
    if len(shape) != 1 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    return data
