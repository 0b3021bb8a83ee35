"""The bubble of each pipeline schedule: how much of a step ranks wait, measured and by formula.

    scalellm bench pipeline [--ranks 2] [--micro-batches 4,8] [--steps 6] [--json FILE]

Each rank computes in one thread. `formula` takes all stages to be equally slow and messages to be
free; `simulated` replays the schedule's own order with the times that the computations of this run
took, messages still free; `measured` is what of a step's wall time a rank did not compute, the mean
over ranks, in the median step. What lies between the last two is the network and the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from scalellm.clusters.local import launch
from scalellm.config import ModelConfig
from scalellm.dist import World, gather_over_ranks, ranks
from scalellm.errors import UserError
from scalellm.parity import Task, build, train_steps
from scalellm.strategies._pipeline_schedule import (
    bubble_formula,
    order_of,
    simulated_bubble,
    stages_per_rank,
)
from scalellm.strategies.parallel import Parallel
from scalellm.train.folder import describe_environment

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
MODEL = {"num_layers": 8, "hidden_size": 256, "num_heads": 4, "vocab_size": 257, "seq_len": 128}
ROWS = 4  # of a micro-batch
KINDS = ("F", "B", "I", "W")


def main(argv: list[str] | None = None) -> int:
    """Measures every schedule with every number of micro-batches and prints a table."""
    args = _parse(argv)
    if args.worker:
        return _work(args)
    rows = [
        _measure(args, schedule, micro_batches)
        for micro_batches in map(int, args.micro_batches.split(","))
        for schedule in args.schedules.split(",")
    ]
    report = {
        "config": {**MODEL, "ranks": args.ranks, "rows": ROWS, "steps": args.steps},
        "environment": describe_environment(World()),
        "rows": rows,
    }
    print(_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench pipeline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", default="4,8", help="of a step, by comma")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="by comma")
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise UserError(f"--steps={args.steps} must be 2 or more: the first is not counted")
    return args


def _measure(args: argparse.Namespace, schedule: str, micro_batches: int) -> dict[str, Any]:
    print(f"{schedule}, {micro_batches} micro-batches ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        words = ["--schedules", schedule, "--micro-batches", str(micro_batches)]
        words += ["--ranks", str(args.ranks), "--steps", str(args.steps), "--worker", str(path)]
        if code := launch(["bench", "pipeline", *words], args.ranks):
            raise UserError(f"{schedule} ended with exit code {code}; the reason is above")
        found = json.loads(path.read_text())
    per_rank = stages_per_rank(schedule)
    order = order_of(schedule, args.ranks, micro_batches, per_rank)
    return {
        "schedule": schedule,
        "micro_batches": micro_batches,
        "formula": bubble_formula(schedule, args.ranks, micro_batches, per_rank),
        "simulated": simulated_bubble(order, found["costs_s"]),
        **found,
    }


def _work(args: argparse.Namespace) -> int:
    """In a rank: some steps, of which rank 0 writes the bubbles and the mean times."""
    micro_batches = int(args.micro_batches)
    model = ModelConfig.model_validate(MODEL)
    task = Task(model, args.steps, "fp32", ROWS * micro_batches, ROWS)
    options = {"mesh": {"pp": args.ranks}, "schedule": args.schedules}
    bubbles, walls = [], []
    times: defaultdict[str, list[float]] = defaultdict(list)
    with ranks("cpu", threads=1) as world:
        strategy = cast(Parallel, build(task, "parallel", options, world))
        for step, _ in enumerate(
            train_steps(strategy, task, world, range(args.steps), gradients=False)
        ):
            time = strategy.step_time
            assert time is not None
            of_all = gather_over_ranks([time.bubble, time.wall_s], world)
            if step:
                bubbles.append(statistics.fmean(row[0] for row in of_all))
                walls.append(max(row[1] for row in of_all))
                for action, seconds in time.computations:
                    times[action.kind].append(seconds)
        costs = _mean_costs(times, world)
        strategy.close()
        if world.is_main:
            bubbles.sort()
            found = {
                "measured": statistics.median(bubbles),
                "least": bubbles[0],
                "most": bubbles[-1],
                "wall_s": statistics.median(walls),
                "costs_s": costs,
            }
            args.worker.write_text(json.dumps(found))
    return 0


def _mean_costs(times: dict[str, list[float]], world: World) -> dict[str, float]:
    sums = [number for kind in KINDS for number in (sum(times[kind]), len(times[kind]))]
    total = [sum(column) for column in zip(*gather_over_ranks(sums, world), strict=True)]
    pairs = zip(total[::2], total[1::2], strict=True)
    return {kind: (s / n if n else 0.0) for kind, (s, n) in zip(KINDS, pairs, strict=True)}


def _table(report: dict[str, Any]) -> str:
    config, environment = report["config"], report["environment"]
    lines = [
        f"{config['ranks']} ranks, {config['num_layers']} layers of {config['hidden_size']}, "
        f"{config['rows']} rows of {config['seq_len']} a micro-batch, fp32, one thread a rank, "
        f"{environment['processor']}, torch {environment['versions']['torch']}",
        "",
        "| schedule | micro-batches | formula | simulated | measured | from - to | step s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['schedule']} | {row['micro_batches']} | {row['formula']:.1%} | "
            f"{row['simulated']:.1%} | {row['measured']:.1%} | {row['least']:.1%} - "
            f"{row['most']:.1%} | {row['wall_s']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
