"""What a launcher was told and what the config says must not contradict each other."""

from __future__ import annotations

from scalellm import strategies
from scalellm.config import Config
from scalellm.dist import World
from scalellm.errors import ConfigError

_START_ONE = "python launch/train.py"
# What `accelerate launch` may be told to use: the words for it that a config can say.
_GRANTED_BY = {
    "deepspeed": "strategy.name=accelerate strategy.backend=deepspeed (or strategy.name=deepspeed)",
    "fsdp": "strategy.name=fsdp",
    "megatron_lm": "strategy.name=fsdp, since there is no Megatron-LM here",
}


def check_launcher(config: Config, world: World) -> None:
    """Raises ConfigError if the launcher was told what the config does not say.

    It costs nothing and starts nothing: call it before the ranks meet, since ranks that a launcher
    forgot to start would be waited for.
    """
    if world.launcher == "sbatch":
        raise ConfigError(
            "slurm gave this job several tasks (SLURM_NTASKS), but a batch script runs once and "
            "this rank would train alone; submit launch/slurm.sh, which starts one rank a task, or "
            "ask for --ntasks=1 with --cpus-per-task"
        )
    asks = world.launcher_asks
    if "processes" in asks:
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started one: without a GPU it "
            "does so unless you type `accelerate launch --multi_gpu --num_processes N "
            "launch/train.py ...`, which works on a CPU too (for one process unset MASTER_ADDR and "
            f"type `{_START_ONE} ...`)"
        )
    if "strategy" in asks:
        _check_strategy(config, asks["strategy"])
    if "stage" in asks:
        _check_stage(config, asks["stage"])
    if asks.get("precision", config.train.precision) != config.train.precision:
        raise ConfigError(
            f"`accelerate launch` asks for --mixed_precision {asks['precision']}, but "
            f"train.precision={config.train.precision}; set both alike, or start "
            "it with --mixed_precision no"
        )


def _check_strategy(config: Config, asked: str) -> None:
    name = config.strategy.name
    backend = config.strategy.options.get("backend", "ddp")
    if asked == name or (asked == "deepspeed" and (name, backend) == ("accelerate", "deepspeed")):
        return
    beside = f" strategy.backend={backend}" if name == "accelerate" else ""
    raise ConfigError(
        f"`accelerate launch` asks for --use_{asked}, but the config says strategy.name={name}"
        f"{beside}; use {_GRANTED_BY[asked]}, or start it without --use_{asked}"
    )


def _check_stage(config: Config, asked: str) -> None:
    """The config's stage counts; Accelerate's, from a flag or its yaml, would be lost unsaid."""
    fields = strategies.resolve(config.strategy.name).options_class.model_fields
    stage = config.strategy.options.get("stage", fields["stage"].default)
    if str(stage) != asked:
        raise ConfigError(
            f"`accelerate launch` asks for --zero_stage {asked}, but strategy.stage={stage}; "
            f"use strategy.stage={asked}, or start it without --zero_stage"
        )
