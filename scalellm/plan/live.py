"""Counts the bytes of tensors that are alive, operation by operation.

A dispatch mode sees every operation and so every new tensor; what counts is its storage, once,
until the storage is freed. It works the same on fake tensors, which have sizes and no memory.
What a kernel allocates for itself and frees again inside one operation is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalellm.plan._packed import Packing
from scalellm.plan.allocator import GLOO, LIBRARY, UNTOUCHED, Event
from scalellm.plan.types import CollectiveKind

Kind = Literal["parameters", "optimizer", "gradients", "buffers", "activations", "temporary"]
# Where two fit, the earlier one counts: a reduced gradient has been in a collective too.
KINDS: tuple[Kind, ...] = (
    "parameters",
    "optimizer",
    "gradients",
    "buffers",
    "activations",
    "temporary",
)
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
_COLLECTIVES: dict[str, CollectiveKind] = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "send": "send",
    "recv": "receive",
}


@dataclass(frozen=True)
class Traffic:
    """One collective; `payload_bytes` of the full tensor."""

    kind: CollectiveKind
    payload_bytes: int


@dataclass(frozen=True)
class _Change:
    number: int
    change_bytes: int


@dataclass(frozen=True)
class _Kept:
    size_bytes: int


@dataclass(frozen=True)
class Segment:
    """What happened from one mark to the next, in bytes by kind relative to its start.

    `peak` is the moment at which the counted kinds were most, `change` how it ended.
    """

    label: str
    peak: Mapping[Kind, int]
    change: Mapping[Kind, int]
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class _Sum:
    """The last operation, if the engine added two gradients: from where on it is in the log, the
    address of the result's storage, and the numbers of what was added."""

    begin: int = 0
    address: int = 0
    of: frozenset[int] = frozenset()


