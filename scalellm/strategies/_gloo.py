"""FSDP's collectives over gloo without gloo's copies of whole tensors.

Gloo makes a copy of what it gathers, and another of what it reduces to parts. Its threads free them
while the rank places its next tensors, so a rank's heap grows by holes from step to step
(docs/log.md). A broadcast and a sum over all ranks work in the caller's own memory, and send as
much: gloo's own reduction to parts is a sum over all of which each rank keeps its part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

_PATIENCE_S = 0.1  # on a machine with more to do than cores


def avoid_copies(module: FSDPModule, group: tdist.ProcessGroup) -> None:
    """Has a unit of FSDP gather and reduce in place, where gloo does it."""
    unit: Any = module
    if tdist.get_backend(group) == "gloo" and hasattr(unit, "set_custom_reduce_scatter"):
        unit.set_custom_all_gather(_Gather())
        unit.set_custom_reduce_scatter(_ReduceToParts())


class _Allocating:
    """Where FSDP's own buffers lie: in torch's memory, as ever."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


@contextmanager
def _until_released(tensor: Tensor) -> Iterator[None]:
    """Returns when gloo's thread, a moment after it is done, has let go of the tensor's memory."""
    storage = tensor.untyped_storage()
    held = torch._C._storage_Use_Count(storage._cdata)
    yield
    until_s = time.monotonic() + _PATIENCE_S
    while torch._C._storage_Use_Count(storage._cdata) > held and time.monotonic() < until_s:
        time.sleep(0)


class _Gather(_Allocating):
    """Every rank sends its part into the others' outputs."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: tdist.ProcessGroup,
        async_op: bool = False,
    ) -> tdist.Work | None:
        parts = output_tensor.view(group.size(), -1)
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor.view(-1))
        with _until_released(output_tensor):
            works = [
                tdist.broadcast(part, group=group, group_src=rank, async_op=True)
                for rank, part in enumerate(parts)
            ]
            for work in works:
                work.wait()
            del works, work
        return None


class _ReduceToParts(_Allocating):
    """The input is FSDP's own and not looked at again: it holds the sum after it."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: tdist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> tdist.Work | None:
        with _until_released(input_tensor):
            tdist.all_reduce(input_tensor, op=op, group=group)
        output_tensor.copy_(
            input_tensor.view(group.size(), -1)[group.rank()].view_as(output_tensor)
        )
        return None
