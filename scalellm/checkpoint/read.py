"""Reading a checkpoint: everything is verified before the first tensor is handed out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from scalellm.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    STEP_NAME,
    VERSION,
    Manifest,
    PieceEntry,
    checksum,
    sha256_of,
    steps_in,
)
from scalellm.errors import CheckpointError


class Checkpoint:
    """A complete, verified checkpoint: a `StateSource` that reads any rectangle of any tensor."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step
        self.meta = manifest.meta
        self._tensors = manifest.tensors
        self._open: dict[str, Any] = {}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Returns the rectangle of `shape` at `offsets`, put together from the stored pieces."""
        entry = self._tensors[name]
        result = torch.empty(shape, dtype=getattr(torch, entry.dtype))
        found = 0
        for piece in entry.pieces:
            overlap = _overlap(piece, offsets, shape)
            if overlap is None:
                continue
            theirs, ours = overlap
            stored = self._file(piece.file).get_slice(name.partition(".")[2])
            part = stored[theirs] if theirs else stored[...]
            result[ours] = part
            found += part.numel()
        if found != result.numel():
            raise CheckpointError(
                f"{self.path}: the pieces of {name} cover {found} of {result.numel()} elements; "
                "resume from another checkpoint"
            )
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def _overlap(
    piece: PieceEntry, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Slices of the stored piece and of the wanted rectangle that are the same elements."""
    theirs, ours = [], []
    dimensions = zip(piece.offsets, piece.shape, offsets, shape, strict=True)
    for piece_start, piece_size, want_start, want_size in dimensions:
        start = max(piece_start, want_start)
        stop = min(piece_start + piece_size, want_start + want_size)
        if start >= stop:
            return None
        theirs.append(slice(start - piece_start, stop - piece_start))
        ours.append(slice(start - want_start, stop - want_start))
    return tuple(theirs), tuple(ours)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `step-XXXXXXXX` directory, or the newest complete one of a run folder.

    Raises:
        CheckpointError: damaged, incomplete, of another format, or not a checkpoint at all.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint or run folder at {path}")
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return _verified(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, skipped = latest(root)
    if found is None:
        raise CheckpointError(
            f"{path} has no complete checkpoint" + "".join(f"; {reason}" for reason in skipped)
        )
    return found


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest checkpoint that verifies, and why newer ones were passed over."""
    skipped: list[str] = []
    for path in steps_in(root):
        try:
            return _verified(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def _verified(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{path}: its file {name!r} is missing; {_FIX}")
        size_bytes = file.stat().st_size
        if size_bytes != entry.size_bytes:
            raise CheckpointError(
                f"{file} has {size_bytes:,} bytes, its manifest says {entry.size_bytes:,}; {_FIX}"
            )
        if sha256_of(file) != entry.sha256:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's; {_FIX}")
    return Checkpoint(path, manifest)


_FIX = "resume from another checkpoint of the run"


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: it has no {MANIFEST}; {_FIX}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{file} is over {MAX_MANIFEST_BYTES:,} bytes; {_FIX}")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is damaged: it is not JSON; {_FIX}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a {FORMAT} manifest; {_FIX}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has version {manifest.get('version')}, this scalellm reads {VERSION}; "
            "use the scalellm that wrote it"
        )
    try:
        if manifest.get("checksum") != checksum(manifest):
            raise ValueError("its checksum does not fit its content")
        return Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise CheckpointError(f"{file} is damaged: {reason}; {_FIX}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; {_FIX}") from None
