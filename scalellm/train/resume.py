"""Saving a run's state and taking it up again: weights, optimizer, cursor, counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalellm import checkpoint, data
from scalellm.config import Config, ModelConfig
from scalellm.dist import World, barrier
from scalellm.errors import CheckpointError, ConfigError, DataError
from scalellm.train.folder import RunFolder, tokenizer_sha256
from scalellm.train.loop import Run

# What may differ between a checkpoint's model and the one that resumes it: it changes no function.
_FREE = {"preset", "dropout", "attention", "init_std", "seq_len", "loss_chunk_tokens"}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _EarlyStoppingState(_Strict):
    best_loss: float | None
    bad_evaluations: int = Field(ge=0)


class _LossScaleState(_Strict):
    value: float = Field(gt=0)
    good_steps: int = Field(ge=0)


class _Meta(_Strict):
    """What `save_run` leaves beside the tensors."""

    tokens: int = Field(ge=0)
    tokens_by_source: list[int] = []
    cursor: dict[str, Any]
    model: dict[str, Any]
    early_stopping: _EarlyStoppingState
    nonfinite_in_a_row: int = Field(ge=0)
    loss_scale: _LossScaleState


def find_checkpoint(
    folder: RunFolder, resume: str | None, world: World
) -> checkpoint.Checkpoint | None:
    """Returns what `--resume` asks for; all ranks agree on it, or all raise CheckpointError.

    Ranks that were started again go on where the run was, if it has saved; else they begin as they
    were told to.
    """
    if resume is None and not world.restarts:
        return None
    if world.is_main:
        checkpoint.clean_up(folder.checkpoints)
    barrier()
    if resume not in (None, "auto"):
        found = None
        if world.restarts:
            found, _ = checkpoint.latest_together(folder.checkpoints, world)
        return found or checkpoint.open_together(Path(resume), world)
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
        "tokens_by_source": run.sources.state(),
        "cursor": run.cursor.to_dict(),
        "model": run.config.model.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_sha256(folder.path),
        "early_stopping": run.early_stopping.state(),
        "nonfinite_in_a_row": run.guard.in_a_row,
        "loss_scale": run.strategy.loss_scale.state(),
    }
    saver.save(run.step, run.strategy.state(), meta)


def load_run_state(
    run: Run, source: checkpoint.Checkpoint, mixture: data.Mixture, folder: RunFolder
) -> None:
    """Takes weights, optimizer, cursor and counters from a checkpoint.

    Raises:
        UserError: it does not belong to this run; nothing was changed then.
    """
    meta = _read_meta(source)
    cursor = data.Cursor.from_dict(meta.cursor)
    if cursor.fingerprint != mixture.fingerprint:
        raise DataError(_other_data(run.config, source, cursor, mixture))
    if source.step > run.config.train.steps:
        raise ConfigError(
            f"{source.path} is of step {source.step}, beyond train.steps="
            f"{run.config.train.steps}; raise train.steps to train on"
        )
    _check_model(source, meta, run.config.model)
    run.strategy.load_state(source)
    source.close()
    run.step = source.step
    if source.path.resolve().parent == folder.checkpoints.resolve():
        run.saved_step = source.step
    run.tokens = meta.tokens
    run.sources.load(meta.tokens_by_source)
    run.cursor = cursor
    run.early_stopping.load(meta.early_stopping.model_dump())
    run.guard.in_a_row = meta.nonfinite_in_a_row
    run.strategy.loss_scale.load(meta.loss_scale.model_dump())


def _other_data(
    config: Config, source: checkpoint.Checkpoint, cursor: data.Cursor, mixture: data.Mixture
) -> str:
    of_one = [one for one in mixture.datasets.values() if one.fingerprint == cursor.fingerprint]
    if of_one:
        how = f"on {of_one[0].path} alone, without data.mix and data.stages; leave them out"
    elif mixture.is_plain:
        how = f"on another dataset than {config.data.where}; set data.path to that dataset"
    else:
        how = (
            f"on another mixture than {config.data.where}; set data.mix, data.stages and "
            "train.global_batch_size to that run's"
        )
    return (
        f"{source.path} was trained {how} (fingerprint {cursor.fingerprint[:12]}, here "
        f"{mixture.fingerprint[:12]}), or start a new run in another run.dir"
    )


def _read_meta(source: checkpoint.Checkpoint) -> _Meta:
    try:
        return _Meta.model_validate(source.meta)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{source.path} is damaged: meta.{where}: {first['msg']}; resume from another "
            "checkpoint of the run"
        ) from None


def _check_model(source: checkpoint.Checkpoint, meta: _Meta, model: ModelConfig) -> None:
    """Refuses a model that computes something else, also where all shapes agree."""
    try:
        stored = _function_of(ModelConfig.model_validate(meta.model))
    except ValidationError:
        raise CheckpointError(
            f"{source.path} is damaged: meta.model is no model configuration; resume from another "
            "checkpoint of the run"
        ) from None
    for key, value in _function_of(model).items():
        if stored[key] != value:
            raise CheckpointError(
                f"{source.path} is of another architecture: its model.{key} is {stored[key]}, this "
                f"model's is {value}; use the config in its run folder"
            )


def _function_of(model: ModelConfig) -> dict[str, Any]:
    values = model.model_dump(mode="json", exclude=_FREE)
    derived = {
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.mlp_size,
    }
    return {**values, **derived}
