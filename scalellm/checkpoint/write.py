"""Writing a checkpoint: beside its place, hashed, fsynced, then renamed into it."""

from __future__ import annotations

import errno
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scalellm.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    REPLACED_SUFFIX,
    VERSION,
    WRITING_SUFFIX,
    Manifest,
    checksum,
    step_name,
    step_of,
    steps_in,
)
from scalellm.checkpoint.part import merge_tensor, part_path, write_json, write_part
from scalellm.dist import Group, World, barrier, sum_over_ranks
from scalellm.durable import fsync_path
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    meta: dict[str, Any],
    world: World,
    keep: int,
    group: Group = None,
) -> Path:
    """Writes `root/step-XXXXXXXX`; every rank calls it with its own pieces.

    Args:
        meta: JSON values of the training loop (cursor, counters, model configuration).
        keep: complete checkpoints left in `root` afterwards, the newest ones.
        group: of `dist.side_group`, for a caller that is not the main thread; None: the main one.

    Returns:
        The finished directory. A kill at any moment leaves the previous checkpoints loadable.

    Raises:
        CheckpointError: the disk of a rank is full or refuses; what was written is removed.
    """
    target = root / step_name(step)
    temporary = root / f".{target.name}{WRITING_SUFFIX}"

    def on_main(action: Callable[[], None]) -> None:
        _agree(_attempt(action) if world.is_main else None, temporary, world, group)

    on_main(lambda: _make_empty(temporary))
    iterator = iter(pieces)
    problem = _attempt(lambda: write_part(temporary, iterator, world.rank))
    if problem is not None:
        # The other ranks may need this one to make their pieces.
        _attempt(lambda: deque(iterator, maxlen=0).clear())
    _agree(problem, temporary, world, group)

    def finish() -> None:
        commit(temporary, target, step, meta, world.world_size)
        _retain(root, step, keep)

    on_main(finish)
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
            left.rename(target)  # killed between the two renames of `commit`
        shutil.rmtree(left, ignore_errors=True)
    for left in root.glob(f".step-*{WRITING_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def commit(temporary: Path, target: Path, step: int, meta: dict[str, Any], world_size: int) -> None:
    """Joins the parts of all ranks to a manifest and renames the directory into place.

    Raises:
        ValueError: the pieces are not a whole: a strategy has yielded too few, or some twice.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "meta": meta,
        "files": {},
        "tensors": {},
    }
    for rank in range(world_size):
        part = json.loads(part_path(temporary, rank).read_text())
        manifest["files"] |= part["files"]
        for name, tensor in part["tensors"].items():
            merge_tensor(manifest["tensors"], name, tensor)
        part_path(temporary, rank).unlink()
    manifest["checksum"] = checksum(manifest)
    Manifest.model_validate(manifest)
    write_json(temporary / MANIFEST, manifest)
    fsync_path(temporary / MANIFEST)
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


def _attempt(action: Callable[[], None]) -> Exception | None:
    """Runs an action; its error is kept until all ranks have heard of it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def _agree(problem: Exception | None, temporary: Path, world: World, group: Group) -> None:
    """Raises on all ranks if one of them failed, once the half-written directory is gone."""
    device = world.device if group is None else None
    [failures] = sum_over_ranks([0.0 if problem is None else 1.0], device, group)
    if not failures:
        return
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier(group)
    if problem is not None and not isinstance(problem, OSError):
        raise problem
    root = temporary.parent
    error = CheckpointError(
        f"could not save a checkpoint under {root}: {_reason(problem, root)}; earlier checkpoints "
        "there are untouched: free space, lower checkpoint.keep or choose another run.dir, then "
        "--resume auto"
    )
    error.rank_only = problem is not None and failures < world.world_size
    raise error


def _reason(problem: OSError | None, root: Path) -> str:
    if problem is None:
        return "another rank failed, which says why"
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        free_bytes = shutil.disk_usage(root if root.exists() else root.parent).free
        return f"the disk is full ({free_bytes:,} bytes free)"
    return problem.strerror or str(problem)
