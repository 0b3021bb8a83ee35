"""The planner's memory against what real runs on this CPU needed.

    scalellm bench plan [--variants single,ddp,fsdp,...] [--worlds 1,2] [--shapes 60m]
        [--seq-lens 256] [--checkpointing none,full] [--dry-run] [--json FILE] [--markdown FILE]

Each cell is a run of its own processes, of a few steps. `measured` is rank 0's resident high-water
mark after the last step, before anything is saved, above its size before the model was built.
`predicted` is the estimate of tensors plus what a process on a CPU has beside them (`plan.cpu`);
`dry run` is the same from a dry run, where there is one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _processes import end_tree, start
from _sweep_cells import ALL_VARIANTS
from _sweep_run import explain_failure

from scalellm.config import Config, parse_config
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import ConfigError, UserError
from scalellm.metrics import JSONL_NAME, read_rows
from scalellm.model import count_parameters
from scalellm.plan._record import is_deepspeed
from scalellm.plan.cpu import beside_tensors
from scalellm.plan.dry_run import dry_run
from scalellm.plan.memory import estimate
from scalellm.plan.types import Memory
from scalellm.train import check_config, dump_config
from scalellm.train.folder import describe_environment

MIB = 1 << 20
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 2048},
    "60m": {"num_layers": 8, "hidden_size": 704, "num_heads": 11, "vocab_size": 16384},
    "wide": {"num_layers": 3, "hidden_size": 1152, "num_heads": 18, "vocab_size": 16384},
    "deep": {"num_layers": 24, "hidden_size": 448, "num_heads": 7, "vocab_size": 8192},
}
VARIANTS = "single,ddp,fsdp,deepspeed-1,deepspeed-2,deepspeed-3"


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


def main(argv: list[str] | None = None) -> int:
    """Runs the cells one by one and prints how far the planner is off; returns 0 if all ran."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="scalellm-plan-") as folder:
        data = args.data or _prepared(Path(folder) / "data")
        rows = [_row(cell, Path(folder) / "run", data, args) for cell in _cells(args)]
    report = {"environment": describe_environment(World()), "cells": rows, **summary(rows)}
    text = markdown(report)
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0 if rows and all("error" not in row for row in rows) else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench plan", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--variants", default=VARIANTS, help="by comma")
    parser.add_argument("--worlds", default="1,2", help="ranks, by comma")
    parser.add_argument("--shapes", default="60m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--seq-lens", default="256", help="tokens, by comma")
    parser.add_argument("--checkpointing", default="none", help="of none, selective, full")
    parser.add_argument("--precisions", default="fp32", help="of fp32, bf16")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples")
    parser.add_argument("--accumulations", default="1", help="micro-batches a step, by comma")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--dry-run", action="store_true", help="dry runs too, where they can be")
    parser.add_argument("--data", type=Path, help="prepared data; default: a part of stdlib")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for name, known in (("variants", ALL_VARIANTS), ("shapes", SHAPES)):
        for word in getattr(args, name).split(","):
            if word not in known:
                raise UserError(f"--{name}: {word!r} is none of {', '.join(known)}")
    return args


