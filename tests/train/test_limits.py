"""What is counted before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scalellm.config import BatchPlan, Config, parse_config
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.strategies import Sharding
from scalellm.train import limits

PLAN = BatchPlan(micro_batch_size=1, grad_accumulation=1, world_size=1)
WHOLE = Sharding()


def config_of(**changes: Any) -> Config:
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 100, "seq_len": 8}
    return parse_config({"model": model, **changes})


def smallest_that_passes(
    config: Config, world: World, patch: pytest.MonkeyPatch, sharding: Sharding = WHOLE
) -> int:
    """Bytes of memory below which the config is refused."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        patch.setattr(limits, "_available_bytes", lambda device, size=middle: size)
        try:
            limits.check_resources(config, PLAN, world, sharding)
            high = middle
        except ConfigError:
            low = middle + 1
    return low


@pytest.mark.parametrize(
    ("precision", "ranks_here", "world_size", "bytes_per_parameter"),
    [("fp32", 1, 1, 12), ("fp64", 1, 1, 24), ("fp32", 2, 2, 12), ("fp32", 2, 4, 6)],
)
def test_the_copy_of_a_background_save_is_counted(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    ranks_here: int,
    world_size: int,
    bytes_per_parameter: int,
) -> None:
    world = World(world_size=world_size, local_world_size=ranks_here)
    needs = [
        smallest_that_passes(
            config_of(train={"precision": precision}, checkpoint={"asynchronous": asynchronous}),
            world,
            monkeypatch,
        )
        for asynchronous in (True, False)
    ]
    assert needs[0] - needs[1] == bytes_per_parameter * count_parameters(config_of().model)


def test_on_a_gpu_the_copy_lies_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(device=torch.device("cuda", 0))
    host_bytes = 12 * count_parameters(config_of().model) - 1
    free = {"cuda": 1 << 40, "cpu": host_bytes}
    monkeypatch.setattr(limits, "_available_bytes", lambda device: free[device.type])
    with pytest.raises(ConfigError, match=r"copies .* set checkpoint\.asynchronous=false"):
        limits.check_resources(config_of(), PLAN, world, WHOLE)
    limits.check_resources(config_of(checkpoint={"asynchronous": False}), PLAN, world, WHOLE)
    free["cpu"] += 1
    limits.check_resources(config_of(), PLAN, world, WHOLE)


def test_what_ranks_divide_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights 4 bytes, gradients 4, moments 8; here everything is divided by two but gradients."""
    config = config_of(checkpoint={"asynchronous": False})
    world = World(world_size=2, local_world_size=1)
    halved = Sharding(parameters=2, gradients=1, optimizer=2)
    whole_bytes, part_bytes = (
        smallest_that_passes(config, world, monkeypatch, sharding) for sharding in (WHOLE, halved)
    )
    assert whole_bytes - part_bytes == 6 * count_parameters(config.model)


def test_what_is_offloaded_counts_against_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload is for models that the device cannot hold: it must not be refused for that."""
    config = config_of(checkpoint={"asynchronous": False})
    needs_bytes = 16 * count_parameters(config.model)
    world = World(device=torch.device("cuda", 0))
    offloaded = Sharding(offloaded=frozenset({"parameters", "gradients", "optimizer"}))
    free = {"cuda": needs_bytes - 1, "cpu": needs_bytes}
    monkeypatch.setattr(limits, "_available_bytes", lambda device: free[device.type])
    with pytest.raises(ConfigError, match=r"rank\(s\) here need at least"):
        limits.check_resources(config, PLAN, world, WHOLE)
    limits.check_resources(config, PLAN, world, offloaded)
    free["cpu"] -= 1
    with pytest.raises(ConfigError, match=r"offloading keeps .* offload less"):
        limits.check_resources(config, PLAN, world, offloaded)
