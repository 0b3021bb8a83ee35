"""Counts from the configuration against the modules themselves and against a FLOP counter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scalellm.config import PRESETS, ModelConfig
from scalellm.errors import ConfigError
from scalellm.model import Decoder, count_parameters, flops_per_token

SMALL = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "vocab_size": 50, "seq_len": 16}
CHOICES: dict[str, tuple[object, ...]] = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post"),
    "positions": ("rope", "learned", "sinusoidal"),
    "mlp": ("swiglu", "gelu"),
    "bias": (False, True),
    "tie_embeddings": (False, True),
}


def on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_count_as_built(preset: str) -> None:
    config = ModelConfig(preset=preset)
    config = config.model_copy(update={"vocab_size": config.vocab_size or 97})
    model = on_meta(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    body = [
        p
        for name, p in model.named_parameters()
        if "embed" not in name and name != "lm_head.weight"
    ]
    assert count_parameters(config, embeddings=False) == sum(p.numel() for p in body)


@pytest.mark.parametrize("values", list(itertools.product(*CHOICES.values())))
def test_every_choice_counts_as_built(values: tuple[object, ...]) -> None:
    choice = dict(zip(CHOICES, values, strict=True))
    config = ModelConfig(**SMALL, num_kv_heads=2, head_dim=8, **choice)
    built = sum(p.numel() for p in on_meta(config).parameters())
    assert count_parameters(config) == built


@pytest.mark.parametrize(
    ("preset", "vocab_size", "published"),
    [
        ("gpt2-124m", 50257, 124_439_808),
        ("llama-1b", 128256, 1_235_814_400),
        ("llama-8b", 128256, 8_030_261_248),
    ],
)
def test_published_sizes(preset: str, vocab_size: int, published: int) -> None:
    assert count_parameters(ModelConfig(preset=preset, vocab_size=vocab_size)) == published


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_flops_are_those_a_counter_sees(mlp: str, tie_embeddings: bool) -> None:
    config = ModelConfig(
        **SMALL, num_kv_heads=2, mlp=mlp, tie_embeddings=tie_embeddings, attention="explicit"
    )
    tokens_BT = torch.zeros(3, 16, dtype=torch.long)
    model = Decoder(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, tokens_BT).backward()
    assert counter.get_total_flops() == flops_per_token(config) * tokens_BT.numel()


def test_flops_grow_with_the_row() -> None:
    config = ModelConfig(preset="gpt2-124m")
    added = flops_per_token(config, 2048) - flops_per_token(config, 1024)
    assert added == 12 * 12 * 768 * 1024
    assert flops_per_token(config) == flops_per_token(config, 1024)


def test_unknown_vocabulary_is_refused() -> None:
    config = ModelConfig()
    for count in (count_parameters, flops_per_token):
        with pytest.raises(ConfigError, match=r"model\.vocab_size is null"):
            count(config)
