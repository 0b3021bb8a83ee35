"""What the readers of other tools' token files have in common."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.errors import DataError, UserError

# The parts of one document, in order: views into the source's files, not copies.
Parts = tuple[np.ndarray, ...]

INTEGER_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# Names of a column of ids, in the order in which they are looked for.
USUAL_COLUMNS = ("input_ids", "tokens")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class ReadForeign:
    """How a source of another tool is read.

    Attributes:
        column: the column that holds the ids, or None for the usual names.
        dtype: the type of ids in files that do not say it, or None.
    """

    column: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class ForeignSplit:
    """One split of a source.

    Attributes:
        name: the split's name, or None if the source does not say.
        num_tokens: ids in it, or None if only reading tells.
        documents: `documents(eos_id)` starts a pass over its documents; `eos_id` cuts those sources
            that have no bounds of their own, and is None if there is no such id.
    """

    name: str | None
    num_tokens: int | None
    documents: Callable[[int | None], Iterator[Parts]]


@dataclass(frozen=True)
class Foreign:
    """A source of another tool, checked and ready to be read.

    Attributes:
        kind: "megatron", "nanogpt", "mds" or "hf".
        path: as the user gave it.
        files: all files that are read, for the record.
        splits: what is in them.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    splits: tuple[ForeignSplit, ...]


def split_of_name(stem: str) -> str | None:
    """The split a file's name speaks of, as in `owt_val_000000`, or None."""
    words = [_SPLIT_WORDS.get(word) for word in re.split(r"[^a-z]+", stem.lower())]
    return next((word for word in words if word), None)


def group_by_split(paths: Iterable[Path]) -> dict[str | None, list[Path]]:
    """Files by the split in their names, in their order; all say one, or none does."""
    groups: dict[str | None, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_of_name(path.name.partition(".")[0]), []).append(path)
    if len(groups) > 1 and None in groups:
        raise DataError(
            f"{groups[None][0]} names no split, its neighbours do; give the files one by one, each "
            "with its --split-name"
        )
    return groups


def size_of(path: Path) -> int:
    """Bytes of a readable regular file; anything else, a pipe say, would hang or lie."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path} is no regular file; give the files of a dataset")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {path}: permission denied; check its owner and mode")
    return info.st_size


def map_ids(path: Path, dtype: Any, offset_bytes: int, count: int) -> np.ndarray:
    """A read-only view (count,) of a file's ids, which costs no memory."""
    kind = np.dtype(dtype)
    have_bytes = size_of(path) - offset_bytes
    if have_bytes < count * kind.itemsize:
        raise DataError(
            f"{path} is cut off: {count} ids of {kind.itemsize} bytes from byte {offset_bytes} "
            f"are promised, {have_bytes} bytes are there; copy it again"
        )
    if count == 0:
        return np.empty(0, kind)
    try:
        mapped = np.memmap(path, kind, mode="r", offset=offset_bytes, shape=(count,))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; check the file") from None
    # Slices of a plain array cost a tenth of slices of a memmap.
    return np.asarray(mapped)


def integer_dtype(name: str, asked: str) -> np.dtype[Any]:
    """The little-endian dtype of a name; `asked` names what asked for it."""
    if name not in INTEGER_TYPES:
        raise UserError(
            f"{asked}={name!r} is no integer type; use one of {', '.join(INTEGER_TYPES)}"
        )
    return np.dtype(name).newbyteorder("<")


def pick_column(names: list[str], wanted: str | None, where: Path) -> str:
    """The column of ids: the one asked for, else the first usual name there is."""
    listed = ", ".join(names[:20]) or "none"
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{where} has no column {wanted!r}; its columns are: {listed}")
        return wanted
    for name in USUAL_COLUMNS:
        if name in names:
            return name
    raise DataError(
        f"{where} has no column {' or '.join(USUAL_COLUMNS)}; name the one that holds token ids "
        f"with --column, its columns are: {listed}"
    )
