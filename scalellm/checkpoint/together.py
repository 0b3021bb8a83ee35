"""Opening a checkpoint on all ranks: each hashes a share of the files, the verdict is one."""

from __future__ import annotations

from pathlib import Path

from scalellm.checkpoint.layout import steps_in
from scalellm.checkpoint.read import Checkpoint, locate
from scalellm.checkpoint.verify import verify
from scalellm.dist import World, ranks_where, same_on_all_ranks, together
from scalellm.errors import CheckpointError


def open_together(path: Path, world: World) -> Checkpoint:
    """`open_checkpoint` for all ranks at once.

    Raises:
        UserError: on every rank, if one of them finds no checkpoint or a damaged one.
    """
    place = together(lambda: locate(path), world)
    assert place is not None
    if not place[1]:
        found, num_passed_over = latest_together(place[0], world)
        if found is None:
            raise CheckpointError(
                f"{path} has no complete checkpoint"
                + (f"; {num_passed_over} in it are damaged" if num_passed_over else "")
            )
        return found
    opened = together(lambda: _open_share(path, world), world)
    assert opened is not None
    _check_same(opened.checksum, path, world)
    return opened


def latest_together(root: Path, world: World) -> tuple[Checkpoint | None, int]:
    """Returns the newest checkpoint that all ranks find sound, and how many newer ones are not.

    The lowest rank that finds a fault prints which.

    Raises:
        CheckpointError: the ranks do not see the same files.
    """
    candidates = steps_in(root)
    _check_same(" ".join(path.name for path in candidates), root, world)
    for num_passed_over, path in enumerate(candidates):
        found, problem = None, None
        try:
            found = _open_share(path, world)
        except CheckpointError as error:
            problem = error
        at_fault = ranks_where(problem is not None, world)
        if found is not None and not at_fault:
            _check_same(found.checksum, path, world)
            return found, num_passed_over
        if at_fault[0] == world.rank:
            print(f"passed over: {problem}", flush=True)
    return None, len(candidates)


def _open_share(path: Path, world: World) -> Checkpoint:
    return Checkpoint(path, verify(path, world.rank, world.world_size))


def _check_same(seen: str, path: Path, world: World) -> None:
    if not same_on_all_ranks(seen, world):
        raise CheckpointError(
            f"the ranks see different checkpoints in {path}; put it on storage that all ranks share"
        )
