"""The same loss, shown: one training task run by any strategy, and how far two runs are apart.

The task is synthetic and hard on a strategy: tied embeddings, clipping that bites, targets padded
raggedly (so ranks hold different numbers of tokens), and an odd vocabulary (so shards are unequal).
Raw gradients are compared too: Adam hides a constant factor in them, and a loss curve alone would
not show it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalellm import checkpoint, data, strategies
from scalellm.batches import Batch
from scalellm.config import BatchPlan, ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, sum_over_ranks
from scalellm.model import Decoder
from scalellm.train.optimizer import make_adamw

# Largest relative difference allowed: fp64 shows the algorithm, fp32 what a user sees.
TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5}


@dataclass(frozen=True)
class Variant:
    """A strategy with options; `precision` is the one its parity is held to.

    `micro_batch`: rows at once, for a strategy that needs several micro-batches a step.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp64"
    worlds: tuple[int, ...] = (1, 2, 4)
    micro_batch: int | None = None


def _zero(stage: int, name: str = "deepspeed", **options: Any) -> Variant:
    """Small parameters are divided too: otherwise a small model would not be divided at all."""
    options = {"stage": stage, **({"persistent_elements": 0} if stage == 3 else {}), **options}
    return Variant(name, options, "fp32")


def _mesh(**sizes: int) -> Variant:
    """What is left of the ranks are replicas."""
    least = math.prod(sizes.values())
    return Variant("parallel", {"mesh": sizes}, worlds=tuple(n for n in (2, 4) if n % least == 0))


def _pipe(schedule: str, **sizes: int) -> Variant:
    """Two ranks behind one another."""
    mesh = _mesh(pp=2, **sizes)
    return replace(mesh, options={**mesh.options, "schedule": schedule}, micro_batch=1)


VARIANTS = {
    "single": Variant("single", worlds=(1,)),
    "ddp": Variant("ddp"),
    "ddp-zero1": Variant("ddp", {"shard_optimizer": True}),
    "fsdp": Variant("fsdp"),
    "fsdp-no-reshard": Variant("fsdp", {"reshard_after_forward": False}),
    "fsdp-cpu-offload": Variant("fsdp", {"cpu_offload": True}),
    "hsdp": Variant("fsdp", {"shard_ranks": 2}, worlds=(2, 4)),
    "deepspeed-0": _zero(0),
    "deepspeed-1": _zero(1),
    "deepspeed-2": _zero(2),
    "deepspeed-3": _zero(3),
    "deepspeed-2-offload": _zero(2, offload_optimizer="cpu"),
    "deepspeed-3-offload": _zero(3, offload_optimizer="cpu"),
    "deepspeed-3-offload-both": _zero(3, offload_optimizer="cpu", offload_param="cpu"),
    "tp": _mesh(tp=2),
    "tp-whole-rows": Variant(
        "parallel", {"mesh": {"tp": 2}, "sequence_parallel": False}, worlds=(2, 4)
    ),
    "tp-fsdp": _mesh(tp=2, fsdp=2),
    "cp": _mesh(cp=2),
    "pp": _pipe("1f1b"),
    "pp-interleaved": _pipe("interleaved"),
    "pp-zero-bubble": _pipe("zero_bubble"),
    "pp-fsdp": _pipe("1f1b", fsdp=2),
    "pp-tp": _pipe("1f1b", tp=2),
    "pp-cp": _pipe("1f1b", cp=2),
    "cp-4": _mesh(cp=4),
    "cp-ulysses": Variant("parallel", {"mesh": {"cp": 2}, "context": "ulysses"}, worlds=(2, 4)),
    "cp-fsdp": _mesh(cp=2, fsdp=2),
    "cp-tp": _mesh(cp=2, tp=2),
    "accelerate-ddp": Variant("accelerate", {"backend": "ddp"}, "fp32"),
    "accelerate-deepspeed": _zero(2, "accelerate", backend="deepspeed"),
}


