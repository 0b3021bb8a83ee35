"""What Ray costs: the same ranks started by torchrun and by Ray Train, in turn.

    scalellm bench clusters [--ranks 2] [--steps 120] [--pairs 3] [--json FILE]

Each run is a whole one on this machine, with ddp and one thread a rank. `tokens/s` is the median
over the steps after the first `WARM_UP_STEPS`, in the interval the ranks themselves measure;
`start-up` is from the command to the end of the first step, Ray's own cluster included; `whole` is
the command from its start to its end. The order is A B B A A B ..., so that a machine that gets
slower is slower for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import UserError
from scalellm.train.folder import describe_environment

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 20
CONFIG = {
    "model.num_layers": 4,
    "model.hidden_size": 128,
    "model.num_heads": 4,
    "model.seq_len": 128,
    "train.global_batch_size": 8,
    "train.micro_batch_size": "null",
    "train.warmup_steps": 10,
    "train.learning_rate": 0.001,
    "strategy.name": "ddp",
    "run.threads": 1,
    "metrics.tensorboard": "false",
}


def main(argv: list[str] | None = None) -> int:
    """Measures all runs and prints a table; returns 0."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="scalellm-bench-") as folder:
        data = Path(folder, "data")
        prepare(
            PrepareOptions(sources=("stdlib",), out=data, vocab_size=2048, limit_bytes=4_000_000)
        )
        runs = []
        for number in range(args.pairs):
            order = ("torchrun", "ray") if number % 2 == 0 else ("ray", "torchrun")
            runs += [_run(who, args, data, Path(folder, f"{who}-{number}")) for who in order]
    report = {
        "config": {**CONFIG, "ranks": args.ranks, "steps": args.steps},
        "environment": describe_environment(World()),
        "runs": runs,
        "ratios": [
            _of(runs, "ray", number) / _of(runs, "torchrun", number) for number in range(args.pairs)
        ],
    }
    print(_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench clusters", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.steps < 2 * WARM_UP_STEPS:
        raise UserError(f"--steps={args.steps} steps must be {2 * WARM_UP_STEPS} or more")
    if args.ranks < 1 or args.pairs < 1:
        raise UserError(f"--ranks={args.ranks} and --pairs={args.pairs} must be 1 or more")
    return args


def _run(who: str, args: argparse.Namespace, data: Path, run_dir: Path) -> dict[str, Any]:
    words = [f"{key}={value}" for key, value in CONFIG.items()]
    words += [f"train.steps={args.steps}", f"data.path={data}", f"run.dir={run_dir}"]
    script = ["launch/train.py", "--config", "configs/char-tiny.yaml", *words]
    if who == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        command = [sys.executable, *launcher, *script]
    else:
        ray = ["cluster.name=ray", "cluster.address=local", f"cluster.workers={args.ranks}"]
        command = [sys.executable, *script, *ray]
    print(f"{who} ...", file=sys.stderr, flush=True)
    started_s = time.time()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    whole_s = time.time() - started_s
    if done.returncode:
        own = [line for line in done.stderr.splitlines() if line.startswith("scalellm: ")]
        raise UserError(
            f"{who} ended with code {done.returncode}: {(own or [done.stderr[-500:]])[0]}"
        )
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    speeds = [row["tokens_per_s"] for row in rows[WARM_UP_STEPS:]]
    quarters = statistics.quantiles(speeds, n=4)
    first_step_s = (run_dir / "config.yaml").stat().st_mtime - started_s + rows[0]["step_time_s"]
    return {
        "who": who,
        "tokens_per_s": statistics.median(speeds),
        "spread": (quarters[2] - quarters[0]) / statistics.median(speeds),
        "startup_s": first_step_s,
        "whole_s": whole_s,
        "last_loss": rows[-1]["loss"],
    }


def _of(runs: list[dict[str, Any]], who: str, number: int) -> float:
    return float([run["tokens_per_s"] for run in runs if run["who"] == who][number])


def _table(report: dict[str, Any]) -> str:
    machine, config = report["environment"], report["config"]
    versions = machine["versions"]
    lines = [
        f"{config['ranks']} ranks of one thread, ddp, {config['steps']} steps, "
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"ray {versions['ray']}",
        "",
        "| started by | tokens/s | quartiles apart | start-up s | whole run s | last loss |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {run['who']} | {run['tokens_per_s']:,.0f} | {run['spread']:.1%} | "
        f"{run['startup_s']:.1f} | {run['whole_s']:.1f} | {run['last_loss']:.6f} |"
        for run in report["runs"]
    ]
    ratios = report["ratios"]
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    median = statistics.median(ratios)
    return "\n".join([*lines, "", f"ray / torchrun: {each}; median {median:.3f}"])


if __name__ == "__main__":
    sys.exit(main())
