"""Gradients summed over a group, many at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as tdist
from torch import Tensor


@torch.no_grad()
def sum_gradients(
    gradients: Iterable[Tensor], group: tdist.ProcessGroup, bucket_bytes: int
) -> None:
    """Replaces each tensor by its sum over the group, in place.

    Args:
        gradients: the same ones, in the same order, on every rank of the group.
        bucket_bytes: about what is sent at once; one bucket travels while the next is filled.
    """
    waiting: list[tuple[tdist.Work, list[Tensor], Tensor]] = []
    for bucket in buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        waiting.append((_start(flat, group), bucket, flat))
        if len(waiting) > 1:
            _finish(*waiting.pop(0))
    for one in waiting:
        _finish(*one)


def _start(flat: Tensor, group: tdist.ProcessGroup) -> tdist.Work:
    work = tdist.all_reduce(flat, group=group, async_op=True)
    assert work is not None
    return work


def _finish(work: tdist.Work, bucket: list[Tensor], flat: Tensor) -> None:
    work.wait()
    parts = flat.split([gradient.numel() for gradient in bucket])
    for gradient, part in zip(bucket, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def buckets(gradients: Iterable[Tensor], bucket_bytes: int) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size_bytes = 0
    for gradient in gradients:
        if bucket and (size_bytes >= bucket_bytes or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(gradient)
        size_bytes += gradient.nbytes
    if bucket:
        yield bucket
