"""Saving a run's state and taking it up again: weights, optimizer, cursor, counters."""

from __future__ import annotations

from pathlib import Path

from scalellm import checkpoint, data
from scalellm.dist import World, barrier
from scalellm.errors import CheckpointError, ConfigError, DataError
from scalellm.train.folder import RunFolder, tokenizer_sha256
from scalellm.train.loop import Run


def find_checkpoint(
    folder: RunFolder, resume: str | None, world: World
) -> checkpoint.Checkpoint | None:
    """Returns what `--resume` asks for; all ranks agree on it, or all raise CheckpointError."""
    if resume is None:
        return None
    if world.is_main:
        checkpoint.clean_up(folder.checkpoints)
    barrier()
    if resume != "auto":
        return checkpoint.open_together(Path(resume), world)
    found, num_passed_over = checkpoint.latest_together(folder.checkpoints, world)
    if found is None and num_passed_over:
        raise CheckpointError(
            f"none of the {num_passed_over} checkpoints in {folder.checkpoints} can be read; "
            "start anew in another run.dir"
        )
    return found


def save_run(folder: RunFolder, saver: checkpoint.Saver, run: Run) -> None:
    """Saves a checkpoint of the run as it stands; all ranks call it."""
    assert run.cursor is not None
    meta = {
        "tokens": run.tokens,
        "cursor": run.cursor.to_dict(),
        "model": run.config.model.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_sha256(folder.path),
        "early_stopping": run.early_stopping.state(),
        "nonfinite_in_a_row": run.guard.in_a_row,
        "loss_scale": run.strategy.loss_scale.state(),
    }
    saver.save(run.step, run.strategy.state(), meta)


def load_run_state(
    run: Run, source: checkpoint.Checkpoint, dataset: data.TokenDataset, folder: RunFolder
) -> None:
    """Takes weights, optimizer, cursor and counters from a checkpoint."""
    cursor = data.Cursor.from_dict(source.meta["cursor"])
    if cursor.fingerprint != dataset.fingerprint:
        raise DataError(
            f"{source.path} was trained on another dataset than {dataset.path} (fingerprint "
            f"{cursor.fingerprint[:12]}, not {dataset.fingerprint[:12]}); set data.path to that "
            "dataset, or start a new run in another run.dir"
        )
    if source.step > run.config.train.steps:
        raise ConfigError(
            f"{source.path} is of step {source.step}, beyond train.steps="
            f"{run.config.train.steps}; raise train.steps to train on"
        )
    run.strategy.load_state(source)
    source.close()
    meta = source.meta
    run.step = source.step
    if source.path.resolve().parent == folder.checkpoints.resolve():
        run.saved_step = source.step
    run.tokens = meta["tokens"]
    run.cursor = cursor
    run.early_stopping.load(meta["early_stopping"])
    run.guard.in_a_row = meta["nonfinite_in_a_row"]
    run.strategy.loss_scale.load(meta["loss_scale"])
