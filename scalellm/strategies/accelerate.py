"""`accelerate`: DDP or DeepSpeed as Hugging Face Accelerate sets them up.

Accelerate decides by flags, environment variables and hardware what it becomes, and says nothing
when that is not what was asked: every rank may train alone. So what came of it is compared with
what was asked, and a mismatch stops the run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from scalellm.batches import Batch
from scalellm.config import BatchPlan, TrainConfig, setting
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.strategies import _deepspeed_config
from scalellm.strategies._deepspeed_build import import_deepspeed, load_deepspeed
from scalellm.strategies._state import Piece, StateSource
from scalellm.strategies.base import MakeOptimizer, Options, Sharding, StepResult, Strategy
from scalellm.strategies.ddp import DDP, DDPOptions
from scalellm.strategies.deepspeed import DeepSpeed


class AccelerateOptions(_deepspeed_config.DeepSpeedOptions):
    backend: Literal["ddp", "deepspeed", "fsdp"] = setting(
        "ddp", "what Accelerate sets up; the options of `deepspeed` stand beside it"
    )


class Accelerate(Strategy):
    """Builds through Accelerate and then trains as the strategy of its backend does."""

    options_class = AccelerateOptions
    needs_process_group = True

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        options = cast(AccelerateOptions, options)
        if importlib.util.find_spec("accelerate") is None:
            raise ConfigError(
                "strategy.name=accelerate needs the package accelerate, which is not installed: "
                "pip install 'scalellm[accelerate]'"
            )
        if options.backend == "fsdp":
            raise ConfigError(
                "strategy.backend=fsdp silently becomes DDP on a CPU and is not proven on a GPU; "
                "use strategy.name=fsdp, which is the same FSDP2"
            )
        if options.backend == "deepspeed":
            _deepspeed_config.check(options, train)
            return
        odd = sorted(options.model_fields_set - {"backend"})
        if odd:
            raise ConfigError(
                f"strategy.{odd[0]} is an option of strategy.backend=deepspeed, but "
                f"strategy.backend={options.backend}; leave it out or change the backend"
            )

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        options = cast(AccelerateOptions, options)
        if options.backend != "deepspeed":
            return Sharding()
        return _deepspeed_config.sharding(options, world.world_size, train)

    @classmethod
    def backend_config(
        cls, options: Options, train: TrainConfig, plan: BatchPlan, world: World
    ) -> dict[str, Any] | None:
        options = cast(AccelerateOptions, options)
        is_deepspeed = options.backend == "deepspeed"
        return _deepspeed_config.make_config(options, train, plan) if is_deepspeed else None

    # -- building ---------------------------------------------------------------------------

    environment_before: dict[str, str] = {}  # noqa: RUF012  # replaced, never changed

    def load_libraries(self) -> None:
        super().load_libraries()
        importlib.import_module("accelerate")
        if cast(AccelerateOptions, self.options).backend == "deepspeed":
            load_deepspeed(self.world)

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        options = cast(AccelerateOptions, self.options)
        self.environment_before = _wishes()
        if options.backend == "deepspeed":
            self.inner: Strategy = self._deepspeed(options)
        else:
            self.inner = self._ddp()
        self.inner.loss_scale = self.loss_scale
        self.inner.setup(model, make_optimizer)
        self.module = self.inner.module

    def _ddp(self) -> Strategy:
        accelerate = importlib.import_module("accelerate")
        arguments = accelerate.DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, find_unused_parameters=True
        )
        self.accelerator = _quietly(
            accelerate.Accelerator,
            # Without `cpu` every rank on a machine without a GPU would train alone.
            cpu=self.world.device.type == "cpu",
            mixed_precision="no",  # the loop's own autocast
            kwargs_handlers=[arguments],
        )
        together = "MULTI_CPU" if self.world.device.type == "cpu" else "MULTI_GPU"
        self._compare(together, *(["NO"] if self.world.world_size == 1 else []))
        inner = DDP(self.world, self.train, DDPOptions())
        inner.distribute = self.accelerator.prepare_model
        return inner

    def _deepspeed(self, options: AccelerateOptions) -> Strategy:
        import_deepspeed(self.world)
        accelerate = importlib.import_module("accelerate")
        plan = BatchPlan.of(
            self.train.global_batch_size, self.train.micro_batch_size, self.world.world_size
        )
        config = _deepspeed_config.make_config(options, self.train, plan)
        # Without a GPU: `cpu=True` with this plugin crashes, and without a named backend every rank
        # would train alone.
        group = [] if self.world.device.type == "cuda" else ["gloo"]
        self.accelerator = _quietly(
            accelerate.Accelerator,
            deepspeed_plugin=_plugin(accelerate, config),
            mixed_precision="bf16" if self.train.precision == "bf16" else "no",
            gradient_accumulation_steps=plan.grad_accumulation,
            kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend=name) for name in group],
        )
        self._compare("DEEPSPEED")
        inner = DeepSpeed(self.world, self.train, options)
        inner.initialize = self._prepare_engine
        return inner

    def _prepare_engine(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> Any:
        # Its own `backward` steps at once; the loop needs the gradients in between, so the
        # engine that Accelerate prepares is driven directly.
        engine, _ = self.accelerator.prepare(model, optimizer)
        return engine

    def _compare(self, *wanted_types: str) -> None:
        """Stops the run if Accelerate became something else than what was asked.

        Raises:
            ConfigError: with both sides.
        """
        found, world = self.accelerator, self.world
        is_type = found.distributed_type.value
        wanted_type = is_type if is_type in wanted_types else wanted_types[0]
        pairs = {
            "distributed type": (is_type, wanted_type),
            "number of processes": (found.num_processes, world.world_size),
            "rank": (found.process_index, world.rank),
            "device": (found.device.type, world.device.type),
        }
        for what, (is_now, asked) in pairs.items():
            if is_now != asked:
                self.close()
                raise ConfigError(
                    f"Accelerate became {what} {is_now}, but {asked} was asked of it: training "
                    "would not be what the config says; unset ACCELERATE_* variables and start the "
                    "ranks with torchrun, or use strategy.name=ddp or deepspeed"
                )

    # -- everything else is the backend's ----------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_parameters()

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        return self.inner.micro_step(is_last)

    def forward(self, batch: Batch) -> Tensor:
        return self.inner.forward(batch)

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        self.inner.backward(loss_sum, global_tokens)

    def step(self, learning_rate: float) -> StepResult:
        return self.inner.step(learning_rate)

    def grad_norm(self) -> float:
        return self.inner.grad_norm()

    def full_gradients(self) -> dict[str, Tensor]:
        return self.inner.full_gradients()

    def state(self) -> Iterator[Piece]:
        return self.inner.state()

    def load_state(self, source: StateSource) -> None:
        self.inner.load_state(source)

    def memory(self) -> dict[str, int]:
        return self.inner.memory()

    def close(self) -> None:
        if hasattr(self, "inner"):
            self.inner.close()
            self.__dict__.pop("module", None)
            del self.inner
        self.__dict__.pop("accelerator", None)
        # Accelerate's state is global, and it writes to the environment what it was asked for: the
        # next run in this process must inherit neither.
        for name in _wishes().keys() - self.environment_before.keys():
            del os.environ[name]
        os.environ.update(self.environment_before)
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def _wishes() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


def _quietly(make: Callable[..., Any], **arguments: Any) -> Any:
    """Makes an Accelerator that does not set its own number of threads, nor warn that it does."""
    threads = torch.get_num_threads()
    is_ours = "OMP_NUM_THREADS" not in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        return make(**arguments)
    finally:
        if is_ours:
            del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(threads)


def _plugin(accelerate: Any, config: dict[str, Any]) -> Any:
    """Returns Accelerate's DeepSpeed plugin without its tie to the package transformers."""

    class Plugin(accelerate.DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Would tell transformers how to load a pretrained model; this one is not its."""

    return Plugin(hf_ds_config=config, zero3_init_flag=False)
