"""The cells of a sweep: which there are, what each of them trains, which cannot be."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from _held import parameters_of_fullest

from scalellm import strategies
from scalellm.config import Config, parse_config
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.model import count_parameters, flops_per_token
from scalellm.parity import REPORTED, VARIANTS, Variant
from scalellm.train import check_config

ALL_VARIANTS = VARIANTS | REPORTED
# A larger tokenizer takes minutes to train and changes no figure: the model keeps its vocabulary.
LARGEST_TOKENIZER = 8192
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "seq_len": 64, "vocab_size": 512},
    "3m": {"preset": "stdlib-small", "vocab_size": 8192},
    "13m": {"preset": "cpu-bench"},
    "124m": {"preset": "gpt2-124m"},
}


class Gemm(NamedTuple):
    """What a cell's model FLOPs are compared with: `threads` are those of each process."""

    precision: str
    threads: int
    world_size: int

    def __str__(self) -> str:
        return f"GEMM {self.precision}, {self.world_size} x {self.threads} threads"


@dataclass(frozen=True)
class Cell:
    """One combination; batch in samples of `seq_len` tokens."""

    size: str
    variant: str
    world_size: int
    precision: str
    compile: bool
    activation_checkpointing: str
    scaling: str
    global_batch_size: int
    seq_len: int
    threads_per_rank: int
    device: str = "auto"

    @classmethod
    def of(cls, described: dict[str, Any]) -> Cell:
        """The cell that `describe` was asked of."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in described.items() if key in known})

    @property
    def id(self) -> str:
        how = "compile" if self.compile else "eager"
        parts = [
            self.size,
            f"{self.variant}@{self.world_size}",
            self.precision,
            how,
            self.activation_checkpointing,
        ]
        return "/".join([*parts, "weak"] if self.scaling == "weak" else parts)

    @property
    def gemm(self) -> Gemm:
        return Gemm(self.precision, self.threads_per_rank, self.world_size)

    @property
    def tokenizer_size(self) -> int:
        return min(self.config(1).model.vocab_size or 0, LARGEST_TOKENIZER)

    @property
    def parameters(self) -> int:
        return count_parameters(self.config(1).model)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config(1).model)

    def config(self, steps: int, data: Path = Path("data")) -> Config:
        """The run's configuration but for `run.dir`, which differs from repeat to repeat.

        Raises:
            ConfigError: no such run can be, whatever the world.
        """
        variant = ALL_VARIANTS[self.variant]
        return parse_config(
            {
                "run": {"threads": self.threads_per_rank, "device": self.device},
                "data": {"path": str(data)},
                "model": {**SIZES[self.size], "seq_len": self.seq_len},
                "strategy": {"name": variant.name, **variant.options},
                "train": {
                    "steps": steps,
                    "global_batch_size": self.global_batch_size,
                    "micro_batch_size": self._micro_batch(variant),
                    "precision": self.precision,
                    "compile": self.compile,
                    "activation_checkpointing": self.activation_checkpointing,
                    "learning_rate": 1e-3,
                    "warmup_steps": min(10, steps),
                },
                # The one at the end; in the background it would hold a copy of the state.
                "checkpoint": {"asynchronous": False, "keep": 1},
                "metrics": {"tensorboard": False, "predict_memory": False},
            },
            source=self.id,
        )

    def _micro_batch(self, variant: Variant) -> int | None:
        """A pipeline needs several a step: eight for each of its ranks together, if there are."""
        mesh = variant.options.get("mesh", {})
        if variant.micro_batch is None:
            return None
        replicas = self.world_size // math.prod(mesh.values())
        readers = max(1, replicas * mesh.get("fsdp", 1))
        return max(1, self.global_batch_size // readers // 8)

    def skip_reason(self) -> str | None:
        """The sentence that says why this cell cannot be; None if nothing speaks against it."""
        world = World(world_size=self.world_size, launcher=f"--nproc {self.world_size}")
        try:
            check_config(self.config(1), world)
        except ConfigError as error:
            return str(error)
        return None

    def theory_bytes(self) -> int:
        """Parameters, gradients and AdamW's state of one rank, each divided as the strategy says.

        Temporary and gathered values and activations are not in it.
        """
        config = self.config(1)
        strategy = strategies.resolve(config.strategy.name)
        world = World(world_size=self.world_size, local_world_size=self.world_size)
        options = strategies.parse_options(config.strategy, strategy, world, config.train)
        sharding = strategy.sharding(options, world, config.train)
        full_bytes = 8 if self.precision == "fp64" else 4
        working_bytes = sharding.working_bytes or full_bytes
        # ZeRO 1 and 2 update a master copy of their part of the weights, in fp32 too.
        has_masters = bool(sharding.working_bytes) or getattr(options, "stage", None) in (1, 2)
        bytes_per_parameter = (
            working_bytes / sharding.parameters
            + working_bytes / sharding.gradients
            + (3 if has_masters else 2) * full_bytes / sharding.optimizer
        )
        variant = ALL_VARIANTS[self.variant]
        return int(bytes_per_parameter * parameters_of_fullest(variant, config.model))

    def describe(self) -> dict[str, Any]:
        """What the report says of a cell whether or not it ran."""
        return {
            "id": self.id,
            "size": self.size,
            "parameters": self.parameters,
            "variant": self.variant,
            "world_size": self.world_size,
            "threads_per_rank": self.threads_per_rank,
            "precision": self.precision,
            "compile": self.compile,
            "activation_checkpointing": self.activation_checkpointing,
            "global_batch_size": self.global_batch_size,
            "seq_len": self.seq_len,
            "scaling": self.scaling,
        }


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations, those to be compared with each other next to each other.

    A world of one scales neither way: with `--scaling both` it is there once, as strong.
    """
    return list(dict.fromkeys(_combinations(args)))


