"""Accelerate: what it silently becomes is compared with what was asked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest

from scalellm import strategies
from scalellm.config import ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.parity import Task, build

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=31, seq_len=8)


def parsed(**options: Any) -> strategies.Options:
    config = StrategyConfig.model_validate({"name": "accelerate", **options})
    strategy = strategies.resolve("accelerate")
    return strategies.parse_options(config, strategy, World(world_size=2), TrainConfig())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "fsdp"}, "silently becomes DDP on a CPU .* use strategy.name=fsdp"),
        ({"backend": "tpu"}, "strategy.backend"),
        ({"stage": 2}, "strategy.stage is an option of strategy.backend=deepspeed, but .*=ddp"),
        ({"backend": "deepspeed", "stage": 2, "offload_param": "cpu"}, "does nothing at"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(**options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'scalellm\[accelerate\]'"):
        parsed()


def became(backend: str) -> str:
    """Somebody else in this process has made Accelerate's state, in which every rank is alone."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    world = detect()
    PartialState(cpu=False)
    options = {"backend": backend, **({"stage": 1} if backend == "deepspeed" else {})}
    try:
        build(Task(MODEL, 1, "fp32"), "accelerate", options, world)
    except ConfigError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return "nothing was noticed"


@pytest.mark.parametrize("backend", ["ddp", "deepspeed"])
def test_training_alone_is_noticed(ranks: Callable[..., list[str]], backend: str) -> None:
    for sentence in ranks(became, 2, backend):
        assert sentence.startswith("Accelerate became "), sentence
        assert "training would not be what the config says" in sentence


def test_a_closed_one_leaves_no_wishes_in_the_environment(ranks: Callable[..., list[Any]]) -> None:
    """Accelerate says to itself by environment variables what the next run must not hear."""
    assert ranks(environment_after, 2) == [[], []]


def environment_after() -> list[str]:
    options = {"backend": "deepspeed", "stage": 1}
    build(Task(MODEL, 1, "fp32"), "accelerate", options, detect()).close()
    return [name for name in os.environ if name.startswith("ACCELERATE_")]


def test_asked_and_found_agree(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(distributed_type, 2) == ["MULTI_CPU", "MULTI_CPU"]


def distributed_type() -> str:
    strategy = build(Task(MODEL, 1, "fp32"), "accelerate", {}, detect())
    found = vars(strategy)["accelerator"].distributed_type.value
    strategy.close()
    return found
