"""Parameters and floating-point operations of a decoder, from its configuration alone."""

from __future__ import annotations

from scalellm.config import ModelConfig
from scalellm.errors import ConfigError


def count_parameters(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Returns how many numbers the decoder learns; a tied matrix counts once.

    Args:
        embeddings: False leaves out the token and position embeddings and the output projection,
            tied or not: the N of Kaplan et al. 2020, section 2.1.

    Raises:
        ConfigError: `config.vocab_size` is not known yet.
    """
    features, width = config.hidden_size, config.mlp_size
    norm = features * (2 if config.norm == "layernorm" and config.bias else 1)
    q_size, kv_size = config.num_heads * config.head_size, config.kv_heads * config.head_size
    biases = q_size + 2 * kv_size + features + features + width * _mlp_inputs(config)
    block = _block_matrices(config) + 2 * norm + (biases if config.bias else 0)
    total = config.num_layers * block + (norm if config.norm_position == "pre" else 0)
    if embeddings:
        tables = 1 if config.tie_embeddings else 2
        total += tables * _vocab_size(config) * features
        total += config.seq_len * features if config.positions == "learned" else 0
    return total


def flops_per_token(config: ModelConfig, seq_len: int | None = None) -> int:
    """Returns the operations of one token's forward and backward, a multiply-add being two.

    6 N + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B): N are the weights that multiply
    activations, the output projection among them (tied or not) but neither the embedding look-up
    nor norms and biases; L layers, H query heads of D features, T = `seq_len`. Each query counts
    all T keys, as PaLM and nanoGPT count, so MFU compares with theirs; a causal kernel may skip
    half of that. What activation checkpointing computes twice counts once.

    Args:
        seq_len: tokens of a row; None: the configured `seq_len`.

    Raises:
        ConfigError: `config.vocab_size` is not known yet.
    """
    num_tokens = config.seq_len if seq_len is None else seq_len
    weights = config.num_layers * _block_matrices(config)
    weights += _vocab_size(config) * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_size * num_tokens
    return 6 * weights + 12 * attention


def _block_matrices(config: ModelConfig) -> int:
    attention_size = 2 * (config.num_heads + config.kv_heads) * config.head_size
    mlp_size = (_mlp_inputs(config) + 1) * config.mlp_size
    return config.hidden_size * (attention_size + mlp_size)


def _mlp_inputs(config: ModelConfig) -> int:
    return 2 if config.mlp == "swiglu" else 1


def _vocab_size(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size is null: set it, in tokens, before counting")
    return config.vocab_size
