"""Hugging Face's Llama in the shape of the task, with the same initial weights as ours."""

from __future__ import annotations

from _worker import Task
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def make_llama(task: Task) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocab_size,
            hidden_size=task.hidden_size,
            intermediate_size=task.mlp_size,
            num_hidden_layers=task.num_layers,
            num_attention_heads=task.num_heads,
            max_position_embeddings=task.seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    weights: dict[str, Tensor] = {f"model.{name}": w for name, w in task.weights().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.train()