class LiveBytes(TorchDispatchMode):
    """A log of what is allocated and freed, in bytes; inside `FakeTensorMode`, enter it last.

    Args:
        gloo: also what gloo, the library between CPUs, would take for a collective and give back.
        packing: what a CPU's library of matrix products takes and keeps. It is no tensor's: only
            `events` has it.
    """

    def __init__(self, *, gloo: bool = False, packing: Packing | None = None) -> None:
        super().__init__()
        self._gloo = gloo
        self._packing = packing
        self._log: list[_Change | _Kept | Traffic | str] = []
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # a storage's address, while it lives, to its number
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._kinds: dict[int, Kind] = {}
        self._last_number = 0
        self._streams: dict[int, str] = {}  # of what is not the computing's
        self._added = _Sum()

    # -- what is seen -----------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        begin = len(self._log)
        self.add(result)
        self._added = _Sum()
        if func is torch.ops.aten.add.Tensor and _is_called_by_engine():
            of = frozenset(self._number_of(tensor) for tensor in _with_memory(args))
            self._added = _Sum(begin, local_of(result).untyped_storage()._cdata, of)
        if self._packing and func.overloadpacket in _PRODUCTS:
            left, right = args[-2:]
            rows, inner = left.shape[-2:]
            taken_bytes = self._packing.multiply(rows, inner, right.shape[-1])
            self._log += [_Kept(taken_bytes)] if taken_bytes else []
        name = func._schema.name
        if "c10d" in name.partition("::")[0]:
            self._add_collective(name.partition("::")[2], (args, kwargs, result))
        return result

    def add(self, tensors: Any) -> None:
        """Begins to count the storages of tensors, in any nesting."""
        for tensor in _with_memory(tensors):
            self._number_of(tensor)

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Sees what FSDP frees and allocates again by changing the size of a storage."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size_bytes: int) -> Any:
            result = original(storage, size_bytes)
            number = self._numbers.get(storage._cdata)
            if number is not None:
                self.set_kind("buffers", number)
                self._change(number, size_bytes - self._sizes[number])
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _number_of(self, tensor: Tensor) -> int:
        storage = local_of(tensor).untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            self._last_number += 1
            number = self._numbers[address] = self._last_number
            self._sizes[number] = 0
            self._change(number, storage.nbytes())
            self._watches[address] = weakref.ref(storage, lambda _: self._freed(address))
        return self._numbers[address]

    def _freed(self, address: int) -> None:
        number = self._numbers.pop(address)
        del self._watches[address]
        if number in self._added.of and self._becomes_the_sum(number):
            return
        self._change(number, -self._sizes[number])

    def _becomes_the_sum(self, number: int) -> bool:
        """Whether a gradient that was added to another is where the sum lies.

        The engine of autograd adds in place what it alone holds, but not while it is watched as
        here (torch/csrc/autograd/input_buffer.cpp, `accumulate`). Then it lets go of it at once.
        """
        total, self._added = self._added, _Sum()
        new = self._numbers.get(total.address)
        if new is None or self._sizes[new] != self._sizes[number]:
            return False
        self._log[total.begin :] = [
            entry for entry in self._log[total.begin :] if getattr(entry, "number", None) != new
        ]
        self._numbers[total.address] = number
        return True

    def _change(self, number: int, change_bytes: int) -> None:
        self._sizes[number] += change_bytes
        if change_bytes:
            self._log.append(_Change(number, change_bytes))

    def _add_collective(self, name: str, values: Any) -> None:
        kind = next((kind for word, kind in _COLLECTIVES.items() if word in name), None)
        if kind is None:
            return
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        sizes = [local_of(tensor).nbytes for tensor in tensors]
        whole_bytes = max(sizes)  # the full tensor is the largest
        for tensor, size_bytes in zip(tensors, sizes, strict=True):
            number = self._number_of(tensor)
            self.set_kind("buffers", number)
            if kind == "all_gather" or (kind == "reduce_scatter" and size_bytes < whole_bytes):
                self._streams[number] = kind
        self._log.append(Traffic(kind, whole_bytes))
        if self._gloo and kind in ("all_gather", "reduce_scatter"):
            self._pass_through_gloo(kind, whole_bytes)

    def _pass_through_gloo(self, kind: CollectiveKind, whole_bytes: int) -> None:
        """What gloo makes of a collective's own size and gives up before the next operation.

        A reduced part is cut from a copy of the whole. A gather makes a flat tensor and never
        writes to it, and one of its threads another one, into which it gathers. (Seen at malloc
        under torch 2.13; a sum takes 2 MiB at most.)
        """
        for stream in (UNTOUCHED, GLOO) if kind == "all_gather" else ("compute",):
            self._last_number += 1
            number = self._last_number
            self._sizes[number] = 0
            self.set_kind("buffers", number)
            if stream != "compute":
                self._streams[number] = stream
            for change_bytes in (whole_bytes, -whole_bytes):
                self._change(number, change_bytes)

    # -- what is said -----------------------------------------------------------------------

    def set_kind(self, kind: Kind, number: int) -> None:
        known = self._kinds.get(number, "temporary")
        if KINDS.index(kind) < KINDS.index(known):
            self._kinds[number] = kind

    def call(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are, from their creation on."""
        for tensor in tensors:
            self.set_kind(kind, self._number_of(tensor))

    def call_rest(self, kind: Kind) -> None:
        """Says what everything alive is that has no name yet."""
        for number in self._numbers.values():
            self.set_kind(kind, number)

    def mark(self, label: str) -> None:
        """Begins a segment of this name."""
        self._log.append(label)

    def count_collective(self, kind: CollectiveKind, payload_bytes: int) -> None:
        """Adds a collective that no operation showed."""
        self._log.append(Traffic(kind, payload_bytes))

    # -- what came of it --------------------------------------------------------------------

    def segments(
        self, since: str, uncounted: frozenset[Kind] = frozenset()
    ) -> tuple[dict[Kind, int], list[Segment]]:
        """Returns the bytes by kind at the last mark `since`, and the segments from there on.

        `uncounted` kinds lie elsewhere and have no part in what a peak is.
        """
        begin = len(self._log) - 1 - self._log[::-1].index(since)
        level = self._sum(self._log[:begin])
        bounds = [i for i, entry in enumerate(self._log) if isinstance(entry, str) and i >= begin]
        parts = zip(bounds, [*bounds[1:], len(self._log)], strict=True)
        return dict(level), [self._segment(start, stop, uncounted) for start, stop in parts]

    def events(self) -> list[Event]:
        """Returns all allocations and frees from the beginning, for `allocator.reserved_bytes`."""
        sizes: dict[int, int] = {}
        found = []
        for index, entry in enumerate(self._log):
            if isinstance(entry, _Kept):
                found.append(Event(-index, entry.size_bytes, LIBRARY))
            if not isinstance(entry, _Change):
                continue
            stream = self._streams.get(entry.number, "compute")
            old_bytes = sizes.get(entry.number, 0)
            sizes[entry.number] = new_bytes = old_bytes + entry.change_bytes
            for size_bytes in (-old_bytes, new_bytes):
                if size_bytes:
                    found.append(Event(entry.number, size_bytes, stream))
        return found

    def _sum(self, entries: Iterable[object]) -> Counter[Kind]:
        level: Counter[Kind] = Counter()
        for entry in entries:
            if isinstance(entry, _Change):
                level[self._kinds.get(entry.number, "temporary")] += entry.change_bytes
        return level

    def _segment(self, start: int, stop: int, uncounted: frozenset[Kind]) -> Segment:
        level: Counter[Kind] = Counter()
        peak: dict[Kind, int] = {}
        counted_bytes = highest_bytes = 0
        for entry in self._log[start:stop]:
            if isinstance(entry, _Change):
                kind = self._kinds.get(entry.number, "temporary")
                level[kind] += entry.change_bytes
                counted_bytes += 0 if kind in uncounted else entry.change_bytes
                if counted_bytes > highest_bytes:
                    highest_bytes, peak = counted_bytes, dict(level)
        traffic = [entry for entry in self._log[start:stop] if isinstance(entry, Traffic)]
        label = cast(str, self._log[start])
        return Segment(label, peak, dict(level), tuple(traffic))


def _with_memory(values: Any) -> list[Tensor]:
    """The tensors in any nesting; one on "meta" has a size and no memory, even beside fake ones."""
    found = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [tensor for tensor in found if tensor.device.type != "meta"]


def _is_called_by_engine() -> bool:
    """Whether no Python of anyone's stands between the engine of autograd and a dispatch mode."""
    frame: FrameType | None = sys._getframe(1).f_back
    while frame and frame.f_globals["__name__"] in ("torch._compile", "torch._dynamo.eval_frame"):
        frame = frame.f_back
    engine = torch.autograd.graph._engine_run_backward.__code__
    return frame is not None and frame.f_code is engine


def local_of(tensor: Tensor) -> Tensor:
    """What a rank itself holds of a tensor."""
    if isinstance(tensor, DTensor):
        return local_of(tensor._local_tensor)
    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.elem
    return tensor
