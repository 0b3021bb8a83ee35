"""The files of a dataset as files: sizes, hashes, and those that do not belong there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from scalellm.data.format import MANIFEST, Manifest

_READ_BYTES = 4 << 20


def check_file(path: Path, name: str, size_bytes: int | None, sha256: str) -> tuple[list[str], int]:
    """Compares size and sha256 of a whole file: its damage and the bytes read.

    The words are those of `TokenDataset`, so that both finding one fault is one line.
    """
    file, digest, done_bytes = path / name, hashlib.sha256(), 0
    if not file.exists():
        return [f"{file} cannot be opened: No such file or directory"], 0
    if not file.is_file():
        return [f"{file} is not a regular file"], 0
    try:
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
                done_bytes += len(block)
    except OSError as error:
        return [f"{file}: cannot be read ({error.strerror})"], done_bytes
    if size_bytes not in (None, done_bytes):
        return [f"{file} has {done_bytes} bytes, the manifest says {size_bytes} bytes"], done_bytes
    if digest.hexdigest() != sha256:
        return [f"{file}: does not match its sha256: it was changed or damaged"], done_bytes
    return [], done_bytes


def file_sizes(path: Path, manifest: Manifest) -> dict[str, int]:
    """The files of a dataset and their sizes as they are; a missing one has 0."""
    names = [MANIFEST, *([manifest.tokenizer.file] if manifest.tokenizer else [])]
    for split in manifest.splits.values():
        for shard in split.shards:
            names += [shard.file, shard.documents, shard.index]
    return {name: (path / name).stat().st_size if (path / name).is_file() else 0 for name in names}


def strangers(path: Path, known: dict[str, int]) -> Iterator[str]:
    """Files in the directory that are not of the dataset."""
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            relative = (Path(folder) / name).relative_to(path).as_posix()
            if relative not in known:
                yield relative
