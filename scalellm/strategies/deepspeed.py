"""`deepspeed`: ZeRO stages 0 to 3, with offload, by DeepSpeed's engine.

Sources: Rajbhandari et al. 2020, "ZeRO"; Ren et al. 2021, "ZeRO-Offload"; Rajbhandari et al. 2021,
"ZeRO-Infinity".
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from scalellm.config import BatchPlan, TrainConfig
from scalellm.dist import World, local_rank_shown, sum_over_ranks
from scalellm.errors import ConfigError
from scalellm.strategies._deepspeed_build import (
    ASYNC_IO,
    cpu_adam,
    import_deepspeed,
    keeping_linear,
    leave_process_group,
    load_deepspeed,
    prepare,
    replay_steps,
)
from scalellm.strategies._deepspeed_config import DeepSpeedOptions, check, make_config, sharding
from scalellm.strategies._norm import norm_of
from scalellm.strategies._state import Piece, StateSource, check_names, flat_pieces, read_flat
from scalellm.strategies._transforms import apply_transforms
from scalellm.strategies._zero import ZeroState
from scalellm.strategies.base import (
    MakeOptimizer,
    Options,
    Sharding,
    StepResult,
    Strategy,
    is_meta,
)

Initialize = Callable[[nn.Module, torch.optim.Optimizer, dict[str, Any]], Any]


class DeepSpeed(Strategy):
    options_class = DeepSpeedOptions
    needs_process_group = True

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        check(cast(DeepSpeedOptions, options), train)

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        return sharding(cast(DeepSpeedOptions, options), world.world_size, train)

    @classmethod
    def backend_config(
        cls, options: Options, train: TrainConfig, plan: BatchPlan, world: World
    ) -> dict[str, Any]:
        return make_config(cast(DeepSpeedOptions, options), train, plan)

    # -- building ---------------------------------------------------------------------------

    def __init__(self, world: World, train: TrainConfig, options: Options) -> None:
        super().__init__(world, train, options)
        # Who makes the engine; Accelerate puts itself in between.
        self.initialize: Initialize = self._initialize
        self.until_closed = ExitStack()

    def load_libraries(self) -> None:
        super().load_libraries()
        load_deepspeed(self.world)

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        options = cast(DeepSpeedOptions, self.options)
        self.until_closed.enter_context(local_rank_shown(self.world))
        self.until_closed.enter_context(keeping_linear())
        self.gradient_scale = float(self.world.world_size)  # the engine averages over ranks
        deepspeed = import_deepspeed(self.world)
        self.until_closed.callback(leave_process_group)  # also where no engine comes of it
        plan = self.plan()
        self.config = make_config(options, self.train, plan)
        _check_config(self.config, options)
        if options.offload_optimizer == "nvme":
            prepare(ASYNC_IO, self.world)
        self._initial = torch.get_rng_state() if is_meta(model) else None
        self.model = self._partitioned(model, deepspeed) if options.stage == 3 else model
        if options.stage < 3:
            self.model = self.place(model)
        apply_transforms(self.model, self.train)
        with _shaped(self.model):
            optimizer = make_optimizer(self.named_parameters())
        if options.offload_optimizer != "none" and options.cpu_adam == "deepspeed":
            optimizer = cpu_adam(optimizer, self.world)
        self.engine = self.initialize(self.model, optimizer, self.config)
        self.module = self.engine
        self.optimizer: Any = self.engine.optimizer
        self.zero: ZeroState | None = None
        if options.stage:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            self.zero = ZeroState(self.optimizer, options.stage, names)
            self._set_masters()

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> Any:
        deepspeed = importlib.import_module("deepspeed")
        arguments = {"model": model, "optimizer": optimizer, "config": config}
        return deepspeed.initialize(**arguments, dist_init_required=False)[0]

    def _set_masters(self) -> None:
        """Starts fp32 master weights from the initial values, not from those rounded to bf16."""
        assert self.zero is not None
        if self.train.precision == "bf16" and self._initial is not None:
            torch.set_rng_state(self._initial)
            with _shaped(self.model):
                self.zero.fill(cast(Any, self.model).initial_weights())

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None  # in bf16 the engine's own weights are

    def plan(self) -> BatchPlan:
        return BatchPlan.of(
            self.train.global_batch_size, self.train.micro_batch_size, self.world.world_size
        )

    def _partitioned(self, model: nn.Module, deepspeed: Any) -> nn.Module:
        """Divides the parameters among the ranks one by one: no rank ever holds them all."""
        dtype = torch.bfloat16 if self.train.precision == "bf16" else torch.float32
        values = cast(Any, model).initial_weights() if is_meta(model) else None
        for name, parameter in list(model.named_parameters()):
            if values is not None:
                value = next(values)[1].to(self.world.device, dtype)
                parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner).register_parameter(key, parameter)
            else:
                parameter.data = parameter.data.to(self.world.device, dtype)
            carrier = nn.Module()
            carrier.register_parameter("parameter", parameter)
            deepspeed.zero.Init(module=carrier, config_dict_or_path=self.config, dtype=dtype)
        return model

    # -- one optimizer step -----------------------------------------------------------------

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        scale = self.gradient_scale / global_tokens
        self.engine.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        if self.zero is None:
            return super().step(learning_rate)
        grad_norm = self.grad_norm()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed clips by a norm of its own in fp32; dividing by a "loss scale" instead clips by
        # ours, in fp64, at every stage and offload alike. It skips non-finite gradients itself.
        self.optimizer.override_loss_scale(1.0 / self._clip_factor(grad_norm))
        self.engine.step()
        self.optimizer.override_loss_scale(1.0)
        self.zero.clear_gradients()
        return StepResult(grad_norm, skipped=not self.engine.was_step_applied())

    def grad_norm(self) -> float:
        if self.zero is None:
            return super().grad_norm()
        local = norm_of([part for part in self.zero.gradients() if part.numel()])
        [squares] = sum_over_ranks([local * local], self.world.device)
        return math.sqrt(squares) if squares >= 0 else math.nan

    def full_gradients(self) -> dict[str, Tensor]:
        if self.zero is None:
            return super().full_gradients()
        slots = {slot.name: slot for slot in self.zero.slots}
        result: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = _shape_of(parameter)
            whole = torch.zeros(math.prod(shape), device=self.world.device)
            if name in slots:
                slot = slots[name]
                whole[slot.start : slot.stop] = self.zero.gradient_of(slot)
            tdist.all_reduce(whole)
            result[name] = whole.view(shape).cpu()
        return result

    # -- state ------------------------------------------------------------------------------

    def state(self) -> Iterator[Piece]:
        if self.zero is None:
            yield from super().state()
            return
        yield from self.zero.pieces()
        for index, (name, parameter) in enumerate(self._frozen()):
            if is_partitioned(parameter):
                flat, start, stop = _own_part(parameter)
                shape = _shape_of(parameter)
                yield from flat_pieces(f"model.{name}", flat.float(), shape, start, stop)
            elif self.writes(index):
                shape = tuple(parameter.shape)
                yield Piece(f"model.{name}", parameter.detach().float(), shape, (0,) * len(shape))

    def load_state(self, source: StateSource) -> None:
        if self.zero is None:
            super().load_state(source)
            return
        check_names({name: _shape_of(p) for name, p in self.named_parameters()}, source)
        inner = self.optimizer.optimizer
        is_cpu_adam = type(inner).__name__ == "DeepSpeedCPUAdam"
        steps = self.zero.load(
            source,
            counts_in_ints=is_cpu_adam,
            steps_on_device=bool(inner.param_groups[0].get("fused")),
        )
        if is_cpu_adam:
            replay_steps(inner, steps)
        with torch.no_grad():
            for name, parameter in self._frozen():
                if is_partitioned(parameter):
                    flat, start, stop = _own_part(parameter)
                    read_flat(source, f"model.{name}", flat, _shape_of(parameter), start, stop)
                else:
                    self._read_into(parameter, source, f"model.{name}", self.begin_of(parameter))

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if not p.requires_grad)

    def memory(self) -> dict[str, int]:
        return super().memory() if self.zero is None else self.zero.memory(self.model)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.destroy()
            del self.engine, self.module, self.optimizer, self.zero, self.model
        self.until_closed.close()


def _check_config(config: dict[str, Any], options: DeepSpeedOptions) -> None:
    """Lets DeepSpeed read the configuration before anything is allocated."""
    try:
        importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig(config)
    except Exception as error:
        if options.config is None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"DeepSpeed refuses strategy.config={options.config}: {' '.join(lines[:3])[:300]}"
        ) from None


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


@contextmanager
def _shaped(model: nn.Module) -> Iterator[None]:
    """Lets parameters show their shapes, in no memory: stage 3 leaves empty vectors in their place.

    An optimizer that treats matrices and vectors differently would take them all for vectors.
    """
    empty = {p: p.data for p in model.parameters() if is_partitioned(p)}
    for parameter, data in empty.items():
        parameter.data = data.new_zeros(()).expand(_shape_of(parameter))
    yield
    for parameter, data in empty.items():
        parameter.data = data


def _shape_of(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def _own_part(parameter: Any) -> tuple[Tensor, int, int]:
    """This rank's range of a parameter that stage 3 divides, without padding."""
    part = parameter.ds_tensor.data.view(-1)
    start = part.numel() * tdist.get_rank(parameter.ds_process_group)
    stop = max(start, min(start + part.numel(), parameter.ds_numel))
    return part[: stop - start], start, stop
