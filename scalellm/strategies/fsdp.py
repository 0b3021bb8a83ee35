"""`fsdp`: parameters, gradients and optimizer state are divided among the ranks (FSDP2).

Each decoder block is a unit: its parameters are gathered just before it runs and given up after.
Sources: Rajbhandari et al. 2020, "ZeRO" (stage 3 and 2); Zhao et al. 2023, "PyTorch FSDP"; hybrid
sharding on a two-dimensional mesh as in the latter, section 3.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from scalellm.config import TrainConfig, setting
from scalellm.dist import World, sum_over_ranks
from scalellm.errors import ConfigError
from scalellm.strategies._gloo import compute_beside
from scalellm.strategies._shards import (
    PARAM_DTYPE,
    REDUCE_DTYPE,
    FloatWord,
    autocast_beside,
    mixed_precision,
    refuse_precisions,
    shard_of,
)
from scalellm.strategies._transforms import refuse_one_graph
from scalellm.strategies.base import Options, Sharding, Strategy, is_meta


class FSDPOptions(Options):
    reshard_after_forward: bool = setting(
        True,
        "give gathered parameters up after the forward (as ZeRO-3); false keeps them until the "
        "backward is done (as ZeRO-2), which saves a gather and costs their memory",
    )
    shard_ranks: int | None = setting(
        None,
        "ranks that divide one model among them, the others hold replicas (hybrid sharding, HSDP); "
        "null: all",
        unit="ranks",
        ge=1,
    )
    cpu_offload: bool = setting(
        False, "keep parameters, gradients and optimizer in host memory; the update runs there"
    )
    param_dtype: FloatWord | None = setting(None, PARAM_DTYPE)
    reduce_dtype: FloatWord | None = setting(None, REDUCE_DTYPE)
    reduce_every_micro_batch: bool = setting(
        True,
        "keep gradients divided during accumulation; false communicates once a step, but every "
        "rank holds the whole gradient",
    )


class FSDP(Strategy):
    options_class = FSDPOptions
    needs_process_group = True

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        options = cast(FSDPOptions, options)
        refuse_one_graph(train, "fsdp")
        if options.shard_ranks is not None and world.world_size % options.shard_ranks:
            fitting = [n for n in range(1, world.world_size + 1) if world.world_size % n == 0]
            raise ConfigError(
                f"strategy.shard_ranks={options.shard_ranks} ranks does not divide the "
                f"{world.world_size} ranks of this run into equal groups; use "
                f"{' or '.join(map(str, fitting))}, or start another number of ranks"
            )
        refuse_precisions(options.param_dtype, options.reduce_dtype, train)

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        options = cast(FSDPOptions, options)
        ranks = options.shard_ranks or world.world_size
        kinds = ("parameters", "gradients", "optimizer") if options.cpu_offload else ()
        return Sharding(ranks, ranks, ranks, offloaded=frozenset(kinds))

    # -- building ---------------------------------------------------------------------------

    def place(self, model: nn.Module) -> nn.Module:
        """Leaves a meta model as it is: only this rank's shards get memory, in `wrap`."""
        return model if is_meta(model) else super().place(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        options = cast(FSDPOptions, self.options)
        self.mesh = self._make_mesh(options.shard_ranks)
        on_gpu = self.world.device.type == "cuda"
        arguments: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": mixed_precision(options.param_dtype, options.reduce_dtype),
            # Pinned memory needs a GPU to pin it for.
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu)
            if options.cpu_offload
            else OffloadPolicy(),
        }
        layers = list(model.get_submodule("layers").children())
        for unit in layers:
            fully_shard(unit, **arguments)
        root = fully_shard(model, **arguments)
        self._reductions = compute_beside([model, *layers], self.mesh)
        if not self._reductions.are_sums:  # FSDP averages; the loss wants a sum
            self.gradient_scale = float(self.world.world_size)
        if hasattr(root, "set_reduce_scatter_unused_params"):  # torch 2.12
            root.set_reduce_scatter_unused_params(True)
        if is_meta(model):
            device = torch.device("cpu") if options.cpu_offload else self.world.device
            model.to_empty(device=device)
            self.fill(model)
        return model

    def _make_mesh(self, shard_ranks: int | None) -> DeviceMesh:
        device, world_size = self.world.device.type, self.world.world_size
        if shard_ranks is None or shard_ranks == world_size:
            return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
        shape = (world_size // shard_ranks, shard_ranks)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))

    # -- one optimizer step -----------------------------------------------------------------

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        options = cast(FSDPOptions, self.options)
        return autocast_beside(options.param_dtype, self.train.precision)

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        if not cast(FSDPOptions, self.options).reduce_every_micro_batch:
            cast(FSDPModule, self.module).set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        with self._reductions.beside_backward(self.optimizer):
            super().backward(loss_sum, global_tokens)

    def grad_norm(self) -> float:
        """Each rank sums the squares it holds; of replicas only the first counts."""
        local = super().grad_norm() if self._is_first_replica() else 0.0
        [squares] = sum_over_ranks([local * local], self.world.device)
        return math.sqrt(squares) if squares >= 0 else math.nan

    # -- state ------------------------------------------------------------------------------

    def part_of(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return shard_of(tensor) if isinstance(tensor, DTensor) else super().part_of(tensor)

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        on_device = cast(DTensor, tensor.to(self.world.device))  # where its group communicates
        return on_device.full_tensor()

    def writes(self, index: int) -> bool:
        return self._is_first_replica()

    def _is_first_replica(self) -> bool:
        return self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0
