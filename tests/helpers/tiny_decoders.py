"""Tiny decoders of every family, shared by the tests of the model and of generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scalellm.config import ModelConfig
from scalellm.model import Decoder

VOCAB = 11
TINY = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "vocab_size": VOCAB, "seq_len": 12}
LLAMA = {**TINY, "num_kv_heads": 2, "tie_embeddings": False, "rope_theta": 500.0}
GPT2 = {**TINY, "norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
VASWANI = {**GPT2, "positions": "sinusoidal", "norm_position": "post", "hidden_size": 20}
SHAPES = {"llama": LLAMA, "gpt2": GPT2, "vaswani": VASWANI, "odd": {**LLAMA, "head_dim": 6}}


def build(shape: dict[str, Any], seed: int = 0, **changes: Any) -> Decoder:
    """An fp64 decoder whose every parameter, norms and biases too, is away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(ModelConfig(**{**shape, **changes})).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def draw_tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))
