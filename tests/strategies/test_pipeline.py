"""Pipelines: a decoder cut into stages trains as the whole one does, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as tdist
from helpers.pipelines import (
    SHAPE,
    Outcome,
    batches_of,
    decoder,
    forward,
    make_parts,
    trained_in_pipeline,
    trained_whole,
)

from scalellm.config import ModelConfig
from scalellm.strategies._pipeline import Pipeline
from scalellm.strategies._pipeline_schedule import order_of, stages_per_rank

Ranks = Callable[..., list[Outcome]]


def worst(found: list[Outcome], wanted: Outcome, shards: int = 1) -> dict[str, float]:
    """Largest relative differences; the ranks of a pipeline have each their part of everything.

    Some gradients are zero but for rounding (keys' biases), so small ones are not divided by.
    """
    apart: dict[str, float] = {}
    pipelines = [found[shard::shards] for shard in range(shards)]
    for step, gradients in enumerate(wanted.gradients):
        pairs = [
            ("gradients", o.gradients[step][name], gradients[name])
            for o in found
            for name in o.gradients[step]
        ]
        pairs += [
            ("copies", o.copies[step], gradients["embed_tokens.weight"]) for o in found if o.copies
        ]
        losses = [torch.stack([o.losses[step] for o in ranks]).sum(0) for ranks in pipelines]
        rows = [row for ranks in pipelines for o in ranks for row in o.row_losses[step]]
        evaluated = sum((o.evaluated[step] for o in found), start=torch.tensor(0.0)) / shards
        pairs += [("evaluated", evaluated, wanted.evaluated[step])]
        pairs += [("losses", torch.cat(losses), wanted.losses[step])]
        pairs += [("row_losses", torch.cat(rows), torch.cat(wanted.row_losses[step]))]
        for kind, one, other in pairs:
            difference = float((one - other).norm() / other.norm().clamp(min=1e-6))
            apart[kind] = max(apart.get(kind, 0.0), difference)
        held = [name for ranks in pipelines for o in ranks for name in o.gradients[step]]
        assert sorted(held) == sorted([*gradients] * shards)
    return apart


GPT2 = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
VASWANI = {**GPT2, "positions": "sinusoidal", "norm_position": "post", "tie_embeddings": False}
DEEP = {"num_layers": 8, "hidden_size": 16, "vocab_size": 33}


@pytest.mark.parametrize(
    ("schedule", "world", "shards", "shape", "lengths", "count"),
    [
        ("gpipe", 2, 1, VASWANI, [16, 12], 3),
        ("1f1b", 1, 1, {}, [16], 2),
        ("1f1b", 2, 1, GPT2, [16, 12, 12], 4),
        ("1f1b", 4, 1, {"loss_chunk_tokens": 8}, [16, 16], 4),
        ("interleaved", 2, 1, {}, [16, 12], 4),
        ("interleaved", 4, 1, DEEP, [16, 16], 4),
        ("zero_bubble", 2, 1, GPT2, [16, 12], 4),
        ("zero_bubble", 4, 1, DEEP, [16, 16], 5),
        ("1f1b", 4, 2, {}, [16, 12], 4),
        ("interleaved", 4, 2, {}, [16, 16], 4),
        ("zero_bubble", 4, 2, {}, [16, 16], 4),
    ],
    ids=str,
)
def test_training_as_the_whole_does(
    ranks: Ranks,
    schedule: str,
    world: int,
    shards: int,
    shape: dict[str, Any],
    lengths: list[int],
    count: int,
) -> None:
    wanted = trained_whole(shape, lengths, count, shards)
    found = ranks(trained_in_pipeline, world, schedule, shape, lengths, count, shards)
    assert max(worst(found, wanted, shards).values()) < 1e-11
    size = world // shards
    orders = order_of(schedule, size, count, stages_per_rank(schedule))
    for rank, outcome in enumerate(found):
        assert outcome.orders == [orders[rank // shards]] * len(lengths)
        assert all(0 < bubble < 1 for bubble in outcome.bubbles)


@pytest.mark.parametrize(
    ("schedule", "train"),
    [
        pytest.param("1f1b", {"compile": True}, marks=pytest.mark.slow),
        ("interleaved", {"activation_checkpointing": "alternate"}),
        ("1f1b", {"activation_checkpointing": "full"}),
    ],
    ids=str,
)
def test_transforms_change_nothing(ranks: Ranks, schedule: str, train: dict[str, Any]) -> None:
    shape = {"num_layers": 2 * stages_per_rank(schedule)}
    wanted = trained_whole(shape, [16], 2)
    found = ranks(trained_in_pipeline, 2, schedule, shape, [16], 2, 1, train)
    assert max(worst(found, wanted).values()) < 1e-11


def half_precision(told: torch.dtype | None) -> list[float]:
    """Loss sums under autocast, of a pipeline that is told what its activations are."""
    config = ModelConfig.model_validate(SHAPE)
    rank = tdist.get_rank()
    parts = make_parts(config, "1f1b", rank, 2, 1, {})
    for _, part in parts:
        part.float()
    pipeline = Pipeline(
        parts, 2, tdist.group.WORLD, torch.device("cpu"), "1f1b",
        activation_dtype=told, autocast_dtype=torch.bfloat16,
    )  # fmt: skip
    batches = batches_of(0, config, 2)
    losses = [float(loss) for loss in pipeline.run(batches, 1.0)]
    assert all(p.grad is not None for _, part in parts for p in part.parameters())
    return [*losses, float(pipeline.evaluate(batches[0]))]


def test_autocast_is_near_and_not_the_same(ranks: Callable[..., list[list[float]]]) -> None:
    config = ModelConfig.model_validate(SHAPE)
    model = decoder(config)
    exact = [float(forward(model, batch).detach()) for batch in batches_of(0, config, 2)]
    nowhere, found = ranks(half_precision, 2, None)
    assert nowhere == [0.0, 0.0, 0.0]
    assert found[:2] == pytest.approx(exact, rel=1e-2)
    assert found[:2] != pytest.approx(exact, rel=1e-6)
    assert found[2] == found[0]


def test_an_activation_of_another_type_is_noticed(ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(AssertionError, match="tell Pipeline the activation_dtype"):
        ranks(half_precision, 2, torch.bfloat16)


def test_a_mistake_in_a_stage_is_told_as_itself(ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(AssertionError, match=r"\nscalellm.errors.UserError: 17 tokens are more"):
        ranks(trained_in_pipeline, 2, "interleaved", GPT2, [17], 2)


def test_micro_batches_of_one_step_have_one_shape() -> None:
    config = ModelConfig.model_validate(SHAPE)
    group = cast(Any, SimpleNamespace(size=lambda: 2))
    parts = make_parts(config, "1f1b", 0, 2, 1, {})
    pipeline = Pipeline(parts, 2, group, torch.device("cpu"), "1f1b")
    batches = [*batches_of(0, config, 2), *batches_of(0, config, 1, seq_len=12)]
    with pytest.raises(ValueError, match="must have one shape"):
        pipeline.run(batches, 1.0)
