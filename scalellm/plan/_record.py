"""Records one optimizer step of a strategy on fake tensors; see `dry_run`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalellm import strategies
from scalellm.config import Config
from scalellm.dist import World
from scalellm.errors import ConfigError, UserError
from scalellm.model import Decoder
from scalellm.plan._fakes import (
    fake_group,
    gloo_of,
    kernels_of,
    real_meshes,
    replaced_parameters,
    told_pipelines,
)
from scalellm.plan._packed import Packing
from scalellm.plan._ranks import ranks_of
from scalellm.plan._steps import STEP, Step
from scalellm.plan._zero_steps import ZeroStep, answering, can_run_dry, dry_options
from scalellm.plan.allocator import Event
from scalellm.plan.live import Kind, LiveBytes, Segment
from scalellm.process import collecting_when_told
from scalellm.strategies import Strategy
from scalellm.strategies._mesh import ParallelOptions
from scalellm.strategies.base import Options
from scalellm.strategies.deepspeed import DeepSpeed

_SETUP = "setup"


@dataclass(frozen=True)
class Trace:
    """A recorded step: bytes by kind at its start, and what happened then.

    `layer_bytes` is the share of the middle block in `start`; `offloaded` kinds lie on the host.
    Of more than two micro-batches only the first and the last are there; the segments named
    `FIRST` stand for `first_times` micro-batches.
    """

    start: dict[Kind, int]
    segments: list[Segment]
    layer_bytes: dict[Kind, int]
    offloaded: frozenset[Kind]
    first_times: int


def record(config: Config, world_size: int, device_type: str, rank: int = 0) -> Trace:
    """Returns the trace of a step of one rank; arguments and errors as of `dry_run`."""
    return _record(config, world_size, device_type, rank)[0]


def record_events(config: Config, world_size: int, device_type: str) -> tuple[Trace, list[Event]]:
    """Returns the same trace, and all allocations from the parameters' to the end of the step."""
    return _record(config, world_size, device_type)


def _record(
    config: Config, world_size: int, device_type: str, rank: int = 0
) -> tuple[Trace, list[Event]]:
    """Inside all the while: what is alive at the end is freed at any moment afterwards."""
    _check(config, world_size, device_type)
    config = as_on(config, device_type)
    here = ranks_of(config, world_size, rank)
    world, strategy_class, options = here.world, here.strategy, here.options
    plan = here.batches
    sharding = strategy_class.sharding(options, world, config.train)
    away: Any = sharding.offloaded if device_type != "cpu" else frozenset()
    is_cpu = device_type == "cpu"
    live = LiveBytes(gloo=is_cpu, packing=Packing() if is_cpu else None)
    model = _meta_model(config)
    with ExitStack() as stack:
        stack.enter_context(collecting_when_told())
        if strategy_class.needs_process_group:
            stack.enter_context(fake_group(world_size, rank))
            stack.enter_context(gloo_of(device_type, live))
            stack.enter_context(real_meshes())
            stack.enter_context(replaced_parameters())
            stack.enter_context(told_pipelines())
        stack.enter_context(live.watching_resizes())
        stack.enter_context(kernels_of(device_type))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if is_deepspeed(config):
            stack.enter_context(answering(model))
        # What is made and given up in between leaves holes only where memory is a heap.
        is_seen_whole = device_type == "cpu" or is_deepspeed(config)
        if is_seen_whole:
            stack.enter_context(live)
            live.mark(_SETUP)
        if is_deepspeed(config):
            step: Step = ZeroStep(config, world, DeepSpeed, dry_options(options), live, model)
        else:
            step = Step(config, world, strategy_class, options, live, model)
        if not is_seen_whole:
            stack.enter_context(live)
        stack.callback(step.strategy.close)
        # A pipeline's micro-batches are not one like the other: it takes all of them.
        is_pipeline = has_pipeline(options)
        micro_batches = plan.grad_accumulation if is_pipeline else min(plan.grad_accumulation, 2)
        # Makes what stays: optimizer state, FSDP's.
        step.take(plan.micro_batch_size, micro_batches if is_pipeline else 1, device_type)
        # The third finds the holes that the second one left.
        for _ in range(2 if device_type == "cpu" else 1):
            step.take(plan.micro_batch_size, micro_batches, device_type)
        first_times = 1 if is_pipeline else max(1, plan.grad_accumulation - 1)
        if is_deepspeed(config):
            return _from_setup(live, first_times), live.events()
        start, segments = live.segments(STEP, away)
        trace = Trace(start, segments, step.layer_bytes(), away, first_times)
        return trace, live.events()


