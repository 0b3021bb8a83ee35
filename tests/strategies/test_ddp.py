"""Gradient compression, near the loss without it and no more; what compiles under DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.transformed import transformed_curve

from scalellm import strategies
from scalellm.config import ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.parity import Curve, Task, run_curve, worst_difference

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=24
)


def curve_of(options: dict[str, Any]) -> Curve:
    task = Task(MODEL, 6, "fp32", micro_batch=2, learning_rate=3e-3)
    return run_curve(task, "ddp", options, detect())


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"compression": "bf16"}, 5e-3),
        ({"compression": "fp16"}, 5e-4),
        # All of a matrix's rank is kept: the averaging itself must be right.
        ({"compression": "powersgd", "powersgd_start_step": 2, "powersgd_rank": 64}, 1e-4),
    ],
)
def test_compressed_gradients_train_nearly_alike(
    ranks: Callable[..., list[Curve]], options: dict[str, Any], tolerance: float
) -> None:
    exact = ranks(curve_of, 2, {})[0]
    found = ranks(curve_of, 2, options)[0]
    assert found.losses == pytest.approx(exact.losses, rel=tolerance)
    assert found.losses != exact.losses or options["compression"] == "powersgd"


def test_little_of_the_rank_is_another_gradient(ranks: Callable[..., list[Curve]]) -> None:
    options = {"compression": "powersgd", "powersgd_start_step": 2, "powersgd_rank": 1}
    exact, found = ranks(curve_of, 2, {})[0], ranks(curve_of, 2, options)[0]
    assert found.losses[:3] == pytest.approx(exact.losses[:3], rel=1e-5)  # begins after step 2
    assert abs(found.losses[-1] - exact.losses[-1]) > 1e-3


def test_in_fp64_it_is_refused() -> None:
    config = StrategyConfig.model_validate({"name": "ddp", "compression": "bf16"})
    train = TrainConfig.model_validate({"precision": "fp64"})
    with pytest.raises(ConfigError, match=r"strategy\.compression=none or another precision"):
        strategies.parse_options(config, strategies.resolve("ddp"), World(), train)


@pytest.mark.parametrize("options", [{}, {"shard_optimizer": True}], ids=str)
@pytest.mark.parametrize(
    "train",
    [
        {"compile": True},
        {"compile": True, "compile_scope": "model"},
        {"compile": True, "compile_scope": "model", "activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_transforms_change_nothing(
    ranks: Callable[..., list[Curve]], train: dict[str, Any], options: dict[str, Any]
) -> None:
    wanted = run_curve(Task(MODEL, 3, "fp64"), "single", {}, World())
    for curve in ranks(transformed_curve, 2, MODEL, "ddp", options, train):
        assert worst_difference(curve, wanted) < 1e-11


@pytest.mark.parametrize("strategy", [{"name": "fsdp"}, {"name": "deepspeed", "stage": 3}], ids=str)
def test_one_graph_wants_whole_weights(strategy: dict[str, Any]) -> None:
    config = StrategyConfig.model_validate(strategy)
    train = TrainConfig.model_validate({"compile": True, "compile_scope": "model"})
    with pytest.raises(ConfigError, match=r"train\.compile_scope=parts, or strategy\.name=ddp"):
        strategies.parse_options(config, strategies.resolve(strategy["name"]), World(), train)
