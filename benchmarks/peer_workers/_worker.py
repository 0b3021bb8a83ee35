"""What all workers share: the task, the turns, the batches. Never imports scalellm.

A worker is one contestant in a process of its own, run by the Python of its own environment:

    python benchmarks/peer_workers/WORKER.py TASK.json

It answers on stdout in lines of JSON: first, when it could take its first step, {"ready": true,
"parameters": …, "flops_per_token": …, "versions": {…}}; then, for every line "run N" on stdin, N
steps more and {"step_s": […], "losses": […], "peak_rss_bytes": …}. Whatever libraries print goes to
stderr. Losses are in nats per token; those of a trainer that writes them late come a turn later.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# The protocol's own stdout; all others write to stderr from here on.
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Task:
    """What every contestant is told alike: shape, batch, seed, optimizer, files.

    Shapes: B rows of a batch, T tokens of a row.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.num_layers: int = values["num_layers"]
        self.hidden_size: int = values["hidden_size"]
        self.num_heads: int = values["num_heads"]
        self.mlp_size: int = values["mlp_size"]
        self.seq_len: int = values["seq_len"]
        self.vocab_size: int = values["vocab_size"]
        self.batch: int = values["batch"]
        self.seed: int = values["seed"]
        self.threads: int = values["threads"]
        self.precision: str = values["precision"]
        self.compile: bool = values["compile"]
        self.options: dict[str, Any] = values["options"]
        self.learning_rate: float = values["learning_rate"]
        self.betas: tuple[float, float] = (values["beta1"], values["beta2"])
        self.eps: float = values["eps"]
        self.weight_decay: float = values["weight_decay"]
        self.grad_clip: float = values["grad_clip"]
        self.folder = Path(values["folder"])
        self.data = Path(values["data"])

    @classmethod
    def read(cls) -> Task:
        """Reads the file named on the command line, and sets threads and seed as it says."""
        task = cls(json.loads(Path(sys.argv[1]).read_text()))
        torch.set_num_threads(task.threads)
        torch.manual_seed(task.seed)
        return task

    def rows(self) -> np.ndarray:
        """All rows of T + 1 ids, in the order in which they are trained, on disk."""
        return np.load(self.folder / "ids.npy", mmap_mode="r")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (inputs_BT, targets_BT) in int64."""
        rows = self.rows()
        for start in range(0, len(rows), self.batch):
            ids_BS = torch.from_numpy(rows[start : start + self.batch].astype(np.int64))
            yield ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()

    def samples(self, *names: str) -> Samples:
        return Samples(self.rows(), names)

    def weights(self) -> dict[str, Tensor]:
        """The initial weights of a Llama, under Hugging Face's names without `model.`."""
        with np.load(self.folder / "weights.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def decay_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not: nanoGPT's rule, and ours."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def size_of(self, model: nn.Module, lookups: int = 0) -> dict[str, int]:
        """Parameters and FLOPs per token: 6 N + 12 L H D T (PaLM, appendix B).

        N are the weights that multiply activations: all matrices, a tied embedding once, without
        those that are only looked up.

        Args:
            lookups: numbers in tables that are only looked up, such as learned positions.
        """
        parameters = list(model.parameters())
        multiplied = sum(p.numel() for p in parameters if p.dim() >= 2) - lookups
        attention = 12 * self.num_layers * self.hidden_size * self.seq_len
        return {
            "parameters": sum(p.numel() for p in parameters),
            "flops_per_token": 6 * multiplied + attention,
        }


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows one by one for DataLoaders: inputs under the first name, targets under the others."""

    def __init__(self, rows: np.ndarray, names: tuple[str, ...]) -> None:
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_S = torch.from_numpy(self._rows[index].astype(np.int64))
        inputs, *targets = self._names
        return {inputs: ids_S[:-1], **dict.fromkeys(targets, ids_S[1:])}


class Gate:
    """Lets a contestant take its turns: it waits here between two steps until it may go on.

    Its clock runs from one passage to the next, so a step is everything a user pays for it, the
    batch, logging and saving among it.

    Args:
        size: `parameters` and `flops_per_token`.
        packages: whose versions to tell.
        losses: returns the losses not yet told; None: those in `self.losses`.
    """

    def __init__(
        self,
        size: dict[str, int],
        packages: tuple[str, ...] = (),
        losses: Callable[[], list[float]] | None = None,
    ) -> None:
        self.losses: list[Tensor] = []
        self._new_losses = losses or self._take_losses
        self._left, self._step_s = -1, list[float]()
        versions = {name: metadata.version(name) for name in ("torch", "numpy", *packages)}
        self._ready = {"ready": True, **size, "versions": versions}

    def wait(self) -> None:
        """Called before every step; returns at once inside a turn, else when the next one begins.

        Leaves the process when there are no more turns.
        """
        if self._left < 0:
            self._left = 0
            say(self._ready)
        else:
            self._step_s.append(time.perf_counter() - self._began_s)
            self._left -= 1
        if self._left == 0:
            if self._step_s:
                losses = self._new_losses()
                say({"step_s": self._step_s, "losses": losses, "peak_rss_bytes": peak_rss_bytes()})
            self._left, self._step_s = next_turn(), []
        self._began_s = time.perf_counter()

    def _take_losses(self) -> list[float]:
        told = [float(loss) for loss in self.losses]
        self.losses.clear()
        return told


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


def next_turn() -> int:
    """Waits for "run N" and returns N; ends the process, whatever threads it has, at the end."""
    word, _, number = sys.stdin.readline().partition(" ")
    if word != "run":
        sys.stderr.flush()
        os._exit(0)
    return int(number)


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
