"""What stands in for what is not here: other ranks in a dry run, and a GPU's own kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor

from scalellm.dist import World
from scalellm.plan.live import LiveBytes
from scalellm.strategies import _context, _gloo
from scalellm.strategies._mesh import Mesh, ParallelOptions


@contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """This process is rank `rank` of so many; collectives leave their outputs as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _forget_meshes()
    tdist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _own_shards_only():
            yield
    finally:
        tdist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Clears what DTensor keeps by mesh: one of the same ranks counts as the same mesh.

    A rank that trains after a dry run, or is forked from one that took it, would otherwise take its
    own place from rank 0's mesh, and its weights from rank 0's part of them.
    """
    from torch.distributed.tensor import _redistribute, debug

    for clear in (
        getattr(debug, "_clear_sharding_prop_cache", None),
        getattr(getattr(_redistribute, "_gen_transform_infos", None), "cache_clear", None),
    ):
        if clear is not None:
            clear()


@contextmanager
def _own_shards_only() -> Iterator[None]:
    """Spares FSDP the shards of other ranks: of 1,024 views a parameter it looks at one or two.

    Fake tensors for them took two thirds of a dry run of 1,024 ranks. Where torch has no such
    function any more, nothing is spared.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param
    original = getattr(module, "_chunk_with_empty", None)
    if original is None:
        yield
        return
    module._chunk_with_empty = _Chunks
    try:
        yield
    finally:
        module._chunk_with_empty = original


class _Chunks:
    """The chunks that `torch.chunk` cuts, and empty ones after the last, each made when asked."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim, self._num_chunks = tensor, dim, num_chunks
        self._each = max(1, -(-tensor.shape[dim] // num_chunks))

    def __len__(self) -> int:
        return self._num_chunks

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._num_chunks:
            raise IndexError(f"chunk {index} of {self._num_chunks}")
        start = index * self._each
        length = min(self._each, self._tensor.shape[self._dim] - start)
        if length <= 0 and index > 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, length)


@contextmanager
def gloo_of(device_type: str, live: LiveBytes) -> Iterator[None]:
    """Has a strategy communicate as it does between CPUs, and notes what it asks for."""
    if device_type != "cpu":
        yield
        return
    uses_gloo, exchange = _gloo.uses_gloo, _gloo.exchange

    def noted(kind: _gloo.Kind, whole: Tensor, *_: Any) -> list[tdist.Work]:
        live.call("buffers", [whole])
        live.count_collective(kind, whole.nbytes)
        return []

    _gloo.uses_gloo, _gloo.exchange = lambda group: True, noted  # type: ignore[assignment]
    try:
        yield
    finally:
        _gloo.uses_gloo, _gloo.exchange = uses_gloo, exchange


@contextmanager
def real_meshes() -> Iterator[None]:
    """Makes meshes of numbers that can be read, though all other tensors are fake.

    Masks that were kept for the next forward belong to one fake mode only.
    """
    original = Mesh.make

    def make(options: ParallelOptions, world: World) -> Mesh:
        with unset_fake_temporarily():
            return original(options, world)

    Mesh.make = make  # type: ignore[method-assign]
    _context._causal_strip.cache_clear()
    try:
        yield
    finally:
        Mesh.make = original  # type: ignore[method-assign]
        _context._causal_strip.cache_clear()


@contextmanager
def told_pipelines() -> Iterator[None]:
    """Spares pipelines the vote on who knows the shapes: all do, and a vote could not be read."""
    original = _PipelineSchedule._warmup_p2p

    def warm_up(schedule: Any, stages: Any, *args: Any, **kwargs: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    _PipelineSchedule._warmup_p2p = warm_up  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        _PipelineSchedule._warmup_p2p = original  # type: ignore[method-assign]


@contextmanager
def replaced_parameters() -> Iterator[None]:
    """Lets `to_empty` put new parameters in the places of fake ones, which cannot be swapped."""
    original = nn.Module.to_empty

    def to_empty(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return original(module, device=device, recurse=recurse)
        new: dict[nn.Parameter, nn.Parameter] = {}
        for part in module.modules() if recurse else [module]:
            for name, old in part._parameters.items():
                if old is None:
                    continue
                if old not in new:
                    empty = torch.empty_like(old.detach(), device=device)
                    new[old] = nn.Parameter(empty, old.requires_grad)
                part._parameters[name] = new[old]
        return module

    nn.Module.to_empty = to_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to_empty = original  # type: ignore[method-assign]


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Takes the kernels that such a device has and a CPU has not.

    RMSNorm on a GPU is one kernel where input and weight are of one type: it keeps its input and a
    number a row, where a CPU's is put together from operators that keep wide copies. (Torch 2.13,
    aten/src/ATen/native/layer_norm.cpp; autocast leaves the weight wide, and the operators apart.)
    """
    if device_type == "cpu":
        yield
        return
    original = nn.RMSNorm.forward

    def forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        if norm.weight is None or norm.weight.dtype != x.dtype:
            return original(norm, x)
        made: Tensor = _FusedNorm.apply(x, norm.weight)
        return made

    nn.RMSNorm.forward = forward  # type: ignore[method-assign,assignment]
    try:
        with warnings.catch_warnings():
            # True, and counted; but not what the user asked.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        nn.RMSNorm.forward = original  # type: ignore[method-assign]


class _FusedNorm(torch.autograd.Function):
    """Takes and keeps what the kernel does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
