"""What FSDP divides: a rank's part of a tensor, and the precisions of what it sends."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from scalellm.config import TrainConfig
from scalellm.errors import ConfigError
from scalellm.strategies.base import AUTOCAST

FloatWord = Literal["fp32", "bf16", "fp16"]
PARAM_DTYPE = (
    "shards are gathered, and the model computes, in this precision, and stay fp32; null: gathered "
    "as stored"
)
REDUCE_DTYPE = "precision of gradients on the way to shards; null: that of param_dtype's gradients"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(param: FloatWord | None, reduce: FloatWord | None) -> MixedPrecisionPolicy:
    """In what parameters are gathered and gradients sent; None: as stored, and as gathered."""
    return MixedPrecisionPolicy(
        param_dtype=_DTYPES.get(param or ""),
        reduce_dtype=_DTYPES.get(reduce or ""),
        # The blocks' rotation tables are fp32 on purpose: inputs are not cast.
        cast_forward_inputs=False,
    )


def autocast_beside(param: FloatWord | None, precision: str) -> torch.dtype | None:
    """See `Strategy.autocast_dtype`."""
    return None if param == precision else AUTOCAST.get(precision)


def refuse_precisions(
    param: FloatWord | None, reduce: FloatWord | None, train: TrainConfig
) -> None:
    """Raises ConfigError for precisions of shards that do not go with the model's."""
    precision = train.precision
    if precision == "fp64" and (param or reduce):
        raise ConfigError(
            "strategy.param_dtype and strategy.reduce_dtype lower the precision, which "
            "train.precision=fp64 forbids; leave them out"
        )
    halves = ("bf16", "fp16")
    if param in halves and precision in halves and param != precision:
        raise ConfigError(
            f"strategy.param_dtype={param} and train.precision={precision} are two kinds of half "
            f"precision; use strategy.param_dtype={precision}"
        )
    if param == "fp16" and precision != "fp16":
        raise ConfigError(
            "strategy.param_dtype=fp16 needs its losses scaled, which only train.precision=fp16 "
            "does; set that, or use strategy.param_dtype=bf16"
        )


def shard_of(tensor: DTensor) -> tuple[Tensor, tuple[int, ...]]:
    """Returns this rank's part, and where it begins in the whole tensor."""
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), offsets
