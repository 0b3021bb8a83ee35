"""`ddp`: every rank holds the whole model and the ranks average their gradients.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scalellm.config import setting
from scalellm.strategies.base import Options, Strategy


class DDPOptions(Options):
    bucket_mb: int = setting(25, "gradients reduced together", unit="MiB", ge=1)
    find_unused_parameters: bool = setting(
        False, "for models that leave parameters out of some forwards; costs a graph walk a step"
    )


class DDP(Strategy):
    options_class = DDPOptions
    needs_process_group = True

    def wrap(self, model: nn.Module) -> nn.Module:
        options = cast(DDPOptions, self.options)
        self.gradient_scale = float(self.world.world_size)  # DDP averages; the loss wants a sum
        on_gpu = self.world.device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[self.world.device] if on_gpu else None,
            bucket_cap_mb=options.bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=options.find_unused_parameters,
        )

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        module = cast(DistributedDataParallel, self.module)
        return nullcontext() if is_last else module.no_sync()
