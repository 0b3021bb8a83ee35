"""Collectives that autograd knows, and the tokens of a row divided among the ranks of a group.

Shapes: B batch, T tokens of a row, t = T / ranks of them on this rank; further dimensions follow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor

# Their names since torch 2.13.
all_gather_flat = getattr(tdist, "all_gather_single", None) or tdist.all_gather_into_tensor
reduce_scatter_flat = getattr(tdist, "reduce_scatter_single", None) or tdist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Any, operation: str = "sum") -> Tensor:
    """Returns the sum, or the `max`, over the ranks of a group; `x` stays as it is."""
    result = x.clone(memory_format=torch.contiguous_format)
    op = tdist.ReduceOp.MAX if operation == "max" else tdist.ReduceOp.SUM
    tdist.all_reduce(result, op=op, group=group)
    return result


def gather_tokens(x_Bt: Tensor, group: Any) -> Tensor:
    """Puts the ranks' tokens one after the other, (B, t, ...) to (B, T, ...)."""
    part_tB = x_Bt.transpose(0, 1).contiguous()
    whole_TB = part_tB.new_empty(part_tB.shape[0] * tdist.get_world_size(group), *part_tB.shape[1:])
    all_gather_flat(whole_TB, part_tB, group=group)
    return whole_TB.transpose(0, 1)


def scatter_tokens(x_BT: Tensor, group: Any) -> Tensor:
    """Sums over the ranks and leaves each its tokens, (B, T, ...) to (B, t, ...)."""
    whole_TB = x_BT.transpose(0, 1).contiguous()
    part_tB = whole_TB.new_empty(
        whole_TB.shape[0] // tdist.get_world_size(group), *whole_TB.shape[1:]
    )
    reduce_scatter_flat(part_tB, whole_TB, group=group)
    return part_tB.transpose(0, 1)


class TokenGather(torch.autograd.Function):
    """Each rank's tokens become all ranks'; what each made of all is summed in the backward."""

    @staticmethod
    def forward(ctx: Any, x_Bt: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gather_tokens(x_Bt, group)

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        return scatter_tokens(grad_BT, ctx.group), None


class TokenScatter(torch.autograd.Function):
    """The opposite of `TokenGather`."""

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return scatter_tokens(x_BT, group)

    @staticmethod
    def backward(ctx: Any, grad_Bt: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grad_Bt, ctx.group), None


class TokenSplit(torch.autograd.Function):
    """Each rank keeps its tokens of what all have; the backward puts their gradients together."""

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, group: Any) -> Tensor:
        ctx.group = group
        each = x_BT.shape[1] // tdist.get_world_size(group)
        return x_BT.narrow(1, tdist.get_rank(group) * each, each).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_Bt: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grad_Bt, ctx.group), None
