"""The strategy that is set up on fake tensors, and the steps it takes; see `_record`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from scalellm.batches import Batch
from scalellm.config import Config
from scalellm.dist import World
from scalellm.plan._buckets import Buckets, broadcast_buffers
from scalellm.plan.live import Kind, LiveBytes, local_of
from scalellm.strategies import Strategy
from scalellm.strategies._mesh import ParallelOptions
from scalellm.strategies.base import Options
from scalellm.strategies.ddp import DDP, DDPOptions
from scalellm.strategies.deepspeed import DeepSpeed
from scalellm.train.optimizer import make_adamw

# The block that stands for any number of blocks: neither it nor its neighbours in a forward or a
# backward are the first or the last of `FEW_LAYERS`.
FEW_LAYERS, MIDDLE = 5, 2
STEP = "step"
FIRST, LAST = "first", "last"  # micro-batch


class Step:
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
        is_ddp = strategy_class not in (Strategy, DeepSpeed) and config.strategy.name in (
            "ddp",
            "accelerate",
        )
        chosen = options if isinstance(options, DDPOptions) else DDPOptions()
        if is_ddp:
            self.strategy: Strategy = _BareDDP(world, config.train, chosen)
        else:
            self.strategy = strategy_class(world, config.train, options)
        self.without_values()
        self.strategy.setup(model, functools.partial(make_adamw, train=config.train))
        self.named = dict(self.strategy.named_parameters())
        if is_ddp:
            self.buckets = Buckets(list(self.named.values()), chosen)
            self.buckets.live = live
            live.call("gradients", self.buckets.tensors)
        self.call_parameters()
        self.has_pipeline = isinstance(options, ParallelOptions) and options.mesh.pp > 1
        for index, block in _blocks(self.strategy.model):
            self._mark_passes(block, index)

    def take(self, rows: int, micro_batches: int, device_type: str) -> None:
        """Takes an optimizer step as the training loop does, without its numbers."""
        strategy, live = self.strategy, self.live
        cast(Any, strategy).grad_norm = functools.partial(self.grad_norm, device_type)
        live.mark(STEP)
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
            self.call_buffers()
            live.call_rest("activations")
            live.mark(f"{self.part} loss")
            strategy.backward(loss, global_tokens=1)
        live.call("gradients", self.gradients())

    # -- what a strategy of another kind does differently ------------------------------------

    def without_values(self) -> None:
        _without_values(self.strategy)

    def call_parameters(self) -> None:
        """Says what the strategy has set up."""
        self.live.call("parameters", (p for _, p in self.strategy.named_parameters()))

    def call_buffers(self) -> None:
        """Says what of that which is there after a forward is not kept for the backward."""

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.named.values() if p.grad is not None]

    def grad_norm(self, device_type: str) -> float:
        """Clips, whatever the norm. On a CPU torch casts a half gradient whole to sum in fp64."""
        self.cast_gradients(device_type)
        return 2.0 * (self.config.train.grad_clip or 1.0) * self.strategy.loss_scale.value

    def cast_gradients(self, device_type: str) -> None:
        for gradient in self.gradients():
            if device_type == "cpu" and gradient.dtype != torch.float32:
                local_of(gradient).to(torch.float64)

    # -- the rest ---------------------------------------------------------------------------

    def _mark_passes(self, block: nn.Module, index: int) -> None:
        """Marks where a block's forward begins, and where its backward does."""

        def forward(module: nn.Module, inputs: Any) -> None:
            self.live.mark(f"{self.part} forward {index}")

        def backward(gradient: Tensor) -> None:
            self.live.mark(f"{self.part} backward {index}")

        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.has_pipeline:  # no moment between all forwards and all backwards
                self.live.call_rest("activations")
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

    def _batch(self, rows: int) -> Batch:
        tokens = torch.zeros(rows, self.config.model.seq_len + 1, dtype=torch.long)
        documents = torch.zeros_like(tokens) if self.config.data.document_mask else None
        return Batch(
            tokens_BT=tokens[:, :-1],
            targets_BT=tokens[:, 1:],
            positions_BT=None if documents is None else documents[:, 1:],
            documents_BT=None if documents is None else documents[:, 1:],
        )


def _blocks(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The decoder's blocks that a rank holds, by their number in the whole of it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "layers":
            yield from ((int(index), block) for index, block in module.named_children())


class _BareDDP(DDP):
    """DDP without its module, whose C++ reads values; `Buckets` hold what it would."""

    def wrap(self, model: nn.Module) -> nn.Module:
        broadcast_buffers([*model.parameters(), *model.buffers()])
        return model


def _without_values(strategy: Strategy) -> None:
    """Replaces what would read or write numbers, in this one object."""
    changed = cast(Any, strategy)
    changed.part_of = lambda tensor: (local_of(tensor), (0,) * tensor.dim())
    if hasattr(strategy, "_make_mesh"):
        make_mesh = strategy._make_mesh

        def real_mesh(shard_ranks: int | None) -> Any:
            with unset_fake_temporarily():
                return make_mesh(shard_ranks)

        changed._make_mesh = real_mesh
