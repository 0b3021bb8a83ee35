"""Writing a checkpoint: beside its place, hashed, fsynced, then renamed into it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from scalellm.checkpoint.layout import (
    FILE_OF_PREFIX,
    FORMAT,
    MANIFEST,
    REPLACED_SUFFIX,
    VERSION,
    WRITING_SUFFIX,
    checksum,
    sha256_of,
    step_name,
    step_of,
    steps_in,
)
from scalellm.dist import World, barrier, sum_over_ranks
from scalellm.durable import fsync_path
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece


def save(
    root: Path, step: int, pieces: Iterable[Piece], meta: dict[str, Any], world: World, keep: int
) -> Path:
    """Writes `root/step-XXXXXXXX`; every rank calls it with its own pieces.

    Args:
        meta: JSON values of the training loop (cursor, counters, model configuration).
        keep: complete checkpoints left in `root` afterwards, the newest ones.

    Returns:
        The finished directory. A kill at any moment leaves the previous checkpoints loadable.

    Raises:
        CheckpointError: the disk is full or refuses; what was written of this one is removed.
    """
    target = root / step_name(step)
    temporary = root / f".{target.name}{WRITING_SUFFIX}"
    problem = _attempt(lambda: _make_empty(temporary)) if world.is_main else None
    _agree(problem, world, temporary)
    problem = _attempt(lambda: _write_part(temporary, pieces, world.rank))
    _agree(problem, world, temporary)
    if world.is_main:
        problem = _attempt(lambda: _commit(temporary, target, step, meta, world.world_size))
    _agree(problem, world, temporary)
    if world.is_main:
        _retain(root, step, keep)
    return target


def _retain(root: Path, step: int, keep: int) -> None:
    """Keeps the newest `keep` up to `step`; later ones are of a past this run has not taken."""
    before: list[Path] = []
    after: list[Path] = []
    for path in steps_in(root):
        (before if step_of(path) <= step else after).append(path)
    for old in before[keep:] + after:
        _remove(old)


def clean_up(root: Path) -> None:
    """Removes what a killed writer left behind. Only one process may call it, before saving."""
    for left in root.glob(f".step-*{REPLACED_SUFFIX}"):
        target = root / left.name.removesuffix(REPLACED_SUFFIX).removeprefix(".")
        if not target.exists():
            left.rename(target)  # killed between the two renames of `_commit`
        shutil.rmtree(left, ignore_errors=True)
    for left in root.glob(f".step-*{WRITING_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_part(directory: Path, pieces: Iterable[Piece], rank: int) -> None:
    """Writes this rank's safetensors files and `part-<rank>.json`, which lists them."""
    files: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Any] = {}
    for piece in pieces:
        prefix, _, key = piece.name.partition(".")
        file = f"{FILE_OF_PREFIX[prefix]}-{rank:05d}.safetensors"
        tensor = piece.tensor.detach().contiguous().cpu()
        files.setdefault(file, {})[key] = tensor
        tensors[piece.name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(piece.global_shape),
            "pieces": [{"file": file, "offsets": list(piece.offsets), "shape": list(tensor.shape)}],
        }
    listed: dict[str, Any] = {}
    for name, content in files.items():
        path = directory / name
        save_file(content, path)
        path.chmod(0o644)  # safetensors makes them private; other people resume runs too
        fsync_path(path)
        listed[name] = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(directory / f"part-{rank:05d}.json", {"files": listed, "tensors": tensors})


def _commit(temporary: Path, target: Path, step: int, meta: dict[str, Any], ranks: int) -> None:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "meta": meta,
        "files": {},
        "tensors": {},
    }
    for rank in range(ranks):
        part_path = temporary / f"part-{rank:05d}.json"
        part = json.loads(part_path.read_text())
        manifest["files"] |= part["files"]
        for name, tensor in part["tensors"].items():
            known = manifest["tensors"].setdefault(name, tensor)
            if known is not tensor:
                known["pieces"] += tensor["pieces"]
        part_path.unlink()
    manifest["checksum"] = checksum(manifest)
    _write_json(temporary / MANIFEST, manifest)
    fsync_path(temporary)
    replaced = target.with_name(f".{target.name}{REPLACED_SUFFIX}")
    if target.exists():  # an older attempt at the same step: this one replaces it whole
        target.rename(replaced)
    temporary.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, manifest first: a kill half-way leaves an incomplete one."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _attempt(action: Any) -> OSError | None:
    """Runs an action that may meet a full disk; the error is kept until all ranks agree."""
    try:
        action()
    except OSError as error:
        return error
    except Exception as error:  # safetensors wraps the system's error in its own class
        if "os error" not in str(error).lower() and "No space" not in str(error):
            raise
        return OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error))
    return None


def _agree(problem: OSError | None, world: World, temporary: Path) -> None:
    """Raises on all ranks if one of them failed, once the half-written directory is gone."""
    [failures] = sum_over_ranks([0.0 if problem is None else 1.0], world.device)
    if not failures:
        return
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    root = temporary.parent
    reason = "another rank failed, which says why"
    if problem is not None:
        reason = problem.strerror or str(problem)
    if problem is not None and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        free_bytes = shutil.disk_usage(root if root.exists() else root.parent).free
        reason = f"the disk is full ({free_bytes:,} bytes free)"
    error = CheckpointError(
        f"could not save a checkpoint under {root}: {reason}; earlier checkpoints there are "
        "untouched: free space, lower checkpoint.keep or choose another run.dir, then --resume auto"
    )
    error.rank_only = problem is not None
    raise error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, sort_keys=True, allow_nan=False))
    fsync_path(path)
