"""Pipelines: a decoder cut into stages trains as the whole one does, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.pipelines import Outcome, trained_in_pipeline, trained_whole

Ranks = Callable[..., list[Outcome]]


def worst(found: list[Outcome], wanted: Outcome, shards: int = 1) -> dict[str, float]:
    """Largest relative differences; the ranks of a pipeline have each their part of everything."""
    apart = {"loss": 0.0, "row_losses": 0.0, "gradients": 0.0, "evaluated": 0.0}
    for step, gradients in enumerate(wanted.gradients):
        for name, gradient in gradients.items():
            [*mine] = [o.gradients[step][name] for o in found if name in o.gradients[step]]
            assert len(mine) == shards, name
            for one in mine:
                difference = float((one - gradient).norm() / gradient.norm())
                apart["gradients"] = max(apart["gradients"], difference)
        for copied in [o.copies[step] for o in found if o.copies]:
            difference = copied - gradients["embed_tokens.weight"]
            apart["gradients"] = max(apart["gradients"], float(difference.norm()))
        ranks = [[o for i, o in enumerate(found) if i % shards == shard] for shard in range(shards)]
        sums = [
            torch.tensor([o.losses[step] for o in group], dtype=torch.float64).sum(0)
            for group in ranks
        ]
        difference = torch.cat(sums) - torch.tensor(wanted.losses[step], dtype=torch.float64)
        apart["loss"] = max(apart["loss"], float(difference.abs().max()))
        rows = torch.cat([row for group in ranks for o in group for row in o.row_losses[step]])
        difference = rows - torch.cat(wanted.row_losses[step])
        apart["row_losses"] = max(apart["row_losses"], float(difference.abs().max()))
    evaluated = sum(o.evaluated for o in found) / shards
    apart["evaluated"] = abs(evaluated - wanted.evaluated) / wanted.evaluated
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
