"""The contract between the training loop and every way of training, and its simplest keeper.

`Strategy` as written here trains in one process. A distributed strategy overrides what its backend
does differently and nothing else; the loop never asks which one it has.

Shapes: B samples of a micro-batch, T positions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from scalellm.batches import Batch
from scalellm.config import BatchPlan, ModelConfig, Section, TrainConfig
from scalellm.dist import World
from scalellm.strategies._loss_scale import LossScale
from scalellm.strategies._norm import norm_of
from scalellm.strategies._state import MOMENTS, Piece, StateSource, check_names
from scalellm.strategies._transforms import apply_transforms, canonical_fqn

NamedParameters = Iterable[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Options(Section):
    """What may stand beside `strategy.name`; a strategy with options subclasses this."""


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is global and from before clipping; a skipped step changed no weight."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class DataRank:
    """Which of a global batch's rows a rank reads: part `rank` of `world_size`.

    Ranks that read the same rows work on them together; one of them, `counts`, counts them. `name`
    is what errors call the number of parts.
    """

    rank: int
    world_size: int
    counts: bool = True
    name: str = "world_size"


@dataclass(frozen=True)
class Sharding:
    """Among how many ranks each kind of memory is divided; 1: every rank holds all of it.

    `offloaded` are the kinds that do not lie on the device. `working_bytes` is the size of an
    element the model computes with, where that is not the optimizer's.
    """

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    offloaded: frozenset[str] = frozenset()
    working_bytes: int | None = None


class Strategy:
    """One process, the whole model. Subclasses shard, average and offload.

    Call order: `setup`, then per optimizer step `forward` and `backward` inside `micro_step` for
    each micro-batch, `step`; at last `close`.
    """

    options_class: ClassVar[type[Options]] = Options
    needs_process_group: ClassVar[bool] = False

    def __init__(self, world: World, train: TrainConfig, options: Options) -> None:
        self.world = world
        self.train = train
        self.options = options
        self.data = self.data_rank(options, world)
        self.loss_scale = LossScale(enabled=train.precision == "fp16")
        # What to multiply a local gradient's scale by, for backends that average over ranks.
        self.gradient_scale = 1.0

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        """Refuses options that cannot work in this world, before anything is allocated.

        `world` may be one that is about to be started; its device is not known then.
        """
        del options, world, train

    @classmethod
    def check_model(
        cls,
        options: Options,
        world: World,
        train: TrainConfig,
        model: ModelConfig,
        plan: BatchPlan,
    ) -> None:
        """Refuses a model or a split of the batch that these options cannot train; as `check`."""
        del options, world, train, model, plan

    @classmethod
    def data_rank(cls, options: Options, world: World) -> DataRank:
        """The rows this rank reads; every rank has its own, unless ranks share a model's work."""
        del options
        return DataRank(world.rank, world.world_size)

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        """How parameters, gradients and optimizer state are divided, and where they lie."""
        del options, world, train
        return Sharding()

    @classmethod
    def backend_config(
        cls, options: Options, train: TrainConfig, plan: BatchPlan, world: World
    ) -> dict[str, Any] | None:
        """The configuration handed to a backend that has a format of its own; else None."""
        del options, train, plan, world
        return None

    @property
    def dropout_rank(self) -> int:
        """Ranks with the same number drop the same features: those that hold the same tokens."""
        return self.world.rank

    # -- building ---------------------------------------------------------------------------

    def load_libraries(self) -> None:
        """Imports what training will need, before there is a model.

        What a process takes for its libraries is told from what it takes for its training, and
        their thousands of small objects do not come to lie between tensors that are freed later.
        """
        importlib.import_module("torch._dynamo")  # as torch's optimizers do when one is made

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Places, transforms and wraps the model and builds its optimizer, in this order.

        A model on the meta device gets memory and its `initial_weights` here, as much of them as
        this rank holds: the same values whatever the strategy.
        """
        dtype = torch.float64 if self.train.precision == "fp64" else None
        self.model = self.place(model.to(dtype=dtype))
        apply_transforms(self.model, self.train)
        self.module = self.wrap(self.model)
        self.optimizer = make_optimizer(self.named_parameters())

    def place(self, model: nn.Module) -> nn.Module:
        """Returns the model with memory on this rank's device."""
        if not is_meta(model):
            return model.to(self.world.device)
        model = model.to_empty(device=self.world.device)
        self.fill(model)
        return model

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Gives every parameter its initial value, one whole value at a time."""
        parameters = dict(model.named_parameters())
        for name, value in cast(Any, model).initial_weights():
            local, begin = self.part_of(parameters[name])[0], self.begin_of(parameters[name])
            local.copy_(value[slices(begin, local)])

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module whose forward the loop calls."""
        return model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model under their canonical FQNs, tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield canonical_fqn(name), parameter

    # -- one optimizer step -----------------------------------------------------------------

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch; backends that communicate do so on the last one only."""
        del is_last
        return nullcontext()

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What products are computed in; None: in what the weights are when the model meets them.

        Where these are of half precision already, autocast would only make norms compute and give
        fp32 on a GPU (torch 2.13, aten/src/ATen/autocast_mode.h), for more memory and traffic.
        """
        return AUTOCAST.get(self.train.precision)

    def forward(self, batch: Batch) -> Tensor:
        """Returns this rank's share of the sum of the micro-batch's token losses, in nats.

        The shares of all ranks add up to the loss of the global batch, once `backward` is done.
        """
        autocast = self.autocast_dtype
        wanted: dict[str, Any] = {"row_losses": batch.row_losses, "mask_B1TS": batch.mask_B1TS}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        with torch.autocast(self.world.device.type, dtype=autocast, enabled=autocast is not None):
            loss_sum: Tensor = self.module(
                batch.tokens_BT,
                batch.targets_BT,
                positions_BT=batch.positions_BT,
                documents_BT=batch.documents_BT,
                **wanted,
            )
        return loss_sum

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        """Accumulates gradients of `loss_sum / global_tokens`.

        `global_tokens` counts the targets of the whole global batch (all ranks, all micro-batches),
        so that no split of it changes the gradient. It is divided by here and nowhere else.
        """
        scale = self.gradient_scale * self.loss_scale.value / global_tokens
        (loss_sum * scale).backward()

    def step(self, learning_rate: float) -> StepResult:
        """Clips by the global norm, updates unless a gradient is not finite, zeroes gradients."""
        self.fill_missing_gradients()
        grad_norm = self.grad_norm() / self.loss_scale.value
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            self._scale_gradients(self._clip_factor(grad_norm) / self.loss_scale.value)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.update()
        self.loss_scale.update(overflowed=skipped)
        self.drop_gradients()
        return StepResult(grad_norm, skipped)

    def update(self) -> None:
        """Changes the weights by the gradients, which are clipped."""
        self.optimizer.step()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def grad_norm(self) -> float:
        """Global 2-norm of the accumulated gradients, equal on all ranks."""
        return norm_of(self._gradients())

    def _gradients(self) -> list[Tensor]:
        """Gradients as far as this rank holds them."""
        gradients = [p.grad for _, p in self.named_parameters() if p.grad is not None]
        return [self.part_of(gradient)[0] for gradient in gradients]

    def fill_missing_gradients(self) -> None:
        """A parameter that had no part in the loss has a gradient of zero, in every strategy.

        Backends disagree (torch's optimizers skip a missing gradient, ZeRO's flat buffers hold
        zeros), and a rank may have left out what another one used.
        """
        for _, parameter in self.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip_factor(self, grad_norm: float) -> float:
        limit = self.train.grad_clip
        return limit / grad_norm if limit and grad_norm > limit else 1.0

    def _scale_gradients(self, factor: float) -> None:
        gradients = self._gradients()
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def full_gradients(self) -> dict[str, Tensor]:
        """Raw gradients between `backward` and `step`, whole, by FQN; for parity and debugging.

        fp32 (fp64 in fp64 runs), on the CPU; zeros for parameters that had no part in the loss,
        nothing for frozen ones. All ranks call it and get the same.
        """
        self.fill_missing_gradients()
        return {
            name: self.whole(cast(Tensor, p.grad).detach() / self.loss_scale.value).cpu()
            for name, p in self.named_parameters()
            if p.requires_grad
        }

    # -- state ------------------------------------------------------------------------------

    def part_of(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What this rank holds of a parameter, gradient or moment, and where that begins."""
        return tensor, (0,) * tensor.dim()

    def begin_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Where what this rank holds of a parameter begins in the whole of it."""
        return self.part_of(parameter.detach())[1]

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape of the whole of a parameter."""
        return tuple(parameter.shape)

    def whole(self, tensor: Tensor) -> Tensor:
        """The opposite of `part_of`: gathers a tensor of which every rank holds a part."""
        return tensor

    def updated_part(self, parameter: nn.Parameter) -> tuple[nn.Parameter, tuple[int, ...]]:
        """What the optimizer knows the parameter by, and where what this rank updates begins."""
        return parameter, self.begin_of(parameter)

    def writes(self, index: int) -> bool:
        """Whether this rank saves its part of parameter `index`; replicas share the work."""
        return index % self.world.world_size == self.world.rank

    def state(self) -> Iterator[Piece]:
        """Yields what this rank writes: `model.<fqn>` and `optim.<fqn>.{exp_avg,exp_avg_sq,step}`.

        Every element of every tensor is yielded by exactly one rank.
        """
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if not self.writes(index):
                continue
            updated, offsets = self.updated_part(parameter)
            local, shape = self.part_of(updated.detach())[0], self.shape_of(parameter)
            if local.numel():
                yield Piece(f"model.{name}", local, shape, offsets)
            for key, value in sorted(self.optimizer.state.get(updated, {}).items()):
                value = torch.as_tensor(value).detach()
                if value.dim():
                    value = self.part_of(value)[0]
                    where, whole = offsets, shape
                else:  # the step: one number, from the rank that has the first element
                    where, whole = (), ()
                if value.numel() and (value.dim() or not any(offsets)) and local.numel():
                    yield Piece(f"optim.{name}.{key}", value, whole, where)

    def load_state(self, source: StateSource) -> None:
        """Reads this rank's part of a checkpoint, in place.

        Raises:
            CheckpointError: names or shapes are not this model's; nothing was changed then.
        """
        self.check_names(source)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                self._read_into(parameter, source, f"model.{name}", self.begin_of(parameter))
                updated, offsets = self.updated_part(parameter)
                if f"optim.{name}.step" not in source.names() or not updated.numel():
                    self.optimizer.state.pop(updated, None)
                    continue
                state = {key: torch.zeros_like(updated) for key in MOMENTS}
                for key, value in state.items():
                    self._read_into(value, source, f"optim.{name}.{key}", offsets)
                step = source.read(f"optim.{name}.step", (), ())
                # The fused kernel wants its counter on the device, the others on the CPU.
                fused = self.optimizer.param_groups[0].get("fused")
                state["step"] = step.to(parameter.device) if fused else step
                self.optimizer.state[updated] = state

    def check_names(self, source: StateSource) -> None:
        """Raises CheckpointError if the checkpoint is not of this model."""
        check_names({name: self.shape_of(p) for name, p in self.named_parameters()}, source)

    def _read_into(
        self, tensor: Tensor, source: StateSource, name: str, begin: tuple[int, ...]
    ) -> None:
        local, _ = self.part_of(tensor.detach())
        if local.numel():
            local.copy_(source.read(name, begin, tuple(local.shape)))

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds between steps: parameters and optimizer; gradients in the step."""
        parameters = [p for _, p in self.named_parameters()]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "parameters_bytes": self._held_bytes(parameters),
            "gradients_bytes": self._held_bytes(p for p in parameters if p.requires_grad),
            "optimizer_bytes": self._held_bytes(v for v in states if isinstance(v, Tensor)),
        }

    def _held_bytes(self, tensors: Iterable[Tensor]) -> int:
        return sum(self.part_of(tensor.detach())[0].nbytes for tensor in tensors)

    def close(self) -> None:
        """Releases engines and groups of its own; also called after an exception."""


def is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def slices(offsets: tuple[int, ...], part: Tensor) -> tuple[slice, ...]:
    pairs = zip(offsets, part.shape, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)
