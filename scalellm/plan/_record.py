"""Records one optimizer step of a strategy on fake tensors; see `dry_run`."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from scalellm import strategies
from scalellm.batches import Batch
from scalellm.config import Config
from scalellm.dist import World
from scalellm.errors import ConfigError, UserError
from scalellm.model import Decoder
from scalellm.plan._buckets import Buckets
from scalellm.plan._fakes import fake_group, kernels_of
from scalellm.plan.allocator import Event
from scalellm.plan.live import Kind, LiveBytes, Segment, local_of
from scalellm.strategies import Strategy
from scalellm.strategies.base import Options
from scalellm.strategies.ddp import DDP, DDPOptions
from scalellm.train.optimizer import make_adamw

# A model of this many blocks has one, of this index, that stands for any number of blocks: neither
# it nor its neighbours in a forward or a backward are the first or the last.
FEW_LAYERS, MIDDLE = 5, 2
_STEP = "step"
FIRST, LAST = "first", "last"  # micro-batch


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


def record(config: Config, world_size: int, device_type: str) -> Trace:
    """Returns the trace of a step of rank 0; arguments and errors as of `dry_run`."""
    return _record(config, world_size, device_type)[0]


def record_events(config: Config, world_size: int, device_type: str) -> tuple[Trace, list[Event]]:
    """Returns the same trace, and all allocations from the parameters' to the end of the step."""
    trace, live = _record(config, world_size, device_type)
    return trace, live.events()


def _record(config: Config, world_size: int, device_type: str) -> tuple[Trace, LiveBytes]:
    _check(config)
    config = as_on(config, device_type)
    world = World(rank=0, world_size=world_size, launcher="the planner")
    strategy_class = strategies.resolve(config.strategy.name)
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    plan = config.batches(world_size)
    sharding = strategy_class.sharding(options, world, config.train)
    away: Any = sharding.offloaded if device_type != "cpu" else frozenset()
    live = LiveBytes()
    model = _meta_model(config)
    with ExitStack() as stack:
        if strategy_class.needs_process_group:
            stack.enter_context(fake_group(world_size))
        stack.enter_context(live.watching_resizes())
        stack.enter_context(kernels_of(device_type))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        step = _Step(config, world, strategy_class, options, live, model)
        stack.callback(step.strategy.close)
        stack.enter_context(live)
        step.take(
            plan.micro_batch_size, 1, device_type
        )  # makes what stays: optimizer state, FSDP's
        step.take(plan.micro_batch_size, min(plan.grad_accumulation, 2), device_type)
        start, segments = live.segments(_STEP, away)
        first_times = max(1, plan.grad_accumulation - 1)
        trace = Trace(start, segments, step.layer_bytes(), away, first_times)
    return trace, live


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
        step = _Step(config, World(), Strategy, Options(), live, model)
        for parameter in step.named.values() if not passes.keeps_gradients else ():
            parameter.register_post_accumulate_grad_hook(_give_up)
        stack.enter_context(live)
        live.mark(_STEP)
        for index in range(passes.times):
            step.pass_through(passes.rows, is_last=index == passes.times - 1)
        start, segments = live.segments(_STEP)
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


def is_deepspeed(config: Config) -> bool:
    name, options = config.strategy.name, config.strategy.options
    return name == "deepspeed" or (name == "accelerate" and options.get("backend") == "deepspeed")


def _check(config: Config) -> None:
    if is_deepspeed(config):
        raise UserError(
            f"strategy.name={config.strategy.name} trains by DeepSpeed's engine, which reads data "
            "and cannot run dry; its memory is estimated instead (scalellm plan without --dry-run)"
        )
    _check_model(config)
    if tdist.is_initialized():
        raise UserError(
            "a dry run needs a process of its own, but this one is a rank of a process group; "
            "plan before the ranks are started"
        )


def _check_model(config: Config) -> None:
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is null, so the model's size is not known; set it, in tokens"
        )


