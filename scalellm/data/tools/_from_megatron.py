"""Megatron-LM's indexed dataset: PREFIX.bin holds ids, PREFIX.idx where they are.

The index (all little-endian): magic `MMIDIDX\\0\\0`, version u64 = 1, code of the ids' type u8,
number of sequences u64, number of document bounds u64, then per sequence its length i32 and its
first byte i64, the document bounds i64 (numbers of sequences, from 0 to all), and in multimodal
datasets a mode i8 per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from scalellm.data.tools._foreign import (
    Foreign,
    ForeignSplit,
    Parts,
    group_by_split,
    map_ids,
    size_of,
)
from scalellm.errors import DataError

_MAGIC, _OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HEADER = np.dtype(
    [
        ("magic", "V9"),
        ("version", "<u8"),
        ("code", "u1"),
        ("num_sequences", "<u8"),
        ("num_bounds", "<u8"),
    ]
)
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CHUNK = 1 << 20
_AGAIN = "make it again with Megatron's preprocess_data.py"


@dataclass(frozen=True)
class _Index:
    """A checked index: memory-mapped, never read whole."""

    dtype: str
    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray
    num_tokens: int


def is_megatron(path: Path) -> bool:
    """Whether there is an index at this prefix, `.bin` or `.idx` file, or in this folder."""
    return any(_index_of(path).is_file() for path in [path, *_prefixes(path)])


def open_megatron(path: Path) -> Foreign:
    """Opens a prefix, its `.bin` or `.idx` file, or a folder of them.

    Raises:
        DataError: no index there, a damaged one, or one that lies.
    """
    prefixes = _prefixes(path) if path.is_dir() else [path]
    if not prefixes:
        raise DataError(f"{path} holds no .idx file; give the prefix of a .bin and .idx pair")
    indexes = {prefix: _read_index(prefix) for prefix in prefixes}
    splits = []
    for name, group in group_by_split(prefixes).items():
        pairs = [(prefix, indexes[prefix]) for prefix in group]
        num_tokens = sum(index.num_tokens for _, index in pairs)
        splits.append(ForeignSplit(name, num_tokens, _Documents(pairs)))
    files = [file for prefix in prefixes for file in (_index_of(prefix), _data_of(prefix))]
    return Foreign("megatron", path, tuple(files), tuple(splits))


@dataclass(frozen=True)
class _Documents:
    pairs: list[tuple[Path, _Index]]

    def __call__(self, eos_id: int | None) -> Iterator[Parts]:
        for prefix, index in self.pairs:
            ids = map_ids(_data_of(prefix), index.dtype, 0, index.num_tokens)
            for start, stop in _token_ranges(index, ids.itemsize):
                yield (ids[start:stop],)


def _prefixes(path: Path) -> list[Path]:
    return sorted(file.with_suffix("") for file in path.glob("*.idx")) if path.is_dir() else []


def _index_of(path: Path) -> Path:
    return _stem(path, ".idx")


def _data_of(path: Path) -> Path:
    return _stem(path, ".bin")


def _stem(path: Path, suffix: str) -> Path:
    # A prefix may have dots of its own: `with_suffix` would cut it.
    base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return base.with_name(base.name + suffix)


def _read_index(prefix: Path) -> _Index:
    path, data = _index_of(prefix), _data_of(prefix)
    size_bytes = size_of(path)
    if size_bytes < _HEADER.itemsize:
        raise DataError(f"{path} has {size_bytes} bytes, its header alone has 34; {_AGAIN}")
    header = map_ids(path, _HEADER, 0, 1)[0]
    magic, version, code = bytes(header["magic"]), int(header["version"]), int(header["code"])
    if magic.startswith(_OLD_MAGIC):
        raise DataError(f"{path} is an index of the old fairseq kind (TNTIDX); {_AGAIN}")
    if magic != _MAGIC or version != 1:
        raise DataError(
            f"{path} is no Megatron index of version 1 (magic {magic!r}, version {version}); "
            f"{_AGAIN}"
        )
    dtype = _DTYPES.get(code)
    if dtype is None or np.dtype(dtype).kind == "f":
        raise DataError(f"{path} has ids of type code {code}, integers are 1 to 5 and 8; {_AGAIN}")
    sequences, bounds = int(header["num_sequences"]), int(header["num_bounds"])
    # Python's integers: a count of 2^63 cannot wrap, and nothing is allocated before it is checked.
    plain_bytes = _HEADER.itemsize + 12 * sequences + 8 * bounds
    if size_bytes not in (plain_bytes, plain_bytes + sequences):
        raise DataError(
            f"{path} has {size_bytes} bytes, its header of {sequences} sequences and {bounds} "
            f"document bounds makes {plain_bytes}: it is cut off or damaged; {_AGAIN}"
        )
    at = _HEADER.itemsize
    index = _Index(
        dtype,
        map_ids(path, "<i4", at, sequences),
        map_ids(path, "<i8", at + 4 * sequences, sequences),
        map_ids(path, "<i8", at + 12 * sequences, bounds),
        size_of(data) // np.dtype(dtype).itemsize,
    )
    if size_bytes > plain_bytes and map_ids(path, "i1", plain_bytes, sequences).any():
        raise DataError(f"{path} is multimodal: its sequences are not all text; {_AGAIN}")
    _check_sequences(path, data, index)
    _check_bounds(path, index)
    return index


def _check_sequences(path: Path, data: Path, index: _Index) -> None:
    """Sequences must lie one after the other and fill the file of ids, as Megatron writes them."""
    end, itemsize = 0, np.dtype(index.dtype).itemsize
    for first in range(0, len(index.lengths), _CHUNK):
        lengths = index.lengths[first : first + _CHUNK].astype(np.int64)
        starts = end + np.cumsum(lengths * itemsize) - lengths * itemsize
        good = (lengths >= 0) & (index.pointers[first : first + _CHUNK] == starts)
        if not good.all():
            wrong = int(np.argmin(good))
            raise DataError(
                f"{path}: sequence {first + wrong} of {int(lengths[wrong])} ids starts at byte "
                f"{int(index.pointers[first + wrong])}, but the one before ends at byte "
                f"{int(starts[wrong])}; {_AGAIN}"
            )
        end = int(starts[-1] + lengths[-1] * itemsize)
    if end != size_of(data):
        raise DataError(
            f"{data} has {size_of(data)} bytes, its index speaks of {end}: one of the two is cut "
            f"off or of another dataset; {_AGAIN}"
        )


def _check_bounds(path: Path, index: _Index) -> None:
    bounds, sequences = index.bounds, len(index.lengths)
    if len(bounds) == 0 or bounds[0] != 0:
        raise DataError(f"{path} has no document bound at sequence 0; {_AGAIN}")
    # Without a call of end_document only the first bound is there: every sequence is a document.
    if len(bounds) > 1 and (bounds[-1] != sequences or (bounds[1:] < bounds[:-1]).any()):
        raise DataError(
            f"{path} has document bounds that do not rise from 0 to its {sequences} sequences; "
            f"{_AGAIN}"
        )


def _token_ranges(index: _Index, itemsize: int) -> Iterator[tuple[int, int]]:
    """First id and end of each document; a document is one sequence or more."""
    sequences = len(index.lengths)
    count = len(index.bounds) - 1 if len(index.bounds) > 1 else sequences
    for first in range(0, count, _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, count) + 1)
        bounds = index.bounds[numbers] if len(index.bounds) > 1 else numbers
        inside = np.minimum(bounds, max(sequences - 1, 0))
        starts = index.pointers[inside] // itemsize if sequences else np.zeros(len(bounds), int)
        starts = np.where(bounds < sequences, starts, index.num_tokens).tolist()
        yield from pairwise(starts)
