"""DeepSpeed's engine on fake tensors holds what it holds on real ones, to the byte."""

from __future__ import annotations

import functools
import gc
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from scalellm import strategies
from scalellm.batches import Batch
from scalellm.config import Config, parse_config
from scalellm.dist import detect
from scalellm.errors import UserError
from scalellm.model import Decoder, count_parameters
from scalellm.plan._record import record
from scalellm.plan.dry_run import dry_run, summarize
from scalellm.plan.live import LiveBytes
from scalellm.plan.memory import estimate
from scalellm.strategies import deepspeed
from scalellm.strategies._norm import norm_of
from scalellm.train.optimizer import make_adamw

ROWS = 2
SHAPE = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 2053, "seq_len": 32}


def config(options: dict[str, Any], world_size: int, accumulation: int = 1, **train: Any) -> Config:
    """Buckets of 1 MiB are smaller than the model, and one parameter larger than they."""
    return parse_config(
        {
            "run": {"device": "cpu"},
            "model": SHAPE,
            "strategy": {"name": "deepspeed", "bucket_mb": 1, "cpu_adam": "torch", **options},
            "train": {
                "global_batch_size": ROWS * accumulation * world_size,
                "micro_batch_size": ROWS,
                **train,
            },
        }
    )


def cases(world_size: int) -> dict[str, Config]:
    """Each stage, in each precision, with and without accumulation and offloading."""
    bf16: dict[str, Any] = {"precision": "bf16"}
    away = {"offload_optimizer": "cpu"}
    small = {"stage": 3, "persistent_elements": 0, "offload_param": "cpu", **away}
    return {
        "0": config({"stage": 0}, world_size),
        "1": config({"stage": 1}, world_size),
        "1-bf16-twice": config({"stage": 1}, world_size, 2, **bf16),
        "2": config({"stage": 2}, world_size, activation_checkpointing="full"),
        "2-twice": config({"stage": 2}, world_size, 2),
        "2-bf16": config({"stage": 2}, world_size, **bf16),
        "2-offload": config({"stage": 2, **away}, world_size, 2),
        "3": config({"stage": 3}, world_size, activation_checkpointing="full"),
        "3-twice": config({"stage": 3}, world_size, 2),
        "3-bf16": config({"stage": 3}, world_size, **bf16),
        "3-offload": config(small, world_size, **bf16),
    }


def counted(names: list[str]) -> dict[str, tuple[int, int]]:
    """What this rank's engines hold at their peak, and between steps, in bytes."""
    deepspeed.norm_of = norm_seen  # type: ignore[attr-defined]
    all_of_them = cases(tdist.get_world_size())
    gc.disable()  # an engine is full of cycles, and when Python ends them by itself is chance
    return {name: count(all_of_them[name]) for name in names}


def norm_seen(tensors: Sequence[Tensor]) -> float:
    """Lets the log see the copies in fp64 that torch makes of half gradients in one operator."""
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            tensor.double()
    return norm_of(tensors)


def count(made: Config) -> tuple[int, int]:
    world, live = detect(), LiveBytes()
    strategy_class = strategies.resolve("deepspeed")
    options = strategies.parse_options(made.strategy, strategy_class, world, made.train)
    strategy = strategy_class(world, made.train, options)
    with torch.device("meta"):
        model = Decoder(made.model)
    times = made.batches(world.world_size).grad_accumulation
    with live:
        live.mark("setup")
        strategy.setup(model, functools.partial(make_adamw, train=made.train))
        gc.collect()
        for micro_batches in (1, times, times):
            take(strategy, made, micro_batches)
            gc.collect()
    start, [all_of_it] = live.segments("setup")
    strategy.close()
    peak_bytes = sum(start.values()) + sum(all_of_it.peak.values())
    return peak_bytes, sum(start.values()) + sum(all_of_it.change.values())


def take(strategy: strategies.Strategy, made: Config, micro_batches: int) -> None:
    for index in range(micro_batches):
        tokens = torch.zeros(ROWS, made.model.seq_len + 1, dtype=torch.long)
        with strategy.micro_step(index == micro_batches - 1):
            loss = strategy.forward(Batch(tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:]))
            strategy.backward(loss, 1)
    strategy.step(1e-3)


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ["1", "2-bf16", "3-twice"]),
        pytest.param(2, list(cases(2)), marks=pytest.mark.slow),
        pytest.param(1, list(cases(1)), marks=pytest.mark.slow),
    ],
)
def test_a_dry_engine_holds_what_a_real_one_does(
    ranks: Callable[..., list[Any]], world_size: int, names: list[str]
) -> None:
    found = ranks(counted, world_size, names)[0]
    wrong = {}
    for name in names:
        made = cases(world_size)[name]
        trace = record(made, world_size, "cpu")
        held = sum(trace.start.values()) + sum(sum(one.change.values()) for one in trace.segments)
        dry = summarize(trace)[0].peak_bytes, held
        if dry != pytest.approx(found[name], rel=1e-2):
            wrong[name] = (dry, found[name])
    assert not wrong


def test_other_ranks_change_no_more_than_their_part_of_the_buckets() -> None:
    """No real engine of 64 ranks is started here; its first holds a 64th of what is divided."""
    made = config({"stage": 2}, 64)
    memory, parameters = estimate(made, 64, "cpu"), count_parameters(made.model)
    assert memory.parameters_bytes == pytest.approx(4 * parameters, rel=1e-3)
    assert memory.optimizer_bytes == pytest.approx(12 * parameters / 64, rel=1e-3)


def test_accelerate_s_engine_is_deepspeed_s() -> None:
    ours = config({"stage": 2}, 2)
    theirs = config({"name": "accelerate", "backend": "deepspeed", "stage": 2}, 2)
    assert estimate(theirs, 2, "cpu") == estimate(ours, 2, "cpu")


def test_what_is_swapped_to_disk_is_added_up(tmp_path: Path) -> None:
    nvme = {"stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    made = config(nvme, 2)
    assert estimate(made, 2, "cpu").peak_bytes > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="writes to disk"):
        dry_run(made, 2, "cpu")


def test_an_engine_sends_what_it_reduces_and_gathers() -> None:
    made = config({"stage": 2}, 2)
    sent = {one.kind: one.payload_bytes for one in dry_run(made, 2, "cpu").collectives}
    whole_bytes = 4 * count_parameters(made.model)
    assert sent["all_gather"] == pytest.approx(whole_bytes, rel=1e-3)
    assert sent["all_reduce"] == pytest.approx(whole_bytes, rel=1e-3)


def test_nothing_is_left_behind_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: deepspeed.DeepSpeed, learning_rate: float) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(deepspeed.DeepSpeed, "step", fail)
    made = config({"stage": 3}, 2)
    coordinator: Any = importlib.import_module(
        "deepspeed.runtime.zero.partitioned_param_coordinator"
    )
    compared = coordinator.assert_ints_same_as_other_ranks
    linear = torch.nn.functional.linear
    with pytest.raises(RuntimeError, match="in the middle"):
        dry_run(made, 2, "cpu")
    assert coordinator.assert_ints_same_as_other_ranks is compared
    assert torch.nn.functional.linear is linear
    assert not tdist.is_initialized()
    assert not isinstance(torch.ones(1), FakeTensor)
    assert "DS_ACCELERATOR" not in os.environ
