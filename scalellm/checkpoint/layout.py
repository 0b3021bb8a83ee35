"""Names and checks shared by the writer and the reader of checkpoints.

    checkpoints/step-00000010/
        manifest.json                what follows, with sizes and SHA-256; written last
        model-00000.safetensors      weights that rank 0 wrote, by FQN
        optimizer-00000.safetensors  its `<fqn>.exp_avg`, `<fqn>.exp_avg_sq`, `<fqn>.step`

A directory is written under a hidden name, fsynced and renamed: a complete one has its manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT = "scalellm-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
STEP_NAME = re.compile(r"step-(\d{8,})")
FILE_NAME = re.compile(r"(model|optimizer)-\d{5}\.safetensors")
WRITING_SUFFIX = ".writing"
REPLACED_SUFFIX = ".replaced"
# Which file a piece goes to, by the prefix of its name.
FILE_OF_PREFIX = {"model": "model", "optim": "optimizer"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FileEntry(_Strict):
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PieceEntry(_Strict):
    """A rectangle of a tensor: where it lies in the whole, and in which file."""

    file: str
    offsets: list[int]
    shape: list[int]


class TensorEntry(_Strict):
    dtype: Literal["float32", "float64", "bfloat16", "float16", "int64", "int32"]
    shape: list[int]
    pieces: list[PieceEntry]


class Manifest(_Strict):
    """`manifest.json`: what a checkpoint holds. `checksum` covers all the other fields."""

    format: Literal["scalellm-checkpoint"]
    version: int
    step: int = Field(ge=0)
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    checksum: str

    @model_validator(mode="after")
    def _check_pieces(self) -> Manifest:
        for name in self.files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a checkpoint")
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                if piece.file not in self.files:
                    raise ValueError(f"{name} lies in {piece.file!r}, which is not listed")
                if not len(piece.offsets) == len(piece.shape) == len(tensor.shape):
                    raise ValueError(f"{name} has a piece with another number of dimensions")
        return self


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def steps_in(root: Path) -> list[Path]:
    """Directories named like a checkpoint, newest step first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its own `checksum`, as canonical JSON."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
