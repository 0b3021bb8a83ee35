"""What no strategy may get wrong: unused and frozen parameters, non-finite steps, precision."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalellm.batches import Batch
from scalellm.config import ModelConfig
from scalellm.dist import detect
from scalellm.model import Decoder
from scalellm.parity import TOLERANCE, VARIANTS, Curve, Task, build, train_steps, worst_difference
from scalellm.strategies import Strategy

MODEL = ModelConfig(
    num_layers=2, hidden_size=24, num_heads=4, num_kv_heads=2, vocab_size=31, seq_len=12
)
STEPS = 5


def options_of(label: str) -> dict[str, Any]:
    """DeepSpeedCPUAdam takes a minute to compile: the fast tests let torch's AdamW update."""
    options = VARIANTS[label].options
    return {**options, "cpu_adam": "torch"} if "offload_optimizer" in options else options


# Every variant that divides or replicates over two ranks.
LABELS = [label for label, variant in VARIANTS.items() if 2 in variant.worlds]
# They run a decoder's parts one by one, and pass over a forward of its own.
CUT = {
    label
    for label, variant in VARIANTS.items()
    if {"pp", "cp"} & {*variant.options.get("mesh", ())}
}
# Near relatives of others in the list: their engines take seconds to build.
SLOW = {
    "deepspeed-0",
    "deepspeed-3-offload",
    "fsdp-no-reshard",
    "accelerate-deepspeed",
    "tp-whole-rows",
}
PRECISE = [
    pytest.param(
        label, VARIANTS[label].precision, marks=[pytest.mark.slow] if label in SLOW else []
    )
    for label in LABELS
    if label not in CUT
]


