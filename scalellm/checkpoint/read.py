"""Reading a checkpoint: everything is verified before the first tensor is handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalellm.checkpoint.layout import MANIFEST, STEP_NAME, Manifest, PieceEntry, steps_in
from scalellm.checkpoint.safetensors_file import DTYPE_CODES
from scalellm.checkpoint.verify import FIX, verify
from scalellm.errors import CheckpointError

_Slices = tuple[slice, ...]


class Checkpoint:
    """A complete, verified checkpoint: a `StateSource` that reads any rectangle of any tensor."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step
        self.meta = manifest.meta
        self.checksum = manifest.checksum
        self._tensors = manifest.tensors
        self._open: dict[str, Any] = {}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Returns the rectangle of `shape` at `offsets`, put together from the stored pieces.

        Raises:
            CheckpointError: the pieces do not cover it exactly, or are not as the manifest says.
        """
        entry = self._tensors[name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        parts = [(piece, _overlap(piece, offsets, shape)) for piece in entry.pieces]
        found = [(piece, slices) for piece, slices in parts if slices is not None]
        result = torch.empty(shape, dtype=dtype)
        # One piece cannot overlap itself; several are checked element by element.
        seen = torch.zeros(shape, dtype=torch.bool) if len(found) > 1 else None
        covered = 0
        for piece, (theirs, ours) in found:
            part = self._stored(name, piece, dtype)[theirs or ...]
            result[ours] = part
            covered += part.numel()
            if seen is None:
                continue
            if seen[ours].any():
                raise _seen_here(f"{self.path}: pieces of {name} overlap; {FIX}")
            seen[ours] = True
        if covered != result.numel():
            raise _seen_here(
                f"{self.path}: the pieces of {name} cover {covered} of {result.numel()} elements; "
                f"{FIX}"
            )
        return result

    def close(self) -> None:
        """Lets go of its files: a deleted checkpoint holds its disk space until then."""
        self._open.clear()

    def _stored(self, name: str, piece: PieceEntry, dtype: torch.dtype) -> Any:
        """A lazy view of a piece, after a look whether it is what the manifest says."""
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(self.path / piece.file, framework="pt")
            stored = self._open[piece.file].get_slice(piece.key)
        except (SafetensorError, OSError) as error:
            raise _seen_here(f"{self.path / piece.file}: {error}; {FIX}") from None
        held = (stored.get_dtype(), stored.get_shape())
        if held != (DTYPE_CODES[dtype], piece.shape):
            raise _seen_here(
                f"{self.path / piece.file} holds {held[0]} {held[1]} as {piece.key!r}, the "
                f"manifest says {DTYPE_CODES[dtype]} {piece.shape}; {FIX}"
            )
        return stored


def _seen_here(sentence: str) -> CheckpointError:
    """Ranks read different parts: what one finds wrong it must say itself."""
    error = CheckpointError(sentence)
    error.rank_only = True
    return error


def _overlap(
    piece: PieceEntry, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[_Slices, _Slices] | None:
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


def locate(path: Path) -> tuple[Path, bool]:
    """Returns (`path`, True) if it is one checkpoint, or (the folder of checkpoints, False).

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint or run folder at {path}")
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return path, True
    return (path / "checkpoints" if (path / "checkpoints").is_dir() else path), False


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `step-XXXXXXXX` directory, or the newest complete one of a run folder.

    Raises:
        CheckpointError: damaged, incomplete, of another format, or not a checkpoint at all.
    """
    place, is_one = locate(path)
    if is_one:
        return Checkpoint(place, verify(place))
    found, skipped = latest(place)
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
            return Checkpoint(path, verify(path)), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped
