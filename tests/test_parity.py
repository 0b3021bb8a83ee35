"""The same loss: every strategy, world size and accumulation split against one process.

fp64 shows the algorithm (below 1e-11); fp32 shows what a user sees (below 1e-5). Raw gradients are
compared too: Adam hides a constant factor in them, and the loss curve alone would not show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from scalellm.config import ModelConfig
from scalellm.dist import detect
from scalellm.parity import TOLERANCE, Curve, Task, run_curve, worst_difference

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=24
)
STEPS = 8


def curve_of(name: str, options: dict[str, Any], micro_batch: int, precision: str) -> Curve:
    """Trains as this process's rank and returns what the loop would log."""
    task = Task(MODEL, STEPS, precision, micro_batch=micro_batch)
    return run_curve(task, name, options, detect())


@functools.cache
def reference(precision: str) -> Curve:
    return curve_of("single", {}, 8, precision)


def test_the_reference_learns_and_clips() -> None:
    """Otherwise the comparisons below would compare nothing."""
    curve = reference("fp64")
    assert curve.losses[-1] < 0.8 * curve.losses[0]
    assert max(curve.grad_norms) > 0.3


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_changes_nothing(micro_batch: int, precision: str) -> None:
    found = curve_of("single", {}, micro_batch, precision)
    assert worst_difference(found, reference(precision)) < TOLERANCE[precision]


CELLS = [
    ("ddp", {}, 1, 8),
    ("ddp", {}, 1, 2),
    ("ddp", {}, 2, 4),
    ("ddp", {}, 2, 1),
    ("ddp", {}, 4, 2),
    ("ddp", {}, 4, 1),
    ("ddp", {"bucket_mb": 1, "find_unused_parameters": False}, 2, 2),
    ("ddp", {"shard_optimizer": True}, 1, 4),
    ("ddp", {"shard_optimizer": True}, 2, 2),
    ("ddp", {"shard_optimizer": True, "bucket_mb": 1}, 4, 1),
    ("fsdp", {}, 1, 4),
    ("fsdp", {}, 2, 2),
    ("fsdp", {}, 4, 1),
    ("fsdp", {"reshard_after_forward": False, "reduce_every_micro_batch": False}, 2, 2),
    ("fsdp", {"reshard_after_forward": False}, 4, 1),
    ("fsdp", {"cpu_offload": True}, 2, 2),
    ("fsdp", {"shard_ranks": 2}, 4, 1),
    ("fsdp", {"shard_ranks": 1}, 2, 4),
    ("helpers.mypkg.mystrategy", {}, 2, 2),  # a user's own module
]
# DeepSpeed and Accelerate train in fp32; their engines are slow to build, so only some cells.
ENGINE_CELLS = [
    ("deepspeed", {"stage": 0}, 2, 2),
    ("deepspeed", {"stage": 1}, 2, 2),
    ("deepspeed", {"stage": 2}, 1, 4),
    ("deepspeed", {"stage": 2}, 2, 2),
    ("deepspeed", {"stage": 2, "offload_optimizer": "cpu", "cpu_adam": "torch"}, 2, 2),
    ("deepspeed", {"stage": 3, "persistent_elements": 0}, 2, 2),
    ("deepspeed", {"stage": 3}, 2, 4),
    (
        "deepspeed",
        {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu", "cpu_adam": "torch"},
        2,
        2,
    ),
    ("accelerate", {}, 1, 4),
    ("accelerate", {}, 2, 2),
    ("accelerate", {"backend": "deepspeed", "stage": 2}, 2, 2),
]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(("name", "options", "world_size", "micro_batch"), CELLS)
def test_strategy_matches_one_process(
    ranks: Callable[..., list[Curve]],
    name: str,
    options: dict[str, Any],
    world_size: int,
    micro_batch: int,
    precision: str,
) -> None:
    curves = ranks(curve_of, world_size, name, options, micro_batch, precision)
    for curve in curves:  # every rank logs the same and holds the same gradients
        assert worst_difference(curve, reference(precision)) < TOLERANCE[precision]


@pytest.mark.parametrize(("name", "options", "world_size", "micro_batch"), ENGINE_CELLS)
def test_engine_matches_one_process(
    ranks: Callable[..., list[Curve]],
    name: str,
    options: dict[str, Any],
    world_size: int,
    micro_batch: int,
) -> None:
    for curve in ranks(curve_of, world_size, name, options, micro_batch, "fp32"):
        assert worst_difference(curve, reference("fp32")) < TOLERANCE["fp32"]


def test_the_comparison_would_see_a_wrong_factor() -> None:
    wrong = Curve(**vars(reference("fp64")))
    wrong.gradients = {name: 2 * value for name, value in wrong.gradients.items()}
    assert worst_difference(wrong, reference("fp64")) > 0.5
