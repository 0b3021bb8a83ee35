"""Collectives of a step: equal to a dry run's, and to what can be counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from scalellm.config import Config, parse_config
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.plan.dry_run import dry_run
from scalellm.plan.traffic import collectives, traffic, unit_shapes
from scalellm.plan.types import Collective

# An odd vocabulary and width: FSDP pads what does not divide.
MODEL = {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "vocab_size": 509, "seq_len": 16}


def config(world_size: int, micro_batches: int = 2, train: Any = None, **strategy: Any) -> Config:
    batch = {"global_batch_size": 2 * micro_batches * world_size, "micro_batch_size": 2}
    return parse_config({"model": MODEL, "strategy": strategy, "train": {**batch, **(train or {})}})


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        (4, {"name": "fsdp"}),
        (3, {"name": "fsdp", "reshard_after_forward": False}),
        (4, {"name": "fsdp", "shard_ranks": 2, "param_dtype": "bf16", "reduce_dtype": "fp32"}),
        (4, {"name": "fsdp", "reduce_every_micro_batch": False}),
        (4, {"name": "fsdp", "cpu_offload": True}),
        (2, {"name": "ddp", "bucket_mb": 1}),
        (2, {"name": "ddp", "compression": "bf16"}),
        (3, {"name": "ddp", "shard_optimizer": True, "bucket_mb": 1}),
    ],
    ids=str,
)
def test_equals_a_dry_run(world_size: int, strategy: dict[str, Any]) -> None:
    of = config(world_size, 3, **strategy)
    assert collectives(traffic(of, world_size)) == dry_run(of, world_size).collectives


def test_ddp_sends_each_gradient_once_whatever_the_accumulation() -> None:
    of = config(8, 4, name="ddp", bucket_mb=1)
    size = 4 * count_parameters(of.model)
    assert sum(t.payload_bytes for t in traffic(of, 8)) == size
    half = traffic(config(8, 4, name="ddp", compression="bf16"), 8)
    assert sum(t.payload_bytes for t in half) == size // 2
    thin = traffic(config(8, 4, name="ddp", compression="powersgd"), 8)
    assert sum(t.payload_bytes for t in thin) < size // 3


def test_units_hold_each_parameter_once() -> None:
    of = config(1, name="single").model
    units = unit_shapes(of)
    assert len(units) == of.num_layers + 1 and (509, 48) in units[-1]
    assert sum(math.prod(s) for unit in units for s in unit) == count_parameters(of)


def test_zero_stages() -> None:
    pytest.importorskip("deepspeed")
    parameters = count_parameters(config(4, name="single").model)

    def of(stage: int, **more: Any) -> dict[str, Collective]:
        found = traffic(config(4, 2, name="deepspeed", stage=stage, **more), 4)
        return {one.kind: one for one in collectives(found)}

    size = 4 * parameters
    assert {kind: one.payload_bytes for kind, one in of(0).items()} == {"all_reduce": size}
    one = of(1)
    assert (one["all_reduce"].payload_bytes, one["all_gather"].payload_bytes) == (size, size)
    # Stage 2 keeps no whole gradient between micro-batches: it reduces each.
    assert of(2)["all_reduce"].payload_bytes == 2 * size
    three = of(3, persistent_elements=0)
    assert three["reduce_scatter"].payload_bytes == 2 * size
    assert three["all_gather"].payload_bytes == 2 * 2 * size


def test_a_strategy_of_ones_own_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"there is no module|of your own"):
        traffic(config(2, name="mypkg.mine"), 2)


def test_single_sends_nothing() -> None:
    assert traffic(config(1, name="single"), 1) == []
