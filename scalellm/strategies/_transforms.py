"""What is done to a decoder from outside, part by part, whatever the strategy.

Order matters: activation checkpointing first, then compile, then a strategy's own sharding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from scalellm.config import TrainConfig
from scalellm.errors import ConfigError

# After the blocks: RMSNorm and cross-entropy are many operators over large tensors.
_COMPILED_TOO = ("norm", "output")
_WRAPPER_NAMES = ("_checkpoint_wrapped_module", "_orig_mod", "module", "_fsdp_wrapped_module")

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
# Dear to compute again and small to keep: the rest of a block is element-wise.
_SAVED_OPS = _PRODUCTS | {
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def canonical_fqn(name: str) -> str:
    """The parameter's name in the bare model: wrappers' own path segments removed."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def apply_transforms(model: nn.Module, train: TrainConfig) -> None:
    """Checkpoints the blocks in `model.layers`, compiles them and what follows them, in place."""
    layers = model.get_submodule("layers")
    if train.activation_checkpointing != "none":
        for index, block in layers.named_children():
            layers.register_module(index, _checkpointed(block, train.activation_checkpointing))
    if train.compile and train.compile_scope == "model":
        model.compile()
    elif train.compile:
        rest = [part for name, part in model.named_children() if name in _COMPILED_TOO]
        for part in (*layers.children(), *rest):
            part.compile()


def refuse_one_graph(train: TrainConfig, strategy: str) -> None:
    """For strategies that gather the weights of a block just before it runs.

    Raises:
        ConfigError: the whole model is to be one graph.
    """
    if train.compile and train.compile_scope == "model":
        raise ConfigError(
            f"train.compile_scope=model makes one graph of all blocks, but {strategy} gathers "
            "their weights one after the other; use train.compile_scope=parts, or strategy.name=ddp"
        )


def _checkpointed(block: nn.Module, mode: str) -> nn.Module:
    kwargs: dict[str, Any] = {}
    if mode != "full":
        kwargs["context_fn"] = functools.partial(_contexts, mode)
    return checkpoint_wrapper(block, preserve_rng_state=True, **kwargs)


def _contexts(mode: str) -> Any:
    """Contexts of one forward and of its repetition; called anew for each forward of a block."""
    policy = _AlternatePolicy() if mode == "alternate" else _policy
    return create_selective_checkpoint_contexts(policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in _SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _AlternatePolicy:
    """Keeps what `_policy` keeps but every second product of a weight, as torchtitan does."""

    def __init__(self) -> None:
        self._products = {False: 0, True: 0}  # by whether it is the repetition

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            self._products[context.is_recompute] += 1
            if self._products[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return _policy(context, op)
