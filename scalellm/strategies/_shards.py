"""What a rank holds of a tensor that FSDP has divided."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shard_of(tensor: DTensor) -> tuple[Tensor, tuple[int, ...]]:
    """Returns this rank's part, and where it begins in the whole tensor."""
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), offsets
