"""Named decoder shapes: plain data, so that a config may say `model.preset: gpt2-124m`.

Sources: GPT-2 (Radford et al. 2019), Llama 3 (Dubey et al. 2024, table 3), Llama 3.2 1B's model
card, and Vaswani et al. 2017 for `transformer-base` (its decoder).
"""

from __future__ import annotations

from typing import Any

_GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "bias": True,
    "tie_embeddings": True,
    "seq_len": 1024,
    "vocab_size": 50304,  # 50,257 rounded up to a multiple of 64 for the matrix units
}
_LLAMA3: dict[str, Any] = {
    "norm": "rmsnorm",
    "positions": "rope",
    "rope_theta": 500000.0,
    "mlp": "swiglu",
    "bias": False,
    "seq_len": 8192,
    "vocab_size": 128256,
    "num_kv_heads": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    "char-tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "seq_len": 128},
    "stdlib-small": {"num_layers": 3, "hidden_size": 192, "num_heads": 6, "seq_len": 128},
    "cpu-bench": {
        "num_layers": 6,
        "hidden_size": 384,
        "num_heads": 6,
        "seq_len": 256,
        "vocab_size": 8192,
    },
    "transformer-base": {
        "num_layers": 6,
        "hidden_size": 512,
        "num_heads": 8,
        "intermediate_size": 2048,
        "norm": "layernorm",
        "norm_position": "post",
        "positions": "sinusoidal",
        "mlp": "gelu",
        "bias": True,
        "dropout": 0.1,
        "seq_len": 512,
    },
    "gpt2-124m": {**_GPT2, "num_layers": 12, "hidden_size": 768, "num_heads": 12},
    "llama-1b": {
        **_LLAMA3,
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 32,
        "intermediate_size": 8192,
        "tie_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA3,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "intermediate_size": 14336,
        "tie_embeddings": False,
    },
}