def _combinations(args: argparse.Namespace) -> Iterator[Cell]:
    scalings = ["strong", "weak"] if args.scaling == "both" else [args.scaling]
    for size, precision, compiles, activations, scaling, variant, world in itertools.product(
        args.sizes,
        args.precisions,
        args.compile,
        args.activation_checkpointing,
        scalings,
        args.variants,
        args.worlds,
    ):
        if args.scaling == "both" and scaling == "weak" and world == 1:
            continue
        yield Cell(
            size=size,
            variant=variant,
            world_size=world,
            precision=precision,
            compile=compiles == "on",
            activation_checkpointing=activations,
            scaling=scaling,
            global_batch_size=args.batch * (world if scaling == "weak" else 1),
            seq_len=args.seq_len or _seq_len(size),
            threads_per_rank=max(1, args.threads // world),
            device=args.device,
        )


def _seq_len(size: str) -> int:
    return parse_config({"model": SIZES[size]}).model.seq_len


class Task(NamedTuple):
    """A thing to do, once: "gemm", "run" or "profile" of `what`; repeats count from 1."""

    kind: str
    what: Gemm | Cell
    repeat: int

    @property
    def key(self) -> tuple[str, str, int]:
        name = self.what.id if isinstance(self.what, Cell) else str(self.what)
        return self.kind, name, self.repeat

    def __str__(self) -> str:
        kind, name, repeat = self.key
        return f"{name} profile" if kind == "profile" else f"{name} repeat {repeat}"


def schedule(cells: list[Cell], repeats: int, *, profile: bool) -> list[Task]:
    """A B B A: every second repeat goes backwards, so that drift meets all cells alike.

    Profiles come last: they are slower than what they profile, and no repeat should follow them.
    """
    gemms = list(dict.fromkeys(cell.gemm for cell in cells))
    tasks: list[Task] = []
    for repeat in range(1, repeats + 1):
        found = [Task("gemm", gemm, repeat) for gemm in gemms]
        found += [Task("run", cell, repeat) for cell in cells]
        tasks += found if repeat % 2 else reversed(found)
    return tasks + [Task("profile", cell, 1) for cell in cells if profile and cell.world_size > 1]
