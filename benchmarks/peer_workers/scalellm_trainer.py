"""`scalellm train` whole, with its shipped options: loader, guards, metrics, checkpoints.

It is the command itself, run in this process with one more writer of metrics, which waits for its
turn when it is given a step's row. So a turn is whole steps, and the clock sees all that a user
pays for, checkpoints too. The data is read by our own loader from our own shards, in the order that
the driver wrote out for all others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from _worker import Gate, Task

from scalellm import cli
from scalellm.config import ModelConfig
from scalellm.model import count_parameters, flops_per_token
from scalellm.train import build

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "single.yaml"


class Turns:
    """A `Writer` that waits for the next turn after each step."""

    def __init__(self, model: ModelConfig) -> None:
        self._losses: list[float] = []
        size = {"parameters": count_parameters(model), "flops_per_token": flops_per_token(model)}
        self._gate = Gate(size, ("scalellm",), self._take_losses)

    def begin(self) -> None:
        self._gate.wait()

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            self._losses.append(row["loss"])
            self._gate.wait()

    def close(self) -> None:
        """Nothing is open."""

    def _take_losses(self) -> list[float]:
        told, self._losses = self._losses, []
        return told


def model_config(task: Task) -> dict[str, int]:
    return {
        "num_layers": task.num_layers,
        "hidden_size": task.hidden_size,
        "num_heads": task.num_heads,
        "intermediate_size": task.mlp_size,
        "vocab_size": task.vocab_size,
        "seq_len": task.seq_len,
    }


def main() -> int:
    task = Task.read()
    open_writers, turns = build.open_writers, Turns(ModelConfig(**model_config(task)))

    def with_turns(*args: Any) -> list[Any]:
        turns.begin()
        return [*open_writers(*args), turns]

    build.open_writers = with_turns
    values = {
        **{f"model.{key}": value for key, value in model_config(task).items()},
        "model.preset": "null",
        "run.dir": task.folder / f"run-{task.precision}-{task.compile}-{len(task.options)}",
        "run.seed": task.seed,
        "run.device": "cpu",
        "run.threads": task.threads,
        "data.path": task.data,
        "train.steps": len(task.rows()) // task.batch,
        "train.global_batch_size": task.batch,
        "train.micro_batch_size": "null",
        "train.precision": task.precision,
        "train.compile": str(task.compile).lower(),
        "train.compile_scope": task.options.get("compile_scope", "parts"),
        "train.learning_rate": task.learning_rate,
        "train.schedule": "constant",
        "train.warmup_steps": 0,
        "train.beta1": task.betas[0],
        "train.beta2": task.betas[1],
        "train.eps": task.eps,
        "train.weight_decay": task.weight_decay,
        "train.grad_clip": task.grad_clip,
        "checkpoint.every_steps": task.options["checkpoint_every"],
    }
    return cli.main(["train", str(_CONFIG), *(f"{key}={value}" for key, value in values.items())])


if __name__ == "__main__":
    sys.exit(main())
