"""What a run needs at the least, compared with what there is before anything is allocated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from scalellm.config import BatchPlan, Config
from scalellm.dist import CPU, World
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.strategies import Sharding

# What a checkpoint holds: parameter and AdamW's two moments.
_SAVED_PER_PARAMETER = 3


def check_resources(config: Config, plan: BatchPlan, world: World, sharding: Sharding) -> None:
    """Refuses a precision the device lacks, and a model or batch that cannot fit in its memory.

    The need is a lower bound: what each rank of this host holds of the model and its optimizer, the
    logits of one micro-batch with their gradient, and the copy that a background save writes from
    and keeps, shared by all ranks. What passes may still be too much.
    """
    if config.train.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError(
            "train.precision=fp16 is about 100 times slower than fp32 on a CPU, which has no fp16 "
            "matrix products; use bf16 or fp32"
        )
    element_bytes = 8 if config.train.precision == "fp64" else 4
    rows = max(plan.micro_batch_size, config.eval.batch_size or 0)
    positions = rows * config.model.seq_len
    positions = min(positions, config.model.loss_chunk_tokens or positions)
    state_bytes, host_bytes = _state_bytes(config, world, sharding, element_bytes)
    batch_bytes = 2 * positions * (config.model.vocab_size or 0) * element_bytes
    ids_bytes = 2 * plan.micro_batch_size * plan.grad_accumulation * (config.model.seq_len + 1)
    ranks_here = world.local_world_size if world.device.type == "cpu" else 1
    needed_bytes = ranks_here * (state_bytes + batch_bytes + ids_bytes)
    copy_bytes = _copy_bytes(config, world)
    if world.device.type == "cpu":
        needed_bytes += copy_bytes
    else:
        _check_host(copy_bytes, world.local_world_size * host_bytes)
    available_bytes = _available_bytes(world.device)
    if needed_bytes > available_bytes:
        raise ConfigError(
            f"{ranks_here} rank(s) here need at least {_gib(needed_bytes)} "
            f"({_gib(state_bytes)} a rank for the model and its optimizer, {_gib(batch_bytes)} for "
            f"the logits of {rows} samples, {_gib(copy_bytes)} together to save in the "
            f"background), but {_gib(available_bytes)} are available; lower the model's size, "
            "train.micro_batch_size or model.seq_len, or set model.loss_chunk_tokens=1024 or "
            "checkpoint.asynchronous=false"
        )


def _state_bytes(
    config: Config, world: World, sharding: Sharding, element_bytes: int
) -> tuple[int, int]:
    """What a rank holds of weights, gradients and moments, on its device and offloaded to the host.

    A model that computes in half precision has master weights beside its moments.
    """
    working_bytes = sharding.working_bytes or element_bytes
    masters = 0 if sharding.working_bytes is None else 1
    kinds = {
        "parameters": working_bytes / sharding.parameters,
        "gradients": working_bytes / sharding.gradients,
        "optimizer": (2 + masters) * element_bytes / sharding.optimizer,
    }
    away = () if world.device.type == "cpu" else sharding.offloaded
    parameters = count_parameters(config.model)
    on_host = sum(size for kind, size in kinds.items() if kind in away)
    return int((sum(kinds.values()) - on_host) * parameters), int(on_host * parameters)


def _copy_bytes(config: Config, world: World) -> int:
    """Host memory of this host's share of the copy that a background save writes from."""
    if not config.checkpoint.asynchronous:
        return 0
    return _checkpoint_bytes(config) * world.local_world_size // world.world_size


def _checkpoint_bytes(config: Config) -> int:
    element_bytes = 8 if config.train.precision == "fp64" else 4
    return _SAVED_PER_PARAMETER * element_bytes * count_parameters(config.model)


def _check_host(copy_bytes: int, offloaded_bytes: int) -> None:
    """The host's memory, where the ranks compute on GPUs."""
    available_bytes = _available_bytes(CPU)
    if copy_bytes + offloaded_bytes > available_bytes:
        raise ConfigError(
            f"saving in the background copies {_gib(copy_bytes)} to this host's memory and "
            f"offloading keeps {_gib(offloaded_bytes)} there, but {_gib(available_bytes)} are "
            "available; set checkpoint.asynchronous=false or offload less"
        )


def check_disk(config: Config, path: Path) -> None:
    """Refuses before the first step if not even one checkpoint would fit."""
    needed_bytes = _checkpoint_bytes(config)
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"run.dir={path} has {free_bytes:,} bytes free, one checkpoint of this model needs "
            f"{needed_bytes:,}; free space or choose another run.dir"
        )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
