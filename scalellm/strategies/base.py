"""The contract between the training loop and every way of training, and its simplest keeper.

`Strategy` as written here trains in one process. A distributed strategy overrides what its backend
does differently and nothing else; the loop never asks which one it has.

Shapes: B samples of a micro-batch, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from scalellm.batches import Batch
from scalellm.config import Section, TrainConfig
from scalellm.dist import World
from scalellm.errors import CheckpointError
from scalellm.strategies._loss_scale import LossScale
from scalellm.strategies._transforms import apply_transforms, canonical_fqn

NamedParameters = Iterable[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Options(Section):
    """What may stand beside `strategy.name`; a strategy with options subclasses this."""


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is global and from before clipping; a skipped step changed no weight."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class Piece:
    """A rectangle of one named global tensor, as this rank holds it."""

    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


class StateSource(Protocol):
    """Where `load_state` reads from: a verified checkpoint, whatever ranks wrote it."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor: ...


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
        self.loss_scale = LossScale(enabled=train.precision == "fp16")
        # What to multiply a local gradient's scale by, for backends that average over ranks.
        self.gradient_scale = 1.0

    @classmethod
    def check(cls, options: Options, world: World) -> None:
        """Refuses options that cannot work in this world, before anything is allocated."""
        del options, world

    # -- building ---------------------------------------------------------------------------

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Moves, transforms and wraps the model and builds its optimizer, in this order."""
        dtype = torch.float64 if self.train.precision == "fp64" else None
        self.model = model.to(device=self.world.device, dtype=dtype)
        apply_transforms(self.model, self.train)
        self.module = self.wrap(self.model)
        self.optimizer = make_optimizer(self.named_parameters())

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

    def forward(self, batch: Batch) -> Tensor:
        """Returns the sum of the micro-batch's token losses, in nats."""
        autocast = _AUTOCAST.get(self.train.precision)
        with torch.autocast(self.world.device.type, dtype=autocast, enabled=autocast is not None):
            loss_sum: Tensor = self.module(
                batch.tokens_BT,
                batch.targets_BT,
                positions_BT=batch.positions_BT,
                documents_BT=batch.documents_BT,
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
        grad_norm = self.grad_norm() / self.loss_scale.value
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            self._scale_gradients(self._clip_factor(grad_norm) / self.loss_scale.value)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.loss_scale.update(overflowed=skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, skipped)

    def grad_norm(self) -> float:
        """Global 2-norm of the accumulated gradients, equal on all ranks.

        Accumulated in fp64: `torch.nn.utils.clip_grad_norm_` in fp32 on a CPU is 2.6e-5 off, which
        alone moves a loss curve more than any strategy does.
        """
        gradients = self._gradients()
        if not gradients:
            return 0.0
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        return float(torch.stack(norms).norm())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for _, p in self.named_parameters() if p.grad is not None]

    def _clip_factor(self, grad_norm: float) -> float:
        limit = self.train.grad_clip
        return limit / grad_norm if limit and grad_norm > limit else 1.0

    def _scale_gradients(self, factor: float) -> None:
        gradients = self._gradients()
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def full_gradients(self) -> dict[str, Tensor]:
        """Raw gradients between `backward` and `step`, whole, by FQN; for parity and debugging.

        fp32 (fp64 in fp64 runs), on the CPU; parameters without a gradient are left out.
        """
        return {
            name: (p.grad.detach() / self.loss_scale.value).cpu()
            for name, p in self.named_parameters()
            if p.grad is not None
        }

    # -- state ------------------------------------------------------------------------------

    def state(self) -> Iterator[Piece]:
        """Yields what this rank writes: `model.<fqn>` and `optim.<fqn>.{exp_avg,exp_avg_sq,step}`.

        Every element of every tensor is yielded by exactly one rank; here all of it by rank 0.
        """
        if not self.world.is_main:
            return
        for name, parameter in self.named_parameters():
            yield _whole(f"model.{name}", parameter.detach())
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                yield _whole(f"optim.{name}.{key}", torch.as_tensor(value).detach())

    def load_state(self, source: StateSource) -> None:
        """Reads this rank's part of a checkpoint, in place.

        Raises:
            CheckpointError: names or shapes are not this model's; nothing was changed then.
        """
        parameters = dict(self.named_parameters())
        check_names({name: tuple(p.shape) for name, p in parameters.items()}, source)
        with torch.no_grad():
            for name, parameter in parameters.items():
                shape = tuple(parameter.shape)
                start = (0,) * len(shape)
                parameter.copy_(source.read(f"model.{name}", start, shape))
                if f"optim.{name}.step" not in source.names():
                    self.optimizer.state.pop(parameter, None)
                    continue
                state: dict[str, Tensor] = {
                    key: source.read(f"optim.{name}.{key}", start, shape).to(parameter)
                    for key in _MOMENTS
                }
                step = source.read(f"optim.{name}.step", (), ())
                # The fused kernel wants its counter on the device, the others on the CPU.
                fused = self.optimizer.param_groups[0].get("fused")
                state["step"] = step.to(parameter.device) if fused else step
                self.optimizer.state[parameter] = state

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds between steps: parameters and optimizer; gradients in the step."""
        parameters = [p for _, p in self.named_parameters()]
        optimizer = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return {
            "parameters_bytes": _bytes(parameters),
            "gradients_bytes": _bytes(p for p in parameters if p.requires_grad),
            "optimizer_bytes": _bytes(optimizer),
        }

    def close(self) -> None:
        """Releases engines and groups of its own; also called after an exception."""


def _whole(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_names(shapes: dict[str, tuple[int, ...]], source: StateSource) -> None:
    """Refuses a checkpoint of another model. `shapes` are the global shapes by FQN."""
    stored = source.names()
    parameters = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    moments = {f"optim.{name}.{key}" for name in shapes for key in (*_MOMENTS, "step")}
    unknown = {name for name in stored if name.startswith("optim.")} - moments
    for problem, odd in (
        ("lacks", sorted(set(shapes) - parameters)),
        ("has, but this model lacks,", sorted(parameters - set(shapes))),
        ("has, but this optimizer lacks,", sorted(unknown)),
    ):
        if odd:
            raise CheckpointError(
                f"the checkpoint {problem} {odd[0]} (and {len(odd) - 1} more): it is of another "
                "architecture; use the config in its run folder"
            )
    for name, shape in shapes.items():
        wanted = {f"model.{name}": shape}
        if f"optim.{name}.step" in stored:
            wanted |= {f"optim.{name}.{key}": shape for key in _MOMENTS}
        for full_name, expected in wanted.items():
            if full_name not in stored or source.shape(full_name) != expected:
                found = source.shape(full_name) if full_name in stored else "nothing"
                raise CheckpointError(
                    f"the checkpoint has {found} for {full_name}, this model wants {expected}: it "
                    "is of another architecture; use the config in its run folder"
                )
