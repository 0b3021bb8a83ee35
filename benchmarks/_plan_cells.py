"""The cells of the planner's table: which there are, and what each of them trains."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _sweep_cells import ALL_VARIANTS

from scalellm.config import Config, parse_config
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.train import check_config

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 2048},
    "narrow": {"num_layers": 6, "hidden_size": 448, "num_heads": 7, "vocab_size": 8192},
    "broad": {"num_layers": 2, "hidden_size": 1024, "num_heads": 16, "vocab_size": 8192},
    "60m": {"num_layers": 8, "hidden_size": 704, "num_heads": 11, "vocab_size": 16384},
    "wide": {"num_layers": 3, "hidden_size": 1152, "num_heads": 18, "vocab_size": 16384},
    "deep": {"num_layers": 24, "hidden_size": 448, "num_heads": 7, "vocab_size": 8192},
}
VARIANTS = "single,ddp,fsdp,deepspeed-1,deepspeed-2,deepspeed-3"
# The whole table: all that differ in what a rank holds.
ALL = {
    "variants": "single,ddp,ddp-zero1,accelerate-ddp,fsdp,deepspeed-1,deepspeed-2,deepspeed-3",
    "worlds": "1,2,4",
    "shapes": "narrow,broad",
    "seq_lens": "128,256",
    "checkpointing": "none,full",
    "micro_batch": 2,
}


@dataclass(frozen=True)
class Cell:
    """One run; `micro_batch` in samples, `accumulation` micro-batches a step."""

    variant: str
    world_size: int
    shape: str
    seq_len: int
    checkpointing: str
    precision: str
    micro_batch: int
    accumulation: int

    @property
    def id(self) -> str:
        times = f"x{self.accumulation}" if self.accumulation > 1 else ""
        return (
            f"{self.variant}@{self.world_size}/{self.shape}/{self.micro_batch}{times}x"
            f"{self.seq_len}/{self.precision}/{self.checkpointing}"
        )

    def config(self, steps: int = 3, data: Path = Path("data")) -> Config:
        variant = ALL_VARIANTS[self.variant]
        rows = self.micro_batch * self.accumulation * self.world_size
        return parse_config(
            {
                "run": {"threads": 1, "device": "cpu"},
                "data": {"path": str(data)},
                "model": {**SHAPES[self.shape], "seq_len": self.seq_len},
                "strategy": {"name": variant.name, **variant.options},
                "train": {
                    "steps": steps,
                    "global_batch_size": rows,
                    "micro_batch_size": self.micro_batch,
                    "precision": self.precision,
                    "activation_checkpointing": self.checkpointing,
                },
                "checkpoint": {"asynchronous": False, "keep": 1},
                "metrics": {"tensorboard": False},
            },
            source=self.id,
        )


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All combinations that can be; a part from the front has all variants in it."""
    numbers = (args.seq_lens, args.accumulations, args.worlds)
    seq_lens, accumulations, worlds = ([int(n) for n in text.split(",")] for text in numbers)
    words = (args.shapes, args.checkpointing, args.precisions, args.variants)
    shapes, modes, precisions, variants = (text.split(",") for text in words)
    cells = [
        Cell(variant, world, shape, seq_len, mode, precision, args.micro_batch, times)
        for precision, times, seq_len, shape, mode, variant, world in itertools.product(
            precisions, accumulations, seq_lens, shapes, modes, variants, worlds
        )
    ]
    return [cell for cell in cells if _can_be(cell)]


def _can_be(cell: Cell) -> bool:
    try:
        check_config(cell.config(), World(world_size=cell.world_size, launcher="--nproc"))
    except ConfigError:
        return False
    return True