def _cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations that can be."""
    numbers = (args.worlds, args.seq_lens, args.accumulations)
    worlds, seq_lens, accumulations = ([int(n) for n in text.split(",")] for text in numbers)
    words = (args.variants, args.shapes, args.checkpointing, args.precisions)
    variants, shapes, modes, precisions = (text.split(",") for text in words)
    cells = [
        Cell(variant, world, shape, seq_len, mode, precision, args.micro_batch, times)
        for variant, world, shape, seq_len, mode, precision, times in itertools.product(
            variants, worlds, shapes, seq_lens, modes, precisions, accumulations
        )
    ]
    return [cell for cell in cells if _can_be(cell)]


def _can_be(cell: Cell) -> bool:
    try:
        check_config(cell.config(), World(world_size=cell.world_size, launcher="--nproc"))
    except ConfigError:
        return False
    return True


def _prepared(out: Path) -> Path:
    options = PrepareOptions(
        sources=("stdlib",), out=out, vocab_size=1024, val_fraction=0.0, limit_bytes=4_000_000
    )
    prepare(options)
    return out


def _row(cell: Cell, run: Path, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    print(f"{cell.id} ...", file=sys.stderr, flush=True)
    config = cell.config(args.steps, data)
    row: dict[str, Any] = {"id": cell.id, "parameters": count_parameters(config.model)}
    row |= _predict("predicted", estimate(config, cell.world_size, "cpu"), config, cell)
    if args.dry_run and not is_deepspeed(config):
        row |= _predict("dry_run", dry_run(config, cell.world_size, "cpu").memory, config, cell)
    try:
        row["measured_bytes"] = measure(config, cell, run, args.timeout_s)
    except UserError as error:
        return {**row, "error": str(error)}
    row["ratio"] = row["predicted_bytes"] / row["measured_bytes"]
    return row


def _predict(word: str, memory: Memory, config: Config, cell: Cell) -> dict[str, Any]:
    beside_bytes = beside_tensors(config, cell.world_size, memory)
    total_bytes = memory.peak_bytes + memory.host_bytes + beside_bytes
    return {f"{word}_bytes": total_bytes, f"{word}_memory": vars(memory)}


def measure(config: Config, cell: Cell, run: Path, timeout_s: float) -> int:
    """Trains in a process tree of its own; returns rank 0's bytes above its baseline.

    Raises:
        UserError: the run failed; with its last word.
    """
    place = Path(tempfile.mkdtemp(prefix=run.name, dir=run.parent))
    path, log = place / "config.yaml", place / "log"
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "scalellm", "train", str(path), "--nproc"]
    command += [str(cell.world_size), f"run.dir={place / 'run'}"]
    with log.open("w") as out:
        process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise UserError(f"not done after {timeout_s:g} s (--timeout-s)") from None
    finally:
        end_tree(process)
    if code:
        raise UserError(explain_failure(code, log.read_text(errors="replace"))[1])
    return above_baseline(place / "run" / JSONL_NAME)


def above_baseline(path: Path) -> int:
    """Rank 0's peak of the training steps above its baseline, in bytes, from a finished run."""
    rows = list(read_rows(path))
    # The last row's own peak has the save at the end in it.
    peaks = [row["peak_rss_bytes"] for row in rows if row["kind"] == "train"]
    if not peaks or rows[-1]["kind"] != "end":
        raise UserError(f"the run left no whole {path.name}")
    return int(max(peaks) - rows[-1]["baseline_rss_bytes"][0])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median ratio and the worst error, relative to what was measured."""
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    if not ratios:
        return {"median_ratio": None, "worst_error": None}
    return {
        "median_ratio": statistics.median(ratios),
        "worst_error": max(abs(ratio - 1) for ratio in ratios),
    }


def markdown(report: dict[str, Any]) -> str:
    """The table with what it was measured on, and the two numbers that sum it up."""
    machine = report["environment"]
    lines = [
        f"{machine['processor']}, torch {machine['versions']['torch']}; MiB of rank 0",
        "",
        "| cell | parameters | predicted | dry run | measured | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["cells"]:
        sizes = [_mib(row.get(f"{word}_bytes")) for word in ("predicted", "dry_run", "measured")]
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else row["error"]
        lines.append(f"| {row['id']} | {row['parameters']:,} | {' | '.join(sizes)} | {ratio} |")
    if report["median_ratio"] is not None:
        worst = f"{100 * report['worst_error']:.1f}%"
        lines += ["", f"Median ratio {report['median_ratio']:.3f}, worst error {worst}."]
    return "\n".join(lines)


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MIB:.0f}"


if __name__ == "__main__":
    sys.exit(main())
