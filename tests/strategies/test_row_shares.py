"""Rows of parameters that one rank updates, and what the others get of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalellm.config import ModelConfig
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.parity import Task, build, train_steps
from scalellm.plan._fakes import fake_group
from scalellm.strategies._row_shares import RowShares

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=24
)
# Rows that do not divide, fewer rows than ranks, a vector, one number.
SHAPES = {"odd": (7, 3), "few": (2, 5), "vector": (9,), "one": (1,)}


def parameters(filled_with: float) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full(s, filled_with)) for name, s in SHAPES.items()}


def test_every_row_belongs_to_one_rank() -> None:
    named = parameters(0.0)
    for rank in range(4):
        shares = RowShares(named.items(), World(rank=rank, world_size=4), bucket_bytes=1)
        for name, share in shares.named():
            begins = shares.of(named[name])[1]
            assert len(begins) == share.dim() and not any(begins[1:])
            with torch.no_grad():
                share += rank + 1  # the same memory
    assert named["odd"][:, 0].tolist() == [1, 1, 2, 2, 3, 3, 4]
    assert named["few"][:, 0].tolist() == [1, 2]
    assert named["vector"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert named["one"].tolist() == [1]


@pytest.mark.parametrize("rank", [0, 8])
def test_more_ranks_than_rows_are_refused_on_all_of_them(rank: int) -> None:
    named = parameters(0.0)
    RowShares(named.items(), World(rank=0, world_size=9), bucket_bytes=1).check()
    with pytest.raises(ConfigError, match=r"the 9 rows .* last of 10 ranks; set it to false"):
        RowShares(named.items(), World(rank=rank, world_size=10), bucket_bytes=1).check()


def spread_in_buckets() -> list[dict[str, list[float]]]:
    found = []
    for bucket_bytes in (1, 1 << 20):
        named = parameters(0.0)
        named["frozen"] = nn.Parameter(torch.full((4,), 9.0), requires_grad=False)
        shares = RowShares(named.items(), detect(), bucket_bytes)
        with torch.no_grad():
            for name, share in shares.named():
                if name != "frozen":
                    share += detect().rank + 1
        shares.spread()
        found.append({name: p.detach().flatten().tolist() for name, p in named.items()})
    return found


def test_all_ranks_end_with_all_rows(
    ranks: Callable[..., list[list[dict[str, list[float]]]]],
) -> None:
    for one_by_one, at_once in ranks(spread_in_buckets, 4):
        assert one_by_one == at_once
        assert at_once["vector"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert at_once["odd"] == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 3
        assert at_once["few"] == [1] * 5 + [2] * 5
        assert at_once["frozen"] == [9] * 4


class Operations(TorchDispatchMode):
    """What torch was asked to do, but for what a process group does by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [64, 60])
def test_what_is_launched_does_not_grow_with_the_ranks(rows: int) -> None:
    """A launch for every parameter and rank would be 300,000 a step of 8B on 1,024 ranks."""
    launched = []
    for world_size in (8, 32):
        weight = nn.Parameter(torch.zeros(rows, 2))
        with fake_group(world_size):
            world = World(rank=0, world_size=world_size)
            shares = RowShares([("weight", weight)], world, bucket_bytes=1)
            with Operations() as seen:
                shares.spread()
        launched.append(seen.names.count("aten.copy_.default"))
    assert (
        2 <= min(launched) <= max(launched) <= 3
    )  # this rank's own, the full shares, what is left


def held() -> dict[str, int]:
    task = Task(MODEL, 2, "fp32", micro_batch=2)
    strategy = build(task, "ddp", {"shard_optimizer": True}, detect())
    list(train_steps(strategy, task, detect(), range(1, 3)))
    return strategy.memory()


def test_only_the_optimizer_is_divided(ranks: Callable[..., list[dict[str, int]]]) -> None:
    found = ranks(held, 2)
    whole_bytes = 4 * count_parameters(MODEL)
    assert all(m["parameters_bytes"] == m["gradients_bytes"] == whole_bytes for m in found)
    moments = sum(memory["optimizer_bytes"] for memory in found)
    assert 2 * whole_bytes <= moments < 2.02 * whole_bytes  # a counter for each parameter
    assert max(m["optimizer_bytes"] for m in found) < 1.05 * whole_bytes
