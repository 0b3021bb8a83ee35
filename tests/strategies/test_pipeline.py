"""Pipelines: a decoder cut into stages trains as the whole one does, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pipelines import Outcome, trained_in_pipeline, trained_whole

Ranks = Callable[..., list[Outcome]]


def worst(found: list[Outcome], wanted: Outcome, shards: int = 1) -> dict[str, float]:
    """Largest relative differences; the ranks of a pipeline have each their part of everything.

    Some gradients are zero but for rounding (keys' biases), so small ones are not divided by.
    """
    apart = {"evaluated": abs(sum(o.evaluated for o in found) / shards / wanted.evaluated - 1)}
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
        pairs += [("losses", torch.cat(losses), wanted.losses[step])]
        pairs += [("row_losses", torch.cat(rows), torch.cat(wanted.row_losses[step]))]
        for kind, one, other in pairs:
            difference = float((one - other).norm() / other.norm().clamp(min=1e-6))
            apart[kind] = max(apart.get(kind, 0.0), difference)
        held = [name for ranks in pipelines for o in ranks for name in o.gradients[step]]
        assert sorted(held) == sorted([*gradients] * shards)
    return apart


@pytest.mark.parametrize(
    ("schedule", "world", "shards", "shape", "lengths", "count"),
    [
        ("gpipe", 2, 1, {}, [16, 16], 3),
        ("1f1b", 2, 1, {"positions": "learned"}, [16, 12, 12], 4),
        ("1f1b", 4, 1, {"tie_embeddings": False}, [16, 16], 4),
        ("interleaved", 2, 1, {}, [16, 12], 4),
        ("zero_bubble", 2, 1, {}, [16, 12], 4),
        ("1f1b", 4, 2, {}, [16, 16], 4),
        ("interleaved", 4, 2, {}, [16, 16], 4),
        ("zero_bubble", 4, 2, {}, [16, 16], 4),
    ],
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
    apart = worst(found, wanted, shards)
    print(apart)
    assert max(apart.values()) < 1e-11, apart