# What changes the loss on purpose: shown beside the others, promised nothing.
REPORTED = {
    "ddp-bf16": Variant("ddp", {"compression": "bf16"}, "fp32"),
    "ddp-fp16": Variant("ddp", {"compression": "fp16"}, "fp32"),
    "ddp-powersgd": Variant("ddp", {"compression": "powersgd", "powersgd_start_step": 2}, "fp32"),
}


@dataclass(frozen=True)
class Task:
    """What is trained. `micro_batch` None: the whole share of a rank at once."""

    model: ModelConfig
    steps: int
    precision: str = "fp64"
    global_batch: int = 8
    micro_batch: int | None = None
    learning_rate: float = 1e-2
    grad_clip: float = 0.3

    def of(self, variant: Variant) -> Task:
        """The same task in the micro-batches that the variant needs."""
        return replace(self, micro_batch=variant.micro_batch or self.micro_batch)

    def train_config(self) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "steps": self.steps,
                "precision": self.precision,
                "learning_rate": self.learning_rate,
                "grad_clip": self.grad_clip,
                "global_batch_size": self.global_batch,
                "micro_batch_size": self.micro_batch,
            }
        )


@dataclass
class Curve:
    """What a run leaves; `gradients` are the raw ones of its first step, whole."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


def check_task(task: Task, config: StrategyConfig, world: World) -> strategies.Options:
    """Returns the strategy's options. Raises ConfigError if it cannot train the task here."""
    train, strategy = task.train_config(), strategies.resolve(config.name)
    options = strategies.parse_options(config, strategy, world, train)
    readers = strategy.data_rank(options, world).world_size
    plan = BatchPlan.of(task.global_batch, task.micro_batch, readers)
    strategy.check_model(options, world, train, task.model, plan)
    return options


def tokens_of(step: int, task: Task) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets, (global batch, T), of a step: arithmetic that can be learned."""
    vocab_size, seq_len = task.model.vocab_size or 0, task.model.seq_len
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, vocab_size, (task.global_batch, 1), generator=generator)
    tokens = (start + 7 * torch.arange(seq_len + 1)) % vocab_size
    targets = tokens[:, 1:].clone()
    for row in range(task.global_batch):
        targets[row, seq_len - row * seq_len // (2 * task.global_batch) :] = -100
    return tokens[:, :-1], targets


def build(
    task: Task, name: str, options: dict[str, Any], world: World, model: Decoder | None = None
) -> strategies.Strategy:
    """Returns a strategy that is set up with the task's model, or the one given."""
    train, strategy_class = task.train_config(), strategies.resolve(name)
    config = StrategyConfig.model_validate({"name": name, **options})
    strategy = strategy_class(world, train, check_task(task, config, world))
    if model is None:
        with torch.device("meta"):
            model = Decoder(task.model)
    torch.manual_seed(0)
    strategy.setup(model, functools.partial(make_adamw, train=train))
    return strategy


def train_steps(
    strategy: strategies.Strategy, task: Task, world: World, steps: range, *, gradients: bool = True
) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """Yields (loss, gradient norm, raw gradients of the first of the steps) of each step.

    `gradients` False leaves the raw ones out: gathering them costs the memory of the whole model.
    """
    plan = BatchPlan.of(task.global_batch, task.micro_batch, strategy.data.world_size)
    for step in steps:
        tokens, targets = (tensor.to(world.device) for tensor in tokens_of(step, task))
        num_tokens = int((targets != -100).sum())
        loss_sum = 0.0
        for rows, is_last in _rows(plan, strategy.data.rank):
            with strategy.micro_step(is_last):
                loss = strategy.forward(Batch(tokens[rows], targets[rows]))
                strategy.backward(loss, num_tokens)
            loss_sum += float(loss.detach())
        raw = strategy.full_gradients() if gradients and step == steps.start else {}
        grad_norm = strategy.step(task.learning_rate).grad_norm
        yield sum_over_ranks([loss_sum], world.device)[0] / num_tokens, grad_norm, raw


