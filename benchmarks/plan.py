"""The planner's memory against what real runs on this CPU needed.

    scalellm bench plan --all --out DIR [--resume]
    scalellm bench plan [--variants single,ddp,fsdp,...] [--worlds 1,2] [--shapes 60m]
        [--seq-lens 256] [--checkpointing none,full] [--runs 3] [--dry-run] [--json FILE]
        [--markdown FILE]

`--all` is the whole table, 45 minutes a run of each cell and 15 for the predictions, on two cores.
With `--out` what was measured is on the disk after each run, and `--resume` goes on where it ended,
also with more `--runs`; predictions are made anew.

Each run is processes of its own, and a few steps. `measured` is rank 0's resident high-water
mark after the last step, before anything is saved, above its size before the model was built, in
the median of a cell's runs.
`predicted` is the estimate of tensors plus what a process on a CPU has beside them (`plan.cpu`);
`dry run` is the same from a dry run, where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from _plan_cells import ALL, SHAPES, VARIANTS, Cell, cells_of
from _processes import end_tree, start
from _sweep_cells import ALL_VARIANTS
from _sweep_run import explain_failure
from _sweep_state import Journal

from scalellm.config import Config
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import UserError
from scalellm.metrics import JSONL_NAME, read_rows
from scalellm.model import count_parameters
from scalellm.plan._record import is_deepspeed
from scalellm.plan.cpu import beside_tensors
from scalellm.plan.dry_run import dry_run
from scalellm.plan.memory import estimate
from scalellm.plan.types import Memory
from scalellm.train import dump_config
from scalellm.train.folder import describe_environment

MIB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """Runs the cells one by one and prints how far the planner is off; returns 0 if all ran."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="scalellm-plan-") as folder:
        rows = _rows(args, Path(folder))
    report = {"environment": describe_environment(World()), "cells": rows, **summary(rows)}
    text = markdown(report)
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0 if rows and all("error" not in row for row in rows) else 1


def _rows(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    cells = cells_of(args)
    data = args.data or _prepared(folder / "data")
    found: dict[str, list[dict[str, Any]]] = {cell.id: [] for cell in cells}
    with ExitStack() as stack:
        journal = None
        if args.out is not None:
            journal = stack.enter_context(closing(Journal(args.out)))
            asked = {"cells": [cell.id for cell in cells], "steps": args.steps}
            journal.begin({"config": asked}, resume=args.resume)
            for entry in journal.entries:
                if "measured_bytes" in entry:  # what failed is tried again
                    found[entry["id"]].append(entry)
        for turn in range(args.runs):  # one run of each after the other: what drifts meets all
            for cell in cells:
                if len(found[cell.id]) <= turn:
                    run = {"id": cell.id, **_measured(cell, folder / "run", data, args)}
                    found[cell.id].append(run)
                    if journal is not None:
                        journal.add(run)
    return [_row(cell, _all_runs(found[cell.id]), args) for cell in cells]


def _all_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of a cell's runs and each of them, or why there is none."""
    sizes = [run["measured_bytes"] for run in runs if "measured_bytes" in run]
    failed = next((run for run in runs if "error" in run), {})
    if not sizes:
        return failed
    return failed | {"measured_bytes": int(statistics.median(sizes)), "runs_bytes": sizes}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench plan", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--all", action="store_true", help="the whole table, about an hour")
    parser.add_argument("--variants", default=VARIANTS, help="by comma")
    parser.add_argument("--worlds", default="1,2", help="ranks, by comma")
    parser.add_argument("--shapes", default="60m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--seq-lens", default="256", help="tokens, by comma")
    parser.add_argument("--checkpointing", default="none", help="of none, selective, full")
    parser.add_argument("--precisions", default="fp32", help="of fp32, bf16")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples")
    parser.add_argument("--accumulations", default="1", help="micro-batches a step, by comma")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1, help="of each cell; the median counts")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--dry-run", action="store_true", help="dry runs too, where they can be")
    parser.add_argument("--data", type=Path, help="prepared data; default: a part of stdlib")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps what was measured")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.all:
        vars(args).update(ALL)
    if args.runs < 1:
        raise UserError(f"--runs={args.runs} runs: it must be at least 1")
    if args.resume and args.out is None:
        raise UserError("--resume needs --out DIR: where what was measured is")
    for name, known in (("variants", ALL_VARIANTS), ("shapes", SHAPES)):
        for word in getattr(args, name).split(","):
            if word not in known:
                raise UserError(f"--{name}: {word!r} is none of {', '.join(known)}")
    return args


