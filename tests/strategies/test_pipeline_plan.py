"""Pipelines before they run: what is refused, how layers are divided, how long ranks stand idle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from scalellm.config import ModelConfig, TrainConfig
from scalellm.errors import ConfigError
from scalellm.model import Decoder, flops_per_token
from scalellm.strategies._pipeline_cut import cut, named_parameters, share_embedding, split_layers
from scalellm.strategies._pipeline_schedule import (
    Action,
    bubble_formula,
    check_pipeline,
    order_of,
    owner_of,
    simulated_bubble,
    stages_of,
    stages_per_rank,
)

MODEL = {"num_layers": 6, "hidden_size": 32, "num_heads": 4, "vocab_size": 61, "seq_len": 16}


def check(
    schedule: str, ranks: int, micro_batches: int, *, train: Any = None, **model: Any
) -> None:
    config = ModelConfig.model_validate({**MODEL, **model})
    check_pipeline(schedule, ranks, micro_batches, config, TrainConfig.model_validate(train or {}))


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "changes", "message"),
    [
        (
            "1f1b",
            8,
            8,
            {},
            r"8 stages .*num_layers=6; use strategy\.mesh\.pp=6 or model\.num_layers=8$",
        ),
        (
            "zero_bubble",
            4,
            8,
            {},
            r"8 stages .*use strategy\.mesh\.pp=3 or strategy\.schedule=1f1b or",
        ),
        ("1f1b", 4, 3, {}, r"at least as many as the 4 ranks .* not 3 micro-batches .*use 4 \("),
        ("interleaved", 3, 7, {}, r"a multiple of the 3 .* not 7 micro-batches .*use 6 or 9 \("),
        ("interleaved", 3, 2, {}, r"use 3 \("),
        ("zero_bubble", 2, 4, {"train": {"compile": True}}, r"train\.compile=true .*use false"),
        ("zero_bubble", 2, 4, {"loss_chunk_tokens": 9}, r"model\.loss_chunk_tokens=9 .*use 0"),
        (
            "zero_bubble",
            2,
            4,
            {"train": {"activation_checkpointing": "full"}},
            r"activation_checkpointing=full .*use none",
        ),
        (
            "1f1b",
            2,
            4,
            {"train": {"compile": True, "compile_scope": "model"}},
            r"use train\.compile_scope=parts",
        ),
    ],
)
def test_what_is_refused(
    schedule: str, ranks: int, micro_batches: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(schedule, ranks, micro_batches, **changes)


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "train"),
    [
        ("gpipe", 6, 1, {"compile": True}),
        ("1f1b", 6, 6, {"activation_checkpointing": "selective"}),
        ("interleaved", 3, 6, {"compile": True}),
        ("zero_bubble", 3, 1, {}),
    ],
)
def test_what_is_not(schedule: str, ranks: int, micro_batches: int, train: Any) -> None:
    check(schedule, ranks, micro_batches, train=train)


def compositions(number: int, parts: int) -> list[list[int]]:
    """All ways to write a number as a sum of positive ones."""
    cuts = itertools.combinations(range(1, number), parts - 1)
    return [[b - a for a, b in itertools.pairwise([0, *inner, number])] for inner in cuts]


@pytest.mark.parametrize("vocab_size", [16, 500, 3000, 40_000])
def test_the_slowest_stage_is_as_fast_as_can_be(vocab_size: int) -> None:
    for num_stages, num_layers in itertools.combinations_with_replacement(range(1, 9), 2):
        values = {**MODEL, "num_layers": num_layers, "vocab_size": vocab_size}
        config = ModelConfig.model_validate(values)
        head = 6 * vocab_size * config.hidden_size
        layer = (flops_per_token(config) - head) // num_layers
        ranges = split_layers(config, num_stages)
        assert [index for one in ranges for index in one] == list(range(num_layers))
        [found, *others] = (
            max([size * layer for size in sizes[:-1]] + [sizes[-1] * layer + head])
            for sizes in [[len(one) for one in ranges], *compositions(num_layers, num_stages)]
        )
        assert all(ranges)
        assert found == min(others)


def test_a_large_head_or_short_rows_leave_the_last_stage_fewer_layers() -> None:
    def sizes(vocab_size: int, seq_len: int | None = None) -> list[int]:
        config = ModelConfig.model_validate({**MODEL, "num_layers": 8, "vocab_size": vocab_size})
        return [len(one) for one in split_layers(config, 2, seq_len)]

    assert sizes(2) == [4, 4]
    assert sizes(1500)[1] < 4
    assert sizes(1500, seq_len=4096) == [4, 4]
    assert sizes(10**6) == [7, 1]
    with pytest.raises(ValueError, match="8 layers cannot be divided into 9 stages"):
        split_layers(ModelConfig.model_validate({**MODEL, "num_layers": 8}), 9)


SHAPES = [
    (ranks, micro_batches) for ranks in (1, 2, 3, 4, 8) for micro_batches in (1, 2, 3, 4, 8, 16, 24)
]


@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 2)],
)
def test_the_formula_is_what_the_order_gives(schedule: str, per_rank: int) -> None:
    tried = 0
    for ranks, micro_batches in SHAPES:
        if schedule == "1f1b" and micro_batches < ranks:
            continue
        if schedule == "interleaved" and micro_batches % ranks:
            continue
        simulated = simulated_bubble(order_of(schedule, ranks, micro_batches, per_rank))
        formula = bubble_formula(schedule, ranks, micro_batches, per_rank)
        assert simulated == pytest.approx(formula, abs=1e-12), (ranks, micro_batches)
        tried += 1
    assert tried >= 12


def test_published_bubbles() -> None:
    """Narayanan et al. 2021, section 2.2, divided by the work alone: (p - 1) / m, and / (v m)."""
    for per_rank, schedule in ((1, "1f1b"), (4, "interleaved")):
        bubble = bubble_formula(schedule, 8, 64, per_rank)
        assert bubble / (1 - bubble) == pytest.approx(7 / 64 / per_rank)


def test_unequal_costs_leave_a_bubble_in_zero_bubble() -> None:
    order = order_of("zero_bubble", 4, 16, 2)
    equal = simulated_bubble(order)
    assert simulated_bubble(order, {"F": 1, "B": 3, "I": 2, "W": 1}) > 1.4 * equal


def test_an_order_that_never_ends() -> None:
    with pytest.raises(ValueError, match="never ends"):
        simulated_bubble([[Action("B", 0, 0), Action("F", 0, 0)]])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_every_stage_has_one_owner_who_does_all_of_it(schedule: str) -> None:
    ranks, micro_batches, per_rank = 4, 8, stages_per_rank(schedule)
    for rank, order in enumerate(order_of(schedule, ranks, micro_batches, per_rank)):
        mine = stages_of(schedule, rank, ranks, per_rank)
        assert mine == sorted(mine)
        assert {action.stage for action in order} == set(mine)
        assert all(owner_of(schedule, stage, ranks) == rank for stage in mine)
        kinds = "FIW" if schedule == "zero_bubble" else "FB"
        assert sorted(order) == sorted(
            Action(kind, stage, index)
            for kind in kinds
            for stage in mine
            for index in range(micro_batches)
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_parts_hold_every_parameter_once(tied: bool, positions: str) -> None:
    config = ModelConfig.model_validate(
        {**MODEL, "tie_embeddings": tied, "positions": positions, "norm": "layernorm", "bias": True}
    )
    with torch.device("meta"):
        whole = [Decoder(config) for _ in range(4)]
    names = [name for name, _ in whole[0].named_parameters()]
    layers = split_layers(config, 3)
    parts = [
        cut(whole[stage], layers[stage], is_first=stage == 0, is_last=stage == 2)
        for stage in range(3)
    ]
    held = [(name, counts) for part in parts for name, _, counts in named_parameters([part])]
    assert sorted(name for name, counts in held if counts) == sorted(names)
    assert [name for name, counts in held if not counts] == ["embed_tokens.weight"] * tied
    both = [name for name, _, counts in named_parameters([parts[0], parts[2]])]
    share_embedding([parts[0], parts[2]])
    shared = [name for name, _, counts in named_parameters([parts[0], parts[2]]) if counts]
    assert len(both) - len(shared) == tied