class _Step:
    """A strategy that is set up on fake tensors, and the steps it takes."""

    def __init__(
        self,
        config: Config,
        world: World,
        strategy_class: type[Strategy],
        options: Options,
        live: LiveBytes,
        model: nn.Module,
    ) -> None:
        self.config, self.live = config, live
        self.buckets: Buckets | None = None
        self.part = LAST
        is_ddp = strategy_class is not Strategy and config.strategy.name in ("ddp", "accelerate")
        chosen = options if isinstance(options, DDPOptions) else DDPOptions()
        if is_ddp:
            self.strategy: Strategy = _BareDDP(world, config.train, chosen)
        else:
            self.strategy = strategy_class(world, config.train, options)
        _without_values(self.strategy)
        self.strategy.setup(model, functools.partial(make_adamw, train=config.train))
        self.named = dict(self.strategy.named_parameters())
        if is_ddp:
            self.buckets = Buckets(list(self.named.values()), chosen)
            self.buckets.live = live
            live.call("gradients", self.buckets.tensors)
        live.call("parameters", self.named.values())
        for index, block in enumerate(self.strategy.model.get_submodule("layers").children()):
            self._mark_passes(block, index)

    def take(self, rows: int, micro_batches: int, device_type: str) -> None:
        """Takes an optimizer step as the training loop does, without its numbers."""
        strategy, live = self.strategy, self.live
        cast(Any, strategy).grad_norm = functools.partial(self._grad_norm, device_type)
        live.mark(_STEP)
        for index in range(micro_batches):
            self.pass_through(rows, is_last=index == micro_batches - 1)
        live.mark("update")
        strategy.step(learning_rate=1e-3)
        for state in strategy.optimizer.state.values():
            live.call("optimizer", [value for value in state.values() if torch.is_tensor(value)])

    def pass_through(self, rows: int, *, is_last: bool) -> None:
        """Takes one micro-batch through forward and backward."""
        strategy, live = self.strategy, self.live
        self.part = LAST if is_last else FIRST
        live.mark(f"{self.part} embedding")
        batch = self._batch(rows)
        if self.buckets is not None:
            self.buckets.begin(is_syncing=is_last)
        with strategy.micro_step(is_last):
            loss = strategy.forward(batch)
            live.call_rest("activations")
            live.mark(f"{self.part} loss")
            strategy.backward(loss, global_tokens=1)
        live.call("gradients", self._gradients())

    def _mark_passes(self, block: nn.Module, index: int) -> None:
        """Marks where a block's forward begins, and where its backward does."""

        def forward(module: nn.Module, inputs: Any) -> None:
            self.live.mark(f"{self.part} forward {index}")

        def backward(gradient: Tensor) -> None:
            self.live.mark(f"{self.part} backward {index}")

        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(backward)

        block.register_forward_pre_hook(forward)
        block.register_forward_hook(after)

    def layer_bytes(self) -> dict[Kind, int]:
        """What the middle block's parameters have part in between steps."""
        sizes: dict[Kind, int] = {"parameters": 0, "optimizer": 0, "gradients": 0}
        for name, parameter in self.named.items():
            if not name.startswith(f"layers.{MIDDLE}."):
                continue
            held_bytes = local_of(parameter.detach()).nbytes
            sizes["parameters"] += held_bytes
            updated, _ = self.strategy.updated_part(parameter)
            state = self.strategy.optimizer.state.get(updated, {})
            sizes["optimizer"] += sum(local_of(torch.as_tensor(v)).nbytes for v in state.values())
            if self.buckets is not None and parameter.requires_grad:
                sizes["gradients"] += held_bytes * self.buckets.copies
        return sizes

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.named.values() if p.grad is not None]

    def _grad_norm(self, device_type: str) -> float:
        """Clips, whatever the norm. On a CPU torch casts a half gradient whole to sum in fp64."""
        for gradient in self._gradients():
            if device_type == "cpu" and gradient.dtype != torch.float32:
                local_of(gradient).to(torch.float64)
        return 2.0 * (self.config.train.grad_clip or 1.0) * self.strategy.loss_scale.value

    def _batch(self, rows: int) -> Batch:
        tokens = torch.zeros(rows, self.config.model.seq_len + 1, dtype=torch.long)
        documents = torch.zeros_like(tokens) if self.config.data.document_mask else None
        return Batch(
            tokens_BT=tokens[:, :-1],
            targets_BT=tokens[:, 1:],
            positions_BT=None if documents is None else documents[:, 1:],
            documents_BT=None if documents is None else documents[:, 1:],
        )


class _BareDDP(DDP):
    """DDP without its module, whose C++ reads values; `Buckets` hold what it would."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


def _without_values(strategy: Strategy) -> None:
    """Replaces what would read or write numbers, in this one object."""
    changed = cast(Any, strategy)
    changed.fill = lambda model: None
    changed.part_of = lambda tensor: (local_of(tensor), (0,) * tensor.dim())
    if hasattr(strategy, "_make_mesh"):
        make_mesh = strategy._make_mesh

        def real_mesh(shard_ranks: int | None) -> Any:
            with unset_fake_temporarily():
                return make_mesh(shard_ranks)

        changed._make_mesh = real_mesh
