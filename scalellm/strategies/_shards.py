"""What FSDP divides: a rank's part of a tensor, and the precisions of what it sends."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

FloatWord = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(param: FloatWord | None, reduce: FloatWord | None) -> MixedPrecisionPolicy:
    """In what parameters are gathered and gradients sent; None: as stored, and as gathered."""
    return MixedPrecisionPolicy(
        param_dtype=_DTYPES.get(param or ""),
        reduce_dtype=_DTYPES.get(reduce or ""),
        # The blocks' rotation tables are fp32 on purpose: inputs are not cast.
        cast_forward_inputs=False,
    )


def shard_of(tensor: DTensor) -> tuple[Tensor, tuple[int, ...]]:
    """Returns this rank's part, and where it begins in the whole tensor."""
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), offsets
