"""The same loss: every strategy, world size and accumulation split against one process.

fp64 shows the algorithm (below 1e-11); fp32 shows what a user sees (below 1e-5). Raw gradients are
compared too: Adam hides a constant factor in them, and the loss curve alone would not show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from scalellm import strategies
from scalellm.batches import Batch
from scalellm.config import BatchPlan, ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, detect, sum_over_ranks
from scalellm.model import Decoder
from scalellm.train.optimizer import make_adamw

GLOBAL_BATCH, SEQ_LEN, STEPS = 8, 24, 8
TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5}
MODEL = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=SEQ_LEN
)


@dataclass
class Curve:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that can be learned (each follows from the last), with ragged padding in the targets:
    ranks then hold different numbers of tokens, which only the global count divides rightly."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 61, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + 7 * torch.arange(SEQ_LEN + 1)) % 61
    targets = tokens[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        targets[row, SEQ_LEN - 2 * row :] = -100
    return tokens[:, :-1], targets


def run_curve(name: str, options: dict[str, Any], micro_batch: int, precision: str) -> Curve:
    """Trains `STEPS` steps as this process's rank and returns what the loop would log."""
    world = detect()
    train = TrainConfig.model_validate(
        {"steps": STEPS, "precision": precision, "learning_rate": 1e-2, "grad_clip": 0.3}
    )
    strategy_class = strategies.resolve(name)
    parsed = strategies.parse_options(
        StrategyConfig.model_validate({"name": name, **options}), strategy_class, world
    )
    strategy = strategy_class(world, train, parsed)
    torch.manual_seed(0)
    strategy.setup(Decoder(MODEL), functools.partial(make_adamw, train=train))
    plan = BatchPlan.of(GLOBAL_BATCH, micro_batch, world.world_size)
    curve = Curve()
    for step in range(STEPS):
        _one_step(strategy, plan, world, step, curve)
    strategy.close()
    return curve


def _one_step(
    strategy: strategies.Strategy, plan: BatchPlan, world: World, step: int, curve: Curve
) -> None:
    tokens, targets = global_batch(step)
    num_tokens = int((targets != -100).sum())
    rows = plan.micro_batch_size * plan.grad_accumulation
    loss_sum = 0.0
    for index in range(plan.grad_accumulation):
        start = world.rank * rows + index * plan.micro_batch_size
        part = slice(start, start + plan.micro_batch_size)
        with strategy.micro_step(index == plan.grad_accumulation - 1):
            loss = strategy.forward(Batch(tokens[part], targets[part]))
            strategy.backward(loss, num_tokens)
        loss_sum += float(loss.detach())
    if step == 0:
        curve.gradients = strategy.full_gradients()
    curve.grad_norms.append(strategy.step(1e-2).grad_norm)
    curve.losses.append(sum_over_ranks([loss_sum])[0] / num_tokens)


@functools.cache
def reference(precision: str) -> Curve:
    return run_curve("single", {}, GLOBAL_BATCH, precision)


def worst_difference(found: Curve, wanted: Curve) -> float:
    """Largest relative difference over losses, gradient norms and raw gradients."""
    pairs = [
        *zip(found.losses, wanted.losses, strict=True),
        *zip(found.grad_norms, wanted.grad_norms, strict=True),
    ]
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        distance = (found.gradients[name] - gradient).norm() / gradient.norm()
        differences.append(float(distance))
    return max(differences)


def test_the_reference_learns_and_clips() -> None:
    """Otherwise the comparisons below would compare nothing."""
    curve = reference("fp64")
    assert curve.losses[-1] < 0.8 * curve.losses[0]
    assert max(curve.grad_norms) > 0.3


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_changes_nothing(micro_batch: int, precision: str) -> None:
    found = run_curve("single", {}, micro_batch, precision)
    assert worst_difference(found, reference(precision)) < TOLERANCE[precision]


CELLS = [
    ("ddp", {}, 1, 8),
    ("ddp", {}, 1, 2),
    ("ddp", {}, 2, 4),
    ("ddp", {}, 2, 1),
    ("ddp", {}, 4, 2),
    ("ddp", {}, 4, 1),
    ("ddp", {"bucket_mb": 1, "find_unused_parameters": True}, 2, 2),
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
    curves = ranks(run_curve, world_size, name, options, micro_batch, precision)
    for curve in curves:  # every rank logs the same and holds the same gradients
        assert worst_difference(curve, reference(precision)) < TOLERANCE[precision]


def test_the_comparison_would_see_a_wrong_factor() -> None:
    wrong = Curve(**vars(reference("fp64")))
    wrong.gradients = {name: 2 * value for name, value in wrong.gradients.items()}
    assert worst_difference(wrong, reference("fp64")) > 0.5
