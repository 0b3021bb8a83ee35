"""Collectives over gloo without its copies, and FSDP's beside what the ranks compute.

Torch's FSDP puts its collectives on a GPU's streams, of which a CPU has none: every rank then
stands still for every collective of every unit, until the slowest rank has come. Here each rank
sends its parts to the others from where they lie, straight into where they belong, and computes on:
a unit is gathered while the one before it runs, and reduced while the next gradients are made.
(Only what FSDP takes up at once is waited for: gradients that are added to others, cast, or summed
over replicas.)

Gloo itself would copy what it gathers, and what it reduces to parts, in threads that free the
copies while the rank places its next tensors, so that its heap grows from step to step
(docs/log.md). What is sent is the least there is: what a rank does not have of a gather, and what
it does not keep of a reduction. A sum is taken in the order of the ranks.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

Kind = Literal["all_gather", "reduce_scatter"]


def uses_gloo(group: tdist.ProcessGroup) -> bool:
    return tdist.get_backend(group) == "gloo"


def compute_beside(
    units: Sequence[nn.Module], mesh: DeviceMesh, *, gathers_ahead: bool = True
) -> Reductions:
    """Has FSDP's units, in the order in which they run, communicate beside what is computed.

    Where gloo does not carry them, nothing changes. With `gathers_ahead` each unit is gathered
    during the forward of the one before it. The mesh is FSDP's, its last dimension named "shard".
    """
    group = mesh.get_group("shard")
    any_units: list[Any] = list(units)
    is_known = hasattr(any_units[0], "set_custom_reduce_scatter")  # torch 2.9
    reductions = Reductions(are_sums=is_known and uses_gloo(group) and group.size() > 1)
    if not reductions.are_sums:
        return reductions
    for unit in any_units:
        # What FSDP casts, or sums over replicas, it takes up at once.
        waiting_dtype = next(unit.parameters()).dtype if mesh.ndim == 1 else None
        unit.set_custom_all_gather(Gather())
        unit.set_custom_reduce_scatter(_ReduceToParts(reductions, waiting_dtype))
        # Summed as they are: divided afterwards they would have to be complete.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit._set_unshard_async_op(True)
    for unit, following in zip(any_units, any_units[1:] if gathers_ahead else (), strict=False):
        unit.set_modules_to_forward_prefetch([following])
    return reductions


class Reductions:
    """Those that are under way. Where they are not sums FSDP divides them by the ranks."""

    def __init__(self, *, are_sums: bool) -> None:
        self.are_sums = are_sums
        self._may_wait = False
        self._reduced: set[object] = set()
        self._under_way: list[Callable[[], None]] = []

    @contextmanager
    def beside_backward(self, optimizer: Optimizer) -> Iterator[None]:
        """Lets those of a backward go on beside it; at the end they are complete.

        No hook may read a gradient before. Where there are gradients already, to which FSDP adds
        the new ones at once, each is completed at once.
        """
        # What a backward that failed began: dropped, its messages would block those that follow.
        self._finish()
        self._reduced.clear()
        # The optimizer's are the shards, also where the module's are gathered at the moment.
        shards = (shard for group in optimizer.param_groups for shard in group["params"])
        self._may_wait = all(shard.grad is None for shard in shards)
        try:
            yield
            self._finish()
        finally:
            self._may_wait = False

    def add(self, unit: object, finish: Callable[[], None], *, may_wait: bool) -> None:
        """Takes a unit's, which has begun, and completes the one before: it holds as much.

        That of a unit which runs twice is added to its first one at once.
        """
        is_first = unit not in self._reduced
        self._reduced.add(unit)
        self._finish()
        self._under_way.append(finish)
        if not (may_wait and is_first and self._may_wait):
            self._finish()

    def _finish(self) -> None:
        while self._under_way:
            self._under_way.pop()()


class _Allocating:
    """Where FSDP's own buffers lie: in torch's memory, as ever."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Allocating):
    """Every rank sends its part, which is in its place already, into the others' outputs."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: tdist.ProcessGroup,
        async_op: bool = False,
    ) -> tdist.Work | None:
        parts, others = output_tensor.view(group.size(), -1), _others(group)
        sent = dict.fromkeys(others, input_tensor.view(-1))
        received = {rank: parts[rank] for rank in others}
        work = _Together(exchange("all_gather", output_tensor, sent, received, group))
        if async_op:
            return work
        work.wait()
        return None


class _ReduceToParts(_Allocating):
    """Every rank sends the others their parts of its input, and sums what it gets of its own."""

    def __init__(self, reductions: Reductions, waiting_dtype: torch.dtype | None = None) -> None:
        self._reductions, self._waiting_dtype = reductions, waiting_dtype

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: tdist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> tdist.Work | None:
        if op != tdist.ReduceOp.SUM:
            raise ValueError(f"reduces by sums alone, not by {op}")
        parts = list(input_tensor.view(group.size(), -1))
        others = _others(group)
        received = {rank: torch.empty_like(parts[rank]) for rank in others}
        works = exchange(
            "reduce_scatter", input_tensor, {rank: parts[rank] for rank in others}, received, group
        )
        summands = [received.get(rank, part) for rank, part in enumerate(parts)]
        output = output_tensor.view(-1)

        def finish() -> None:
            for work in works:
                work.wait()
            torch.add(summands[0], summands[1], out=output)
            for summand in summands[2:]:
                output.add_(summand)

        self._reductions.add(self, finish, may_wait=output.dtype == self._waiting_dtype)
        return None


def exchange(
    kind: Kind,
    whole: Tensor,
    sent: dict[int, Tensor],
    received: dict[int, Tensor],
    group: tdist.ProcessGroup,
) -> list[tdist.Work]:
    """Begins to send and receive, by rank of the group, parts of `whole`; returns what to wait for.

    Nothing may touch them until that is done.
    """
    del kind, whole  # a dry run notes them
    works = [tdist.irecv(part, group=group, group_src=rank) for rank, part in received.items()]
    works += [tdist.isend(part, group=group, group_dst=rank) for rank, part in sent.items()]
    return [work for work in works if work is not None]


def _others(group: tdist.ProcessGroup) -> list[int]:
    """The other ranks, beginning with the next: not all send to the same one at first."""
    size, own = group.size(), group.rank()
    return [(own + distance) % size for distance in range(1, size)]


def done() -> tdist.Work:
    """What is waited for where there is nothing to do."""
    return _Together([])


class _Together(tdist.Work):
    """Done when all of them are."""

    def __init__(self, works: list[tdist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        del timeout  # the group's own
        while self._works:
            self._works.pop().wait()
        return True
