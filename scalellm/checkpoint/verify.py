"""Whether a checkpoint is what was written: its manifest, its sizes, its hashes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import ValidationError

from scalellm.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    READABLE_VERSIONS,
    Manifest,
    checksum,
    matches,
)
from scalellm.errors import CheckpointError

FIX = "resume from another checkpoint of the run"


def verify(path: Path, rank: int = 0, world_size: int = 1) -> Manifest:
    """Checks a checkpoint, and returns its manifest.

    Of `world_size` ranks each looks at all sizes and hashes its share of the files, so the
    checkpoint is sound only if all of them say so.

    Raises:
        CheckpointError: damaged, incomplete, unreadable or of another format.
    """
    try:
        return _verify(path, rank, world_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; {FIX}") from None


def _verify(path: Path, rank: int, world_size: int) -> Manifest:
    manifest = _read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            what = "a link, which is not followed" if file.is_symlink() else "missing"
            raise CheckpointError(f"{path}: its file {name!r} is {what}; {FIX}")
        size_bytes = file.stat().st_size
        if size_bytes != entry.size_bytes:
            raise CheckpointError(
                f"{file} has {size_bytes:,} bytes, its manifest says {entry.size_bytes:,}; {FIX}"
            )
    share = sorted(manifest.files)[rank::world_size]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sound = pool.map(lambda name: matches(path / name, manifest.files[name]), share)
        for name, is_sound in zip(share, sound, strict=True):
            if not is_sound:
                raise CheckpointError(
                    f"{path / name} is damaged: its hash is not the manifest's; {FIX}"
                )
    return manifest


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: it has no {MANIFEST}; {FIX}")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{file} is over {MAX_MANIFEST_BYTES:,} bytes; {FIX}")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is damaged: it is not JSON; {FIX}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a {FORMAT} manifest; {FIX}")
    if manifest.get("version") not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(
            f"{file} has version {manifest.get('version')}, this scalellm reads {readable}; "
            "use the scalellm that wrote it"
        )
    try:
        if manifest.get("checksum") != checksum(manifest):
            raise ValueError("its checksum does not fit its content")
        return Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise CheckpointError(f"{file} is damaged: {reason}; {FIX}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; {FIX}") from None
