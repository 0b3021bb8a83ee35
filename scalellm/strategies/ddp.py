"""`ddp`: every rank holds the whole model and the ranks average their gradients.

Sources: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training";
Vogels et al. 2019, "PowerSGD" (the lossy compression of `compression: powersgd`); Rajbhandari et
al. 2020, "ZeRO" (its first stage: `shard_optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from scalellm.config import TrainConfig, setting
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.strategies._row_shares import RowShares
from scalellm.strategies.base import (
    MakeOptimizer,
    NamedParameters,
    Options,
    Sharding,
    Strategy,
)


class DDPOptions(Options):
    bucket_mb: int = setting(25, "gradients reduced together", unit="MiB", ge=1)
    find_unused_parameters: bool = setting(
        True,
        "allow forwards that leave parameters out; false saves a graph walk a step, and stops the "
        "run if one is left out",
    )
    shard_optimizer: bool = setting(
        False,
        "each rank keeps AdamW's state of its share of the weights, updates that share and sends "
        "it to the others (ZeRO stage 1): 8 bytes a parameter become 8 / ranks",
    )
    compression: Literal["none", "bf16", "fp16", "powersgd"] = setting(
        "none",
        "what gradients are squeezed into on the wire; all but none change the loss, and powersgd "
        "needs every parameter in every forward",
    )
    powersgd_rank: int = setting(
        4,
        "rank of PowerSGD's approximation; more is truer. What it leaves out goes into the next "
        "step, but is not saved: a resumed run differs",
        ge=1,
    )
    powersgd_start_step: int = setting(
        100, "steps of plain averaging before PowerSGD begins", unit="steps", ge=2
    )


class DDP(Strategy):
    options_class = DDPOptions
    needs_process_group = True

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        options = cast(DDPOptions, options)
        if train.precision == "fp64" and options.compression != "none":
            raise ConfigError(
                f"strategy.compression={options.compression} loses what train.precision=fp64 "
                "keeps; use strategy.compression=none or another precision"
            )

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        divides = cast(DDPOptions, options).shard_optimizer
        return Sharding(optimizer=world.world_size if divides else 1)

    def __init__(self, world: World, train: TrainConfig, options: Options) -> None:
        super().__init__(world, train, options)
        self._shares: RowShares | None = None
        # Who makes the distributed module; Accelerate puts itself in between.
        self.distribute: Callable[[nn.Module], nn.Module] = self._distribute

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        options = cast(DDPOptions, self.options)

        def make_for_shares(named: NamedParameters) -> torch.optim.Optimizer:
            self._shares = RowShares(named, self.world, options.bucket_mb << 20)
            self._shares.check()
            return make_optimizer(self._shares.named())

        super().setup(model, make_for_shares if options.shard_optimizer else make_optimizer)

    def wrap(self, model: nn.Module) -> nn.Module:
        self.gradient_scale = float(self.world.world_size)  # DDP averages; the loss wants a sum
        return self.distribute(model)

    def _distribute(self, model: nn.Module) -> nn.Module:
        options = cast(DDPOptions, self.options)
        bucket_mb, finds_unused = options.bucket_mb, options.find_unused_parameters
        if options.compression == "powersgd":
            # It reduces again in callbacks, in gloo's own threads: a second bucket's or the map of
            # unused parameters, reduced meanwhile, would meet them in another order on each rank.
            bucket_mb = 1 + sum(p.nbytes for p in model.parameters()) // (1 << 20)
            finds_unused = False
        module = DistributedDataParallel(
            model,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=finds_unused,
        )
        _compress(module, options)
        return module

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        # Alone in its world Accelerate leaves the module as it is.
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    # -- a divided optimizer ----------------------------------------------------------------

    def update(self) -> None:
        if self._shares is None:
            super().update()
            return
        self._shares.take_gradients()
        super().update()
        self._shares.spread()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        if self._shares is not None:
            self._shares.drop_gradients()
            for _, parameter in self.named_parameters():
                parameter.grad = None

    def updated_part(self, parameter: nn.Parameter) -> tuple[nn.Parameter, tuple[int, ...]]:
        if self._shares is None:
            return super().updated_part(parameter)
        return self._shares.of(parameter)

    def writes(self, index: int) -> bool:
        return self._shares is not None or super().writes(index)


def _compress(module: DistributedDataParallel, options: DDPOptions) -> None:
    if options.compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=options.powersgd_rank,
            start_powerSGD_iter=options.powersgd_start_step,
        )
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif options.compression != "none":
        dtype = torch.bfloat16 if options.compression == "bf16" else torch.float16
        # torch's own bf16 hook refuses every backend but NCCL by name; the sum works on gloo too.
        module.register_comm_hook(None, _hook_to(dtype))


def _hook_to(dtype: torch.dtype) -> Callable[..., Any]:
    """Returns a hook that averages in `dtype`; DDP reads its annotations, so they are set."""

    def compress(group: Any, bucket: Any) -> Any:
        return default_hooks._compress_hook(dtype, group, bucket)

    future = torch.futures.Future[Tensor]
    compress.__annotations__ = {"bucket": tdist.GradBucket, "return": future}  # type: ignore[attr-defined]
    return compress