def _rows(plan: BatchPlan, rank: int) -> Iterator[tuple[slice, bool]]:
    start = rank * plan.micro_batch_size * plan.grad_accumulation
    for index in range(plan.grad_accumulation):
        begin = start + index * plan.micro_batch_size
        yield slice(begin, begin + plan.micro_batch_size), index == plan.grad_accumulation - 1


def run_curve(
    task: Task,
    name: str,
    options: dict[str, Any],
    world: World,
    *,
    load: Path | None = None,
    save: Path | None = None,
    save_at: int | None = None,
) -> Curve:
    """Trains the task, from a checkpoint at `load` if given; saves one to `save` on the way.

    `save_at` is the step of that checkpoint; None: half of the task's steps.
    """
    strategy = build(task, name, options, world)
    try:
        first = 0
        if load is not None:
            source = checkpoint.open_checkpoint(load)
            strategy.load_state(source)
            first = source.step
        curve = Curve()
        save_at = task.steps // 2 if save_at is None else save_at
        rows = train_steps(strategy, task, world, range(first, task.steps))
        for step, (loss, grad_norm, gradients) in enumerate(rows, start=first + 1):
            curve.losses.append(loss)
            curve.grad_norms.append(grad_norm)
            curve.gradients = curve.gradients or gradients
            if save is not None and step == save_at:
                checkpoint.save(save, step, strategy.state(), {}, world, keep=1)
        curve.memory = strategy.memory()
    finally:
        strategy.close()
    return curve


def order_digest(world_size: int, batches: int = 40) -> str:
    """Hash of the tokens of `batches` global batches, half read by `world_size` ranks, half by one.

    The ranks' rows are put together again; the second half goes on from the first one's cursor, in
    mid-epoch. Equal digests mean the same sample order.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _counting_dataset(Path(folder) / "data", num_tokens=20_000)
        digest = hashlib.sha256()
        cursor = None
        for size, count in ((world_size, batches // 2), (1, batches - batches // 2)):
            dataset = data.TokenDataset.open(path)
            streams = [
                data.TokenStream(
                    dataset, seq_len=32, global_batch_size=48, rank=rank, world_size=size,
                    lanes=4, decode_threads=0, cursor=cursor,
                )
                for rank in range(size)
            ]  # fmt: skip
            for _ in range(count):
                parts = [next(stream) for stream in streams]
                for batch, _ in parts:
                    digest.update(batch.tokens_BS.tobytes())
                cursor = parts[0][1]
            for stream in streams:
                stream.close()
    return digest.hexdigest()


def _counting_dataset(path: Path, num_tokens: int) -> Path:
    """Writes a dataset in which every token tells its place."""
    writer = data.DatasetWriter(
        path, vocab_size=num_tokens + 1, eos_id=0, tokenizer_file=None, tokenizer_kind="none",
        frame_tokens=256, shard_tokens=2048,
    )  # fmt: skip
    with writer:
        document = np.arange(1, num_tokens + 1)
        document[-1] = 0
        writer.add("train", document)
        return writer.finish()


def worst_difference(found: Curve, wanted: Curve) -> float:
    """Largest relative difference over losses, gradient norms and raw gradients."""
    return max(differences(found, wanted).values())


def differences(found: Curve, wanted: Curve) -> dict[str, float]:
    """Largest relative differences by kind; raw gradients as norm of the difference over norm."""
    if found.gradients.keys() != wanted.gradients.keys():
        odd = sorted(found.gradients.keys() ^ wanted.gradients.keys())
        raise ValueError(f"gradients of {odd} are on one side only")
    return {
        "loss": _worst(found.losses, wanted.losses),
        "grad_norm": _worst(found.grad_norms, wanted.grad_norms),
        "gradients": max(
            (
                float((found.gradients[name] - gradient).norm() / gradient.norm())
                for name, gradient in wanted.gradients.items()
                if float(gradient.norm())
            ),
            default=0.0,
        ),
    }


def _worst(found: list[float], wanted: list[float]) -> float:
    pairs = zip(found, wanted, strict=True)
    # A NaN compares false with everything: it must not pass as a small difference.
    apart = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs]
    return max(apart, default=0.0)