def _from_setup(live: LiveBytes, first_times: int) -> Trace:
    """A trace with the making of the engine in it, which may need more than a step.

    What is sent is that of the last step.
    """
    start, segments = live.segments(_SETUP)
    last = max(index for index, segment in enumerate(segments) if segment.label == STEP)
    segments = [replace(one, traffic=()) for one in segments[:last]] + segments[last:]
    return Trace(start, segments, {}, frozenset(), first_times)


@dataclass(frozen=True)
class Passes:
    """Forward and backward of one micro-batch after another, in a single process.

    `rows` are samples. Gradients are kept and accumulated over `times`, or given up as soon as they
    are there, as where a bucket takes them. `dtype` is the parameters'; None: the precision's.
    """

    rows: int
    times: int = 1
    keeps_gradients: bool = False
    dtype: torch.dtype | None = None


def record_passes(config: Config, passes: Passes, device_type: str) -> Trace:
    """Returns the trace of `passes`, whatever the strategy; gradients are 0 at its start."""
    _check_model(config)
    config = as_on(config, device_type)
    model, live = _meta_model(config), LiveBytes()
    model.to(dtype=passes.dtype)
    with ExitStack() as stack:
        stack.enter_context(kernels_of(device_type))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        step = Step(config, World(), Strategy, Options(), live, model)
        for parameter in step.named.values() if not passes.keeps_gradients else ():
            parameter.register_post_accumulate_grad_hook(_give_up)
        stack.enter_context(live)
        live.mark(STEP)
        for index in range(passes.times):
            step.pass_through(passes.rows, is_last=index == passes.times - 1)
        start, segments = live.segments(STEP)
        return Trace(start, segments, step.layer_bytes(), frozenset(), 1)


def _give_up(parameter: Tensor) -> None:
    parameter.grad = None


def _meta_model(config: Config) -> nn.Module:
    with torch.device("meta"):
        return Decoder(config.model)


def as_on(config: Config, device_type: str) -> Config:
    """The config as such a device runs it, uncompiled: which attention kernel it takes."""
    model, train = config.model, config.train.model_copy(update={"compile": False})
    if model.attention == "auto" and device_type != "cpu":
        model = model.model_copy(update={"attention": "sdpa"})
    return config.model_copy(update={"model": model, "train": train})


def has_pipeline(options: Options) -> bool:
    return isinstance(options, ParallelOptions) and options.mesh.pp > 1


def is_deepspeed(config: Config) -> bool:
    name, options = config.strategy.name, config.strategy.options
    return name == "deepspeed" or (name == "accelerate" and options.get("backend") == "deepspeed")


def engine_runs_dry(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed's engine can take a step of this config on fake tensors in this process."""
    strategy_class = strategies.resolve(config.strategy.name)
    world = World(world_size=world_size, launcher="the planner")
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    return can_run_dry(options) and not tdist.is_initialized()


def _check(config: Config, world_size: int, device_type: str) -> None:
    _check_model(config)
    if tdist.is_initialized():
        raise UserError(
            "a dry run needs a process of its own, but this one is a rank of a process group; "
            "plan before the ranks are started"
        )
    if not is_deepspeed(config):
        return
    why = None
    if device_type != "cpu":
        why = "can run dry for a CPU only"
    elif not engine_runs_dry(config, world_size):
        why = "cannot run dry where it writes to disk"
    if why is not None:
        raise UserError(
            f"strategy.name={config.strategy.name} trains by DeepSpeed's engine, which {why}; its "
            "memory is estimated instead (scalellm plan without --dry-run)"
        )


def _check_model(config: Config) -> None:
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is null, so the model's size is not known; set it, in tokens"
        )
