"""From our options to DeepSpeed's JSON, with the reasons for what is refused.

Source: https://www.deepspeed.ai/docs/config-json; what was measured of version 0.19.8 on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Literal

from scalellm.config import BatchPlan, TrainConfig, setting
from scalellm.errors import ConfigError
from scalellm.strategies._transforms import refuse_one_graph
from scalellm.strategies.base import Options, Sharding

# The bridge to the neutral checkpoint reads attributes that are private to DeepSpeed.
VERSION = "0.19.8"
_MIB = 1 << 20

# What the config already says elsewhere: two places for one number would drift apart.
_OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.learning_rate, train.beta1, train.beta2, train.eps, train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "zero_optimization.stage": "strategy.stage",
    "zero_optimization.cpu_offload": "strategy.offload_optimizer",
    "zero_optimization.cpu_offload_params": "strategy.offload_param",
    "zero_optimization.offload_optimizer.device": "strategy.offload_optimizer",
    "zero_optimization.offload_param.device": "strategy.offload_param",
}
# They divide parameters in ways that the bridge to the checkpoint does not know.
_UNPROVEN = ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights")


class DeepSpeedOptions(Options):
    stage: int = setting(
        2,
        "ZeRO: 0 divides nothing, 1 the optimizer state, 2 gradients too, 3 parameters too",
        ge=0,
        le=3,
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = setting(
        "none", "where the optimizer state lives; nvme needs stage 3"
    )
    offload_param: Literal["none", "cpu", "nvme"] = setting(
        "none", "where parameters live between their uses; cpu needs stage 3, nvme is refused"
    )
    nvme_path: Path | None = setting(None, "folder on a fast disk for offload_optimizer: nvme")
    cpu_adam: Literal["deepspeed", "torch"] = setting(
        "deepspeed",
        "who updates an offloaded optimizer: DeepSpeedCPUAdam (compiled once, a minute) or AdamW",
    )
    bucket_mb: int = setting(25, "gradients reduced together", unit="MiB of fp32", ge=1)
    persistent_elements: int = setting(
        100_000, "stage 3 keeps smaller parameters whole on every rank", unit="elements", ge=0
    )
    config: Path | None = setting(None, "a DeepSpeed JSON of your own, merged over the generated")


def sharding(options: DeepSpeedOptions, world_size: int, train: TrainConfig) -> Sharding:
    kinds = set()
    if options.offload_optimizer != "none":
        kinds |= {"optimizer", "gradients"}
    if options.offload_param != "none":
        kinds.add("parameters")
    return Sharding(
        offloaded=frozenset(kinds),
        working_bytes=2 if train.precision == "bf16" else None,
        parameters=world_size if options.stage == 3 else 1,
        gradients=world_size if options.stage >= 2 else 1,
        optimizer=world_size if options.stage >= 1 else 1,
    )


def check(options: DeepSpeedOptions, train: TrainConfig) -> None:
    """Refuses what DeepSpeed 0.19.8 lacks or does wrongly without a word.

    Raises:
        ConfigError: with the reason and the nearest combination that is right.
    """
    stage, optimizer = options.stage, options.offload_optimizer
    if train.precision not in ("fp32", "bf16"):
        raise ConfigError(
            f"train.precision={train.precision} is not offered with DeepSpeed, which trains here "
            "in fp32 or bf16; choose one of them or another strategy.name"
        )
    if stage == 0 and train.precision == "bf16":
        raise ConfigError(
            "strategy.stage=0 with train.precision=bf16 diverges in DeepSpeed, which then keeps no "
            "fp32 master weights; use strategy.stage=1"
        )
    if stage == 0 and optimizer != "none":
        raise ConfigError(
            f"strategy.offload_optimizer={optimizer} does nothing at strategy.stage=0; use "
            "strategy.stage=1 or higher"
        )
    if options.offload_param != "none" and stage < 3:
        raise ConfigError(
            f"strategy.offload_param={options.offload_param} does nothing at "
            f"strategy.stage={stage}; use strategy.stage=3"
        )
    if options.offload_param == "nvme":
        raise ConfigError(
            "strategy.offload_param=nvme stores fp32 parameters in half precision without saying "
            "so; use strategy.offload_param=cpu with strategy.offload_optimizer=nvme"
        )
    if stage == 3:
        refuse_one_graph(train, "strategy.stage=3")
    if optimizer == "nvme":
        _check_nvme(options)
    _check_installed()
    if options.config is not None:
        _read_own(options.config)


def _check_nvme(options: DeepSpeedOptions) -> None:
    if options.stage < 3:
        raise ConfigError(
            f"strategy.offload_optimizer=nvme writes nothing to disk at strategy.stage="
            f"{options.stage}; use strategy.stage=3, or strategy.offload_optimizer=cpu"
        )
    if options.nvme_path is None:
        raise ConfigError(
            "strategy.offload_optimizer=nvme needs strategy.nvme_path, a folder on a fast disk"
        )
    if not options.nvme_path.is_dir() or not os.access(options.nvme_path, os.W_OK):
        raise ConfigError(
            f"strategy.nvme_path={options.nvme_path} is not a folder that can be written; create "
            "it or choose another"
        )


def _check_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "strategy.name=deepspeed needs the package deepspeed, which is not installed: "
            f"pip install deepspeed=={VERSION}"
        )
    found = importlib.metadata.version("deepspeed").partition("+")[0]
    if found != VERSION:
        raise ConfigError(
            f"deepspeed {found} is installed, but checkpoints were proven with {VERSION} only: "
            f"pip install deepspeed=={VERSION}"
        )


def make_config(options: DeepSpeedOptions, train: TrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, the user's own JSON merged over what ours says.

    Clipping is left out: the strategy clips by the norm in fp64, as all strategies do.
    """
    bucket_elements = options.bucket_mb * _MIB // 4
    zero: dict[str, Any] = {
        "stage": options.stage,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if options.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": options.persistent_elements,
        }
    if options.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": options.offload_optimizer}
        if options.nvme_path is not None:
            zero["offload_optimizer"]["nvme_path"] = str(options.nvme_path)
    if options.offload_param != "none":
        zero["offload_param"] = {"device": options.offload_param}
    config: dict[str, Any] = {
        "train_batch_size": plan.micro_batch_size * plan.grad_accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if options.config is not None:
        config = _merged(config, _read_own(options.config))
    return config


def _read_own(path: Path) -> dict[str, Any]:
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"strategy.config={path} cannot be read: {error.strerror}; give the path of a JSON file"
        ) from None
    except ValueError as error:
        raise ConfigError(f"strategy.config={path} is not JSON: {error}") from None
    if not isinstance(own, dict):
        raise ConfigError(f"strategy.config={path} is not a JSON object of DeepSpeed's settings")
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"strategy.config={path}: zero_optimization is {zero}, not an object")
    for key in _UNPROVEN:
        if key in zero:
            raise ConfigError(
                f"strategy.config={path} sets zero_optimization.{key}, with which checkpoints are "
                "not proven; leave it out"
            )
    for key, ours in _OURS.items():
        if _has(own, key.split(".")):
            raise ConfigError(f"strategy.config={path} sets {key!r}, which is said by {ours} here")
    return own


def _has(tree: Any, words: list[str]) -> bool:
    for word in words:
        if not isinstance(tree, dict) or word not in tree:
            return False
        tree = tree[word]
    return True


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        both = isinstance(known, dict) and isinstance(value, dict)
        result[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return result
