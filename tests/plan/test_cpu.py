"""What a plan for a CPU adds to tensors."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm import process, strategies
from scalellm.config import parse_config
from scalellm.dist import World
from scalellm.plan import cpu
from scalellm.plan.memory import estimate
from scalellm.process import KEPT_BYTES, MAPPED_FROM_BYTES

MODEL = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "vocab_size": 512, "seq_len": 16}


@pytest.mark.parametrize(
    ("strategy", "maps"),
    [
        ({"name": "single"}, False),
        ({"name": "fsdp"}, False),
        ({"name": "accelerate"}, False),
        ({"name": "deepspeed", "stage": 1}, True),
        ({"name": "accelerate", "backend": "deepspeed", "stage": 1}, True),
    ],
)
def test_large_blocks_lie_outside_the_planned_heap_where_training_maps_them(
    monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any], maps: bool
) -> None:
    config = parse_config(
        {
            "data": {"path": "data"},
            "model": MODEL,
            "strategy": strategy,
            "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
        }
    )
    planned, trained = [], []

    def heap_bytes(events: object, mapped_from_bytes: int) -> int:
        planned.append(mapped_from_bytes)
        return 1 << 30

    monkeypatch.setattr(cpu, "heap_bytes", heap_bytes)
    monkeypatch.setattr(cpu, "_HOLES", {})
    assert cpu.beside_tensors(config, 1, estimate(config, 1, "cpu")) > 0
    monkeypatch.setattr(process, "map_large_blocks", lambda: trained.append(MAPPED_FROM_BYTES))
    strategy_class = strategies.resolve(config.strategy.name)
    world = World(launcher="a test")
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    strategy_class(world, config.train, options).load_libraries()
    assert planned == [MAPPED_FROM_BYTES if maps else KEPT_BYTES]
    assert bool(trained) == maps
