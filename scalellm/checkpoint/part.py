"""One rank's part of a checkpoint: its pieces in files of bounded size, and a list of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from scalellm.checkpoint.layout import FILE_OF_PREFIX, key_of
from scalellm.checkpoint.safetensors_file import write_safetensors
from scalellm.strategies import Piece

# A file is closed before it would exceed this: what a rank holds of its shard while it writes.
MAX_FILE_BYTES = 512 << 20


def write_part(directory: Path, pieces: Iterable[Piece], rank: int) -> None:
    """Writes a rank's safetensors files and `part-<rank>.json`, which lists them.

    Raises:
        OSError: the disk is full or refuses.
        ValueError: pieces of one tensor contradict each other.
    """
    part = _Part(directory, rank)
    for piece in pieces:
        part.list_tensor(piece)
        if piece.tensor.numel():
            for cut in _cut(piece):
                part.add(cut)
    part.finish()


def part_path(directory: Path, rank: int) -> Path:
    return directory / f"part-{rank:05d}.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, sort_keys=True, allow_nan=False))


def merge_tensor(tensors: dict[str, Any], name: str, tensor: dict[str, Any]) -> None:
    """Adds the pieces of a tensor to those already listed under its name."""
    known = tensors.setdefault(name, tensor)
    if known is tensor:
        return
    for field in ("dtype", "shape"):
        if known[field] != tensor[field]:
            raise ValueError(f"{name} has pieces of {field} {known[field]} and {tensor[field]}")
    known["pieces"] += tensor["pieces"]


class _Part:
    """Collects tensors of the model and of the optimizer, and writes a file when one is full."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._waiting_bytes: dict[str, int] = {}
        self._num_files: dict[str, int] = {}
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}

    def list_tensor(self, piece: Piece) -> None:
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        tensor = {"dtype": dtype, "shape": list(piece.global_shape), "pieces": []}
        merge_tensor(self._tensors, piece.name, tensor)

    def add(self, piece: Piece) -> None:
        kind = FILE_OF_PREFIX[piece.name.partition(".")[0]]
        waiting = self._waiting.setdefault(kind, {})
        if self._waiting_bytes.get(kind, 0) + piece.tensor.nbytes > MAX_FILE_BYTES:
            self._flush(kind)
        shape = tuple(piece.tensor.shape)
        key = key_of(piece.name, piece.offsets, shape, piece.global_shape)
        if key in waiting:
            raise ValueError(f"{key} was given twice")
        waiting[key] = piece.tensor.detach().cpu()
        self._waiting_bytes[kind] = self._waiting_bytes.get(kind, 0) + piece.tensor.nbytes
        entry = {
            "file": self._name(kind),
            "key": key,
            "offsets": list(piece.offsets),
            "shape": list(shape),
        }
        self._tensors[piece.name]["pieces"].append(entry)

    def finish(self) -> None:
        for kind in self._waiting:
            self._flush(kind)
        content = {"files": self._files, "tensors": self._tensors}
        # Not fsynced: it is gone before the checkpoint counts.
        write_json(part_path(self._directory, self._rank), content)

    def _name(self, kind: str) -> str:
        return f"{kind}-{self._rank:05d}-{self._num_files.get(kind, 0):03d}.safetensors"

    def _flush(self, kind: str) -> None:
        waiting = self._waiting[kind]
        if not waiting:
            return
        name = self._name(kind)
        specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in waiting.items()}
        entry = write_safetensors(self._directory / name, specs, waiting.__getitem__)
        self._files[name] = entry.model_dump(exclude_none=True)
        self._num_files[kind] = self._num_files.get(kind, 0) + 1
        waiting.clear()
        self._waiting_bytes[kind] = 0


def _cut(piece: Piece) -> Iterator[Piece]:
    """Splits a piece larger than a file by its first dimension."""
    tensor = piece.tensor
    if tensor.dim() == 0 or tensor.nbytes <= MAX_FILE_BYTES:
        yield piece
        return
    num_rows = max(1, MAX_FILE_BYTES * len(tensor) // tensor.nbytes)
    for start in range(0, len(tensor), num_rows):
        offsets = (piece.offsets[0] + start, *piece.offsets[1:])
        yield replace(piece, tensor=tensor[start : start + num_rows], offsets=offsets)