def _prepared(out: Path) -> Path:
    options = PrepareOptions(
        sources=("stdlib",), out=out, vocab_size=1024, val_fraction=0.0, limit_bytes=4_000_000
    )
    prepare(options)
    return out


def _measured(cell: Cell, run: Path, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    print(f"{cell.id} ...", file=sys.stderr, flush=True)
    try:
        return {"measured_bytes": measure(cell.config(args.steps, data), cell, run, args.timeout_s)}
    except UserError as error:
        return {"status": "failed", "error": str(error)}


def _row(cell: Cell, measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    config = cell.config(args.steps)
    row: dict[str, Any] = {"id": cell.id, "parameters": count_parameters(config.model)}
    row |= _predict("predicted", estimate(config, cell.world_size, "cpu"), config, cell)
    if args.dry_run and not is_deepspeed(config):
        row |= _predict("dry_run", dry_run(config, cell.world_size, "cpu").memory, config, cell)
    row |= measured
    if "measured_bytes" in row:
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
    # With the checkpoint that a run leaves: all of them together fill a disk.
    with tempfile.TemporaryDirectory(prefix=run.name, dir=run.parent) as place:
        return _measure_in(Path(place), config, cell, timeout_s)


def _measure_in(place: Path, config: Config, cell: Cell, timeout_s: float) -> int:
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
    """Errors relative to what was measured: in the median and at worst, of all and by variant."""
    ratios = {row["id"]: row["ratio"] for row in rows if "ratio" in row}
    if not ratios:
        return {"median_ratio": None, "worst_error": None}
    variants = dict.fromkeys(_variant(name) for name in ratios)
    return {
        "median_ratio": statistics.median(ratios.values()),
        **_errors(ratios.values()),
        "by_variant": {
            variant: _errors(ratio for name, ratio in ratios.items() if _variant(name) == variant)
            for variant in variants
        },
    }


def _variant(name: str) -> str:
    return name.partition("@")[0]


def _errors(ratios: Iterable[float]) -> dict[str, float]:
    errors = [abs(ratio - 1) for ratio in ratios]
    return {"median_error": statistics.median(errors), "worst_error": max(errors)}


def markdown(report: dict[str, Any]) -> str:
    """The table with what it was measured on, and the two numbers that sum it up."""
    machine = report["environment"]
    lines = [
        f"{machine['processor']}, torch {machine['versions']['torch']}; MiB of rank 0",
        "",
        "| cell | parameters | predicted | dry run | measured | its runs | predicted / measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["cells"]:
        sizes = [_mib(row.get(f"{word}_bytes")) for word in ("predicted", "dry_run", "measured")]
        runs = row.get("runs_bytes", [])
        sizes.append(f"{_mib(min(runs))} to {_mib(max(runs))}" if len(runs) > 1 else "")
        found = [f"{row['ratio']:.3f}"] if "ratio" in row else []
        ratio = "; ".join([*found, *([row["error"]] if "error" in row else [])])
        lines.append(f"| {row['id']} | {row['parameters']:,} | {' | '.join(sizes)} | {ratio} |")
    if report["median_ratio"] is not None:
        lines += ["", "| variant | median error | worst |", "|---|---|---|"]
        everything = {"all": report} if len(report["by_variant"]) > 1 else {}
        for variant, errors in (report["by_variant"] | everything).items():
            figures = (errors["median_error"], errors["worst_error"])
            lines.append(f"| {variant} | {' | '.join(f'{100 * one:.1f}%' for one in figures)} |")
        lines += ["", f"Median ratio {report['median_ratio']:.3f}."]
    return "\n".join(lines)


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MIB:.0f}"


if __name__ == "__main__":
    sys.exit(main())
