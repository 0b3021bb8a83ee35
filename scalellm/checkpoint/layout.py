"""Names and checks shared by the writer and the reader of checkpoints.

    checkpoints/step-00000010/
        manifest.json                    what follows, with sizes and hashes; written last
        model-00000-000.safetensors      weights that rank 0 wrote, by FQN
        optimizer-00000-000.safetensors  its `<fqn>.exp_avg`, `<fqn>.exp_avg_sq`, `<fqn>.step`
        model-00000-001.safetensors ...  more of rank 0's, once a file has its size

A directory is written under a hidden name, fsynced and renamed: a complete one has its manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT = "scalellm-checkpoint"
VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
STEP_NAME = re.compile(r"step-(\d{8,})")
# Version 1 had one file a rank and kind, without a number of its own.
FILE_NAME = re.compile(r"(model|optimizer)-\d{5}(-\d{3,})?\.safetensors")
WRITING_SUFFIX = ".writing"
REPLACED_SUFFIX = ".replaced"
# Which file a piece goes to, by the prefix of its name.
FILE_OF_PREFIX = {"model": "model", "optim": "optimizer"}

_Size = Annotated[int, Field(ge=0)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Smaller than a core's cache: what was read is hashed there.
_READ_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FileEntry(_Strict):
    """What a file must be: its size, and its hash under the name of the function."""

    size_bytes: _Size
    blake3: _Hash | None = None
    sha256: _Hash | None = None  # versions 1 and 2


class PieceEntry(_Strict):
    """A rectangle of a tensor: where it lies in the whole, in which file, under which key."""

    file: str
    key: str = ""
    offsets: list[_Size]
    shape: list[_Size]


class TensorEntry(_Strict):
    dtype: Literal["float32", "float64", "bfloat16", "float16", "int64", "int32"]
    shape: list[_Size]
    pieces: list[PieceEntry]


class Manifest(_Strict):
    """`manifest.json`: what a checkpoint holds. `checksum` covers all the other fields."""

    format: Literal["scalellm-checkpoint"]
    version: int
    step: _Size
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    checksum: str

    @model_validator(mode="after")
    def _check_pieces(self) -> Manifest:
        hashed_by = {"sha256"} if self.version < 3 else {"blake3"}
        for name, entry in self.files.items():
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a checkpoint")
            if entry.model_dump(exclude_none=True).keys() - {"size_bytes"} != hashed_by:
                raise ValueError(f"{name} needs {' '.join(hashed_by)} and no other hash")
        places: set[tuple[str, str]] = set()
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                if self.version == 1:  # a rank had one piece of a tensor, under its name
                    piece.key = bare_name(name)
                if piece.file not in self.files:
                    raise ValueError(f"{name} lies in {piece.file!r}, which is not listed")
                if not piece.key or (piece.file, piece.key) in places:
                    raise ValueError(f"{name} has a piece without a key of its own: {piece.key!r}")
                places.add((piece.file, piece.key))
            _check_volume(name, tensor)
        return self


def _check_volume(name: str, tensor: TensorEntry) -> None:
    """Pieces inside the tensor, as large as it is together; overlaps are found when it is read."""
    for piece in tensor.pieces:
        if not len(piece.offsets) == len(piece.shape) == len(tensor.shape):
            raise ValueError(f"{name} has a piece with another number of dimensions")
        corners = zip(piece.offsets, piece.shape, tensor.shape, strict=True)
        if any(start + size > whole for start, size, whole in corners):
            raise ValueError(f"{name} of shape {tensor.shape} has a piece outside, {piece.key!r}")
    covered = sum(math.prod(piece.shape) for piece in tensor.pieces)
    if covered != math.prod(tensor.shape):
        raise ValueError(
            f"the pieces of {name} cover {covered} of {math.prod(tensor.shape)} elements"
        )


def bare_name(name: str) -> str:
    """The tensor's name without its `model.` or `optim.`."""
    return name.partition(".")[2]


def key_of(
    name: str, offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]
) -> str:
    """Key of a piece in its file: the bare name, and for a part its slices, `[12:24,0:48]`."""
    if shape == whole:
        return bare_name(name)
    corners = zip(offsets, shape, strict=True)
    return f"{bare_name(name)}[{','.join(f'{start}:{start + size}' for start, size in corners)}]"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_own(path: Path) -> bool:
    """A link is not the run's own: retention must not reach through it."""
    return bool(STEP_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def steps_in(root: Path) -> list[Path]:
    """Directories named like a checkpoint, newest step first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _is_own(path)]
    return sorted(found, key=step_of, reverse=True)


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its own `checksum`, as canonical JSON."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def matches(path: Path, entry: FileEntry) -> bool:
    """Whether the file has the hash that its entry names; every byte is read."""
    digest = hashlib.sha256() if entry.blake3 is None else blake3()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest() == (entry.blake3 or entry.sha256)
