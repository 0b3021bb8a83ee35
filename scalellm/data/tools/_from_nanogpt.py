"""Flat files of ids: nanoGPT's `train.bin` and `val.bin`, and those of llm.c and modded-nanogpt.

nanoGPT's are bare uint16. llm.c's begin with 256 int32: magic 20240520, version 1 and the number of
uint16 that follow; or magic 20240801, version 7 and uint32. None of them says where documents end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.data.tools._foreign import (
    Foreign,
    ForeignSplit,
    Parts,
    ReadForeign,
    group_by_split,
    integer_dtype,
    map_ids,
    size_of,
)
from scalellm.errors import DataError, UserError

_HEADER_BYTES = 1024
_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_EVAL_MAGIC = 20240522
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class _File:
    path: Path
    dtype: np.dtype[Any]
    offset_bytes: int
    num_tokens: int

    def ids(self) -> np.ndarray:
        return map_ids(self.path, self.dtype, self.offset_bytes, self.num_tokens)


def is_nanogpt(path: Path) -> bool:
    """Whether this is a `.bin` file, or a folder that holds some."""
    return path.suffix == ".bin" if path.is_file() else any(path.glob("*.bin"))


def open_nanogpt(path: Path, read: ReadForeign) -> Foreign:
    """Opens a `.bin` file, or a folder of them: by their names they are train or validation.

    The files of a split are one stream in the order of their names: llm.c cuts documents in two.

    Raises:
        DataError: no such file, one that is cut off, or with a header of another kind.
        UserError: the file says its type, and another one was asked for.
    """
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .bin file; give train.bin or the folder it is in")
    opened = {file: _open_file(file, read) for file in files}
    splits = []
    for name, group in group_by_split(files).items():
        parts = [opened[file] for file in group]
        splits.append(ForeignSplit(name, sum(one.num_tokens for one in parts), _Documents(parts)))
    return Foreign("nanogpt", path, tuple(files), tuple(splits))


def _open_file(path: Path, read: ReadForeign) -> _File:
    size_bytes = size_of(path)
    if size_bytes >= _HEADER_BYTES:
        magic, version, count = map_ids(path, "<i4", 0, 3).tolist()
        if magic == _EVAL_MAGIC:
            raise DataError(f"{path} holds evaluation questions, no text; give a training file")
        if magic in _HEADERS:
            return _open_with_header(path, read, magic, version, count)
    dtype = integer_dtype(read.dtype or "uint16", "--dtype")
    if size_bytes % dtype.itemsize:
        raise DataError(
            f"{path} has {size_bytes} bytes, no multiple of the {dtype.itemsize} bytes of a "
            f"{dtype.name}: it is cut off, or of another type: say which with --dtype"
        )
    return _File(path, dtype, 0, size_bytes // dtype.itemsize)


def _open_with_header(path: Path, read: ReadForeign, magic: int, version: int, count: int) -> _File:
    known, code = _HEADERS[magic]
    dtype = np.dtype(code)
    if version != known:
        raise DataError(f"{path} has a header of version {version}, not {known}; make it again")
    if read.dtype not in (None, dtype.name):
        raise UserError(f"--dtype={read.dtype}: {path} says it holds {dtype.name}; leave it out")
    have, rest = divmod(size_of(path) - _HEADER_BYTES, dtype.itemsize)
    if rest or have != count:
        raise DataError(
            f"{path} promises {count} ids of {dtype.itemsize} bytes after its header and has "
            f"{have}: it is cut off or damaged; copy it again"
        )
    return _File(path, dtype, _HEADER_BYTES, count)


@dataclass(frozen=True)
class _Documents:
    files: list[_File]

    def __call__(self, eos_id: int | None) -> Iterator[Parts]:
        unfinished: list[np.ndarray] = []
        for file in self.files:
            ids = file.ids()
            start = 0
            for end in _ends(ids, eos_id):
                yield (*unfinished, ids[start:end])
                unfinished, start = [], end
            if start < len(ids):
                unfinished.append(ids[start:])
        if unfinished:
            yield tuple(unfinished)


def _ends(ids: np.ndarray, eos_id: int | None) -> Iterator[int]:
    if eos_id is None:
        return
    for first in range(0, len(ids), _CHUNK_TOKENS):
        found = np.flatnonzero(ids[first : first + _CHUNK_TOKENS] == eos_id)
        yield from (found + first + 1).tolist()
