"""DeepSpeed's own engine on fake tensors: what it reads of their numbers is answered.

Read of DeepSpeed 0.19.8: it looks at overflow flags, norms and what other ranks hold, and none of
that decides what it allocates in a step that is not skipped. So its engine itself is set up and
takes steps, and every buffer it makes is counted.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalellm.dist import World
from scalellm.plan._steps import Step
from scalellm.strategies._deepspeed_build import (
    import_deepspeed,
    keeping_linear,
    leave_process_group,
)
from scalellm.strategies._deepspeed_config import DeepSpeedOptions
from scalellm.strategies.base import Options
from scalellm.strategies.deepspeed import DeepSpeed, is_partitioned

_ACCELERATOR = "DS_ACCELERATOR"


def can_run_dry(options: Options) -> bool:
    """Whether its engine needs no more than tensors: swapping to disk writes real ones."""
    return isinstance(options, DeepSpeedOptions) and "nvme" not in (
        options.offload_optimizer,
        options.offload_param,
    )


def dry_options(options: Options) -> Options:
    """The options with an optimizer of the same state whose kernel torch can leave out."""
    return options.model_copy(update={"cpu_adam": "torch"})


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Inside `FakeTensorMode`, while an engine of the model is made and used."""
    chosen = os.environ.get(_ACCELERATOR)
    import_deepspeed(World(), join=False)
    coordinator: Any = importlib.import_module(
        "deepspeed.runtime.zero.partitioned_param_coordinator"
    )
    # Compares the order of modules with the other ranks', by value.
    original = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    cast(Any, model).to = lambda *_: model  # it is there; torch would swap the parameters
    try:
        with warnings.catch_warnings(), keeping_linear(), _Answers():
            # It asserts that partitions begin at multiples of 4.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = original
        leave_process_group()
        if chosen is None:  # real ranks that this process starts may have a GPU
            os.environ.pop(_ACCELERATOR, None)


class _Answers(TorchDispatchMode):
    """A flag is down, a count 0, a norm 1: nothing is skipped."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        dtype = args[0].dtype
        return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


class ZeroStep(Step):
    """An engine of ZeRO and the steps it takes; enter `answering` and the log of bytes before."""

    strategy: DeepSpeed

    def without_values(self) -> None:
        """Everything is done as ever, on fake tensors."""

    def call_parameters(self) -> None:
        working = [_held(parameter) for parameter in self.named.values()]
        self.live.call("parameters", working)
        zero = self.strategy.zero
        if zero is None:
            return
        self.live.call("optimizer", zero.flats)
        if zero.stage == 3:
            self.live.call("gradients", zero.gradients())
            buckets = zero.zero.ipg_buckets.values()
            self.live.call("buffers", [b.buffer for b in buckets if b.buffer is not None])

    def call_buffers(self) -> None:
        gathered = [p.data for p in self.named.values() if is_partitioned(p)]
        self.live.call("buffers", gathered)

    def gradients(self) -> list[Tensor]:
        """Those that the engine has after a micro-batch, reduced or not."""
        zero = self.strategy.zero
        if zero is None:
            return super().gradients()
        if zero.stage == 3:
            return zero.gradients()
        engine = zero.zero
        found = [flat.grad for flat in zero.flats] + [p.grad for p in self.named.values()]
        for parts in (engine.averaged_gradients, engine.all_grad_tensors):
            found += [part for group in parts.values() for part in group or ()]
        return [gradient for gradient in found if gradient is not None]

    def grad_norm(self, device_type: str) -> float:
        if self.strategy.zero is not None:
            self.cast_gradients(device_type)
        return DeepSpeed.grad_norm(self.strategy)


def _held(parameter: nn.Parameter) -> Tensor:
    return cast(Any, parameter).ds_tensor.data if is_partitioned(parameter) else parameter.data
