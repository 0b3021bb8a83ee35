"""A second decoder, in numpy and one row at a time, which must give the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny_decoders import SHAPES, build, draw_tokens

from scalellm.config import ModelConfig
from scalellm.model import Decoder


def np_norm(x: np.ndarray, config: ModelConfig, weights: dict, name: str) -> np.ndarray:
    if config.norm == "layernorm":
        x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + config.norm_eps)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def np_linear(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def np_head(q: np.ndarray, k: np.ndarray, v: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One head; rotary pairs are complex numbers x[i] + j x[i + D/2] times exp(j angle)."""
    T, D = q.shape
    if config.positions == "rope":
        angles = np.outer(np.arange(T), config.rope_theta ** (-2.0 * np.arange(D // 2) / D))
        turn = np.exp(1j * angles)
        q, k = ((x[:, : D // 2] + 1j * x[:, D // 2 :]) * turn for x in (q, k))
        scores = (q @ k.conj().T).real / math.sqrt(D)
    else:
        scores = q @ k.T / math.sqrt(D)
    odds = np.tril(np.exp(scores))
    return odds / odds.sum(1, keepdims=True) @ v


def np_attention(x: np.ndarray, config: ModelConfig, weights: dict, name: str) -> np.ndarray:
    q, k, v = (np_linear(x, weights, f"{name}.{letter}_proj") for letter in "qkv")
    D, heads = config.head_size, []
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.kv_heads)
        kv = slice(g * D, g * D + D)
        heads.append(np_head(q[:, h * D : h * D + D], k[:, kv], v[:, kv], config))
    return np_linear(np.concatenate(heads, 1), weights, f"{name}.o_proj")


def np_mlp(x: np.ndarray, config: ModelConfig, weights: dict, name: str) -> np.ndarray:
    up = np_linear(x, weights, f"{name}.up_proj")
    if config.mlp == "swiglu":
        gate = np_linear(x, weights, f"{name}.gate_proj")
        inner = up * gate / (1 + np.exp(-gate))
    else:
        inner = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return np_linear(inner, weights, f"{name}.down_proj")


def np_positions(T: int, config: ModelConfig, weights: dict) -> np.ndarray | float:
    if config.positions == "learned":
        return weights["embed_positions.weight"][:T]
    if config.positions == "rope":
        return 0.0
    C = config.hidden_size
    table = np.zeros((T, C))
    for pos in range(T):
        for i in range(0, C, 2):
            table[pos, i] = math.sin(pos / 10000 ** (i / C))
            table[pos, i + 1] = math.cos(pos / 10000 ** (i / C))
    return table


def np_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    config = model.config
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    scale = math.sqrt(config.hidden_size) if config.positions == "sinusoidal" else 1.0
    x = weights["embed_tokens.weight"][tokens] * scale + np_positions(len(tokens), config, weights)
    for n in range(config.num_layers):
        for norm, part, function in (
            ("input_layernorm", "self_attn", np_attention),
            ("post_attention_layernorm", "mlp", np_mlp),
        ):
            norm, part = f"layers.{n}.{norm}", f"layers.{n}.{part}"
            if config.norm_position == "pre":
                x = x + function(np_norm(x, config, weights, norm), config, weights, part)
            else:
                x = np_norm(x + function(x, config, weights, part), config, weights, norm)
    if config.norm_position == "pre":
        x = np_norm(x, config, weights, "norm")
    return x @ weights.get("lm_head.weight", weights["embed_tokens.weight"]).T


@pytest.mark.parametrize("family", SHAPES)
def test_logits_and_loss_match_numpy(family: str) -> None:
    model, tokens_BT = build(SHAPES[family]), draw_tokens(2, 9)
    targets_BT = draw_tokens(2, 9, seed=1)
    expected_BTV = np.stack([np_logits(model, row.numpy()) for row in tokens_BT])
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens_BT).numpy(), expected_BTV, rtol=0, atol=1e-11)
        loss = model(tokens_BT, targets_BT)
    log_sums_BT = np.log(np.exp(expected_BTV).sum(2))
    picked_BT = np.take_along_axis(expected_BTV, targets_BT.numpy()[..., None], 2)[..., 0]
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.item(), (log_sums_BT - picked_BT).sum(), rtol=1e-13)