class Odd(Decoder):
    """Has a parameter in a block and one outside of them that some forwards leave out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers[0].extra = nn.Parameter(torch.ones(7, 3))
        self.outer = nn.Parameter(torch.ones(5))
        self.uses_extra = True
        self.layers[0].register_forward_hook(self._use_in_block)

    def _use_in_block(self, block: nn.Module, inputs: Any, x_BTC: Tensor) -> Tensor:
        return x_BTC + block.extra.square().mean() if self.uses_extra else x_BTC

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().forward(*arguments, **keywords)
        return loss + 3 * self.outer.square().sum() if self.uses_extra else loss


def odd_curve(label: str, precision: str, kind: str) -> Curve:
    task = Task(MODEL, STEPS, precision, micro_batch=2)
    with torch.device("meta"):
        model = Odd(MODEL)
    if kind == "frozen":
        model.layers[0].extra.requires_grad_(False)
        model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        model.norm.weight.requires_grad_(False)
    world = detect()
    strategy = build(task, VARIANTS[label].name, options_of(label), world, model)
    curve = Curve()
    steps = train_steps(strategy, task, world, range(STEPS))
    for step in range(STEPS):
        model.uses_extra = kind == "frozen" or step % 2 == 0
        loss, grad_norm, gradients = next(steps)
        curve.losses.append(loss)
        curve.grad_norms.append(grad_norm)
        curve.gradients = curve.gradients or gradients
    strategy.close()
    return curve


def uneven_curve(label: str, precision: str) -> Curve:
    """In odd steps the first half of the batch uses the odd parameters, the second does not.

    With two ranks that is rank 0 and not rank 1, with one the first micro-batch and not the second.
    """
    task = Task(MODEL, STEPS, precision, micro_batch=4)
    with torch.device("meta"):
        model = Odd(MODEL)
    world = detect()
    strategy = build(task, VARIANTS[label].name, options_of(label), world, model)
    forward, calls = strategy.forward, iter(range(1000))

    def forward_of_half(batch: Batch) -> Tensor:
        step, half = divmod(next(calls) * world.world_size + world.rank, 2)
        model.uses_extra = step % 2 == 0 or half == 0
        return forward(batch)

    vars(strategy)["forward"] = forward_of_half
    return curve_of(strategy, task)


def curve_of(strategy: Strategy, task: Task) -> Curve:
    curve = Curve()
    for loss, grad_norm, gradients in train_steps(strategy, task, detect(), range(STEPS)):
        curve.losses.append(loss)
        curve.grad_norms.append(grad_norm)
        curve.gradients = curve.gradients or gradients
    strategy.close()
    return curve


@pytest.mark.parametrize("label", ["ddp", "fsdp", "hsdp"])
def test_a_parameter_used_on_one_rank_only(ranks: Callable[..., list[Curve]], label: str) -> None:
    precision = VARIANTS[label].precision
    wanted = uneven_curve("single", precision)
    for curve in ranks(uneven_curve, 2, label, precision):
        assert worst_difference(curve, wanted) < TOLERANCE[precision]


@functools.cache
def odd_reference(precision: str, kind: str) -> Curve:
    return odd_curve("single", precision, kind)


@pytest.mark.parametrize("kind", ["unused", "frozen"])
@pytest.mark.parametrize(("label", "precision"), PRECISE)
def test_a_parameter_unused_now_and_then_or_frozen(
    ranks: Callable[..., list[Curve]], label: str, precision: str, kind: str
) -> None:
    for curve in ranks(odd_curve, 2, label, precision, kind):
        assert worst_difference(curve, odd_reference(precision, kind)) < TOLERANCE[precision]


def chunked_curve(label: str, precision: str, is_tied: bool, chunk_tokens: int) -> Curve:
    model = MODEL.model_copy(update={"tie_embeddings": is_tied, "loss_chunk_tokens": chunk_tokens})
    task = Task(model, STEPS, precision, micro_batch=2)
    world = detect()
    return curve_of(build(task, VARIANTS[label].name, options_of(label), world), task)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("label", ["ddp", "fsdp", "deepspeed-2", "deepspeed-3"])
def test_the_chunked_loss(ranks: Callable[..., list[Curve]], label: str, is_tied: bool) -> None:
    """Takes the projection's weight, which ZeRO-3 and FSDP gather, without its module's product."""
    precision = VARIANTS[label].precision
    wanted = chunked_curve("single", precision, is_tied, 0)
    for curve in ranks(chunked_curve, 2, label, precision, is_tied, 7):
        assert worst_difference(curve, wanted) < TOLERANCE[precision]


def poisoned_steps(label: str, precision: str) -> list[tuple[float, bool, float]]:
    """(gradient norm, skipped, loss after) of steps of which rank 1's second has a NaN."""
    task = Task(MODEL, STEPS, precision)
    world = detect()
    strategy = build(task, VARIANTS[label].name, options_of(label), world)
    tokens = torch.arange(4 * 13).reshape(4, 13) * 5 % 31
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    found = []
    for step in range(4):
        with strategy.micro_step(is_last=True):
            loss = strategy.forward(batch)
            poison = math.nan if step == 1 and world.rank == 1 else 1.0
            strategy.backward(loss * poison, 48 * world.world_size)
        result = strategy.step(1e-2)
        with torch.no_grad():
            found.append((result.grad_norm, result.skipped, float(strategy.forward(batch))))
    strategy.close()
    return found


@pytest.mark.parametrize(
    ("label", "precision"),
    [*PRECISE, ("deepspeed-2", "bf16"), ("deepspeed-3", "bf16"), ("fsdp", "bf16")],
)
def test_a_nan_on_one_rank_changes_no_weight_of_any(
    ranks: Callable[..., list[Any]], label: str, precision: str
) -> None:
    for rows in ranks(poisoned_steps, 2, label, precision):
        assert [skipped for _, skipped, _ in rows] == [False, True, False, False]
        assert not math.isfinite(rows[1][0])
        losses = [loss for _, _, loss in rows]
        assert losses[1] == losses[0]  # the poisoned step changed nothing
        assert losses[0] > losses[2] > losses[3]
