"""ZeRO's first stage for parameters that every rank holds: only the update is divided.

Source: Rajbhandari et al. 2020, "ZeRO", section 5.1 (P_os). Parameters are divided by rows, not by
a flat range over all of them, so that a rank's part of each is a rectangle, as in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.strategies import _gloo
from scalellm.strategies._collectives import all_gather_flat

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class RowShares:
    """This rank's rows of every parameter, as parameters of their own over the same memory.

    Args:
        bucket_bytes: about what is sent at once, of one rank's share.
    """

    def __init__(self, named: NamedParameters, world: World, bucket_bytes: int) -> None:
        self._world, self._bucket_bytes = world, bucket_bytes
        self._all = list(named)
        self._shares = {
            parameter: nn.Parameter(self._rows(parameter, world.rank), parameter.requires_grad)
            for _, parameter in self._all
        }

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this rank's optimizer is to update; small parameters may have no row here."""
        for name, parameter in self._all:
            if self._shares[parameter].numel():
                yield name, self._shares[parameter]

    def check(self) -> None:
        """All ranks say the same: one that left alone would keep the others waiting.

        Raises:
            ConfigError: there are more ranks than rows, so that the last has nothing to update.
        """
        world_size = self._world.world_size
        shapes = [p.shape for _, p in self._all if p.requires_grad]
        if not any(self._begin(shape[0], world_size - 1) < shape[0] for shape in shapes):
            rows = max(shape[0] for shape in shapes)
            raise ConfigError(
                f"strategy.shard_optimizer=true divides rows, but the {rows:,} rows of the largest "
                f"parameter leave none to the last of {world_size:,} ranks; set it to false, or "
                "start fewer ranks"
            )

    def of(self, parameter: nn.Parameter) -> tuple[nn.Parameter, tuple[int, ...]]:
        """This rank's rows, and where they begin in the parameter."""
        start, _ = self._range(parameter, self._world.rank)
        return self._shares[parameter], (start,) + (0,) * (parameter.dim() - 1)

    def take_gradients(self) -> None:
        """Hands this rank's rows of the gradients to the shares, without a copy."""
        for parameter, share in self._shares.items():
            if parameter.grad is not None and share.numel():
                share.grad = self._rows(parameter.grad, self._world.rank)

    def drop_gradients(self) -> None:
        for share in self._shares.values():
            share.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """Every rank sends the rows it has updated to all others."""
        if self._world.world_size == 1:
            return
        for bucket in self._buckets():
            self._gather(bucket)

    def gathered_bytes(self) -> list[int]:
        """Bytes of all ranks' shares together, of each collective that `spread` makes."""
        return [
            self._world.world_size
            * sum(
                self._padded_elements(parameter) * parameter.element_size() for parameter in bucket
            )
            for bucket in self._buckets()
        ]

    def _gather(self, bucket: list[nn.Parameter]) -> None:
        rank, world_size = self._world.rank, self._world.world_size
        sizes = [self._padded_elements(parameter) for parameter in bucket]
        gathered = bucket[0].new_empty(world_size, sum(sizes))
        for parameter, part in zip(bucket, gathered[rank].split(sizes), strict=True):
            mine = self._shares[parameter].detach().flatten()
            part[: mine.numel()].copy_(mine)
        _gather_in_place(gathered, rank)
        for parameter, parts in zip(bucket, gathered.split(sizes, dim=1), strict=True):
            self._fill(parameter.detach(), parts)

    def _fill(self, whole: Tensor, parts: Tensor) -> None:
        """Writes all ranks' rows, one to a row of `parts`, in two copies however many there are."""
        each = -(-whole.shape[0] // self._world.world_size)
        full, rest = divmod(whole.shape[0], each)
        rows = whole[: full * each].unflatten(0, (full, each))
        rows.copy_(parts[:full].unflatten(1, rows.shape[1:]))
        if rest:
            last = whole[full * each :]
            last.copy_(parts[full, : last.numel()].view_as(last))

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        bucket: list[nn.Parameter] = []
        size_bytes = 0
        for _, parameter in self._all:
            if not parameter.requires_grad:
                continue
            bucket.append(parameter)
            size_bytes += self._padded_elements(parameter) * parameter.element_size()
            if size_bytes >= self._bucket_bytes:
                yield bucket
                bucket, size_bytes = [], 0
        if bucket:
            yield bucket

    def _padded_elements(self, parameter: nn.Parameter) -> int:
        rows, world_size = parameter.shape[0], self._world.world_size
        return -(-rows // world_size) * (parameter.numel() // rows)

    def _rows(self, tensor: Tensor, rank: int) -> Tensor:
        start, end = self._range(tensor, rank)
        return tensor.detach()[start:end]

    def _range(self, tensor: Tensor, rank: int) -> tuple[int, int]:
        """All ranks have as many rows, but for the last that have any."""
        rows = tensor.shape[0]
        return self._begin(rows, rank), self._begin(rows, rank + 1)

    def _begin(self, rows: int, rank: int) -> int:
        return min(rows, rank * -(-rows // self._world.world_size))


def _gather_in_place(gathered: Tensor, rank: int) -> None:
    """Completes what holds a row of each rank's, of which this rank has written its own."""
    group = tdist.group.WORLD
    assert group is not None
    if _gloo.uses_gloo(group):
        _gloo.Gather()(gathered.view(-1), gathered[rank], group)
    else:
        all_gather_flat(gathered.view(-1), gathered[rank])
