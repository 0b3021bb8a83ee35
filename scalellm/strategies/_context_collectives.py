"""The collectives of context parallelism, with their gradients.

Shapes: N ranks of the group, B batch, T positions of the whole row, t = T / N of them here, C = 2 N
chunks of c = T / C positions, G key/value heads, h some heads, D features of a head; 2: keys and
values, or the two chunks of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor

from scalellm.dist import Group
from scalellm.strategies._collectives import all_gather_flat, reduce_scatter_flat


class GatherRows(torch.autograd.Function):
    """Keys and values (2, B, G, t, D) of this rank to those of whole rows, (2, B, G, T, D)."""

    @staticmethod
    def forward(ctx: Any, kv_2BGtD: Tensor, group: Group, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        # Chunks go first, so that the ranks' parts, one behind the other, are chunks again.
        sent_22BGcD = kv_2BGtD.unflatten(3, (2, -1)).movedim(3, 0).contiguous()
        gathered_C2BGcD = sent_22BGcD.new_empty(2 * size, *sent_22BGcD.shape[1:])
        all_gather_flat(gathered_C2BGcD, sent_22BGcD, group=group)
        order_C = torch.tensor(_places(size), device=kv_2BGtD.device).argsort()
        return gathered_C2BGcD.movedim(0, 3).index_select(3, order_C).flatten(3, 4)

    @staticmethod
    def backward(ctx: Any, grad_2BGTD: Tensor) -> tuple[Tensor, None, None]:
        places_C = torch.tensor(_places(ctx.size), device=grad_2BGTD.device)
        grad_C2BGcD = grad_2BGTD.unflatten(3, (2 * ctx.size, -1)).movedim(3, 0)
        sent_C2BGcD = grad_C2BGcD.index_select(0, places_C)
        summed_22BGcD = sent_C2BGcD.new_empty(2, *sent_C2BGcD.shape[1:])
        reduce_scatter_flat(summed_22BGcD, sent_C2BGcD.contiguous(), group=ctx.group)
        return summed_22BGcD.movedim(0, 3).flatten(3, 4), None, None


def _places(size: int) -> list[int]:
    """Returns the chunks of the row, in the order in which ranks hold them."""
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


class HeadsForPositions(torch.autograd.Function):
    """All heads of some positions, (B, N, h, t, D), to some heads of all, (B, h, T, D)."""

    @staticmethod
    def forward(ctx: Any, x_BNhtD: Tensor, group: Group, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _to_positions(x_BNhtD, group)

    @staticmethod
    def backward(ctx: Any, grad_BhTD: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(grad_BhTD, ctx.group, ctx.size), None, None


class PositionsForHeads(torch.autograd.Function):
    """The inverse of `HeadsForPositions`."""

    @staticmethod
    def forward(ctx: Any, x_BhTD: Tensor, group: Group, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _to_heads(x_BhTD, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BNhtD: Tensor) -> tuple[Tensor, None, None]:
        return _to_positions(grad_BNhtD, ctx.group), None, None


def _to_positions(x_BNhtD: Tensor, group: Group) -> Tensor:
    received_NBhtD = _all_to_all(x_BNhtD.movedim(1, 0), group)
    return received_NBhtD.movedim(0, 2).flatten(2, 3)


def _to_heads(x_BhTD: Tensor, group: Group, size: int) -> Tensor:
    x_NBhtD = x_BhTD.unflatten(2, (size, -1)).movedim(2, 0)
    return _all_to_all(x_NBhtD, group).movedim(0, 1)


def _all_to_all(x_N: Tensor, group: Group) -> Tensor:
    """Sends the i-th part to rank i; returns what they sent, in the order of ranks."""
    sent_N = x_N.contiguous()
    received_N = torch.empty_like(sent_N)
    tdist.all_to_all_single(received_N, sent_N, group=group)
    return received_N
