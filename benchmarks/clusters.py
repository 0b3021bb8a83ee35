"""What Ray costs: the same ranks started by torchrun and by Ray Train.

    scalellm bench clusters [--ranks 2] [--slices 30] [--starts 2] [--json FILE]

Steady state: both runs are alive at once, and one of them is stopped (SIGSTOP, all its processes,
Ray's own too) while the other trains, in turn, a few seconds each; so both meet the same moods of
the machine. `tokens/s` is the median over the steps of all slices but the first; a step that was
stopped in the middle is far from it. Start-up: alone, one after the other, from the command to the
end of the first step, Ray's own cluster included. All with ddp and one thread a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from _processes import descendants

from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import UserError
from scalellm.train.folder import describe_environment

REPOSITORY = Path(__file__).resolve().parents[1]
STARTERS = ("torchrun", "ray")
SLICE_S = 3.0
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
    "eval.every_steps": 0,
    "eval.sample_prompt": "null",
    "checkpoint.every_steps": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Measures start-up, then steady state, and prints a table; returns 0."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="scalellm-bench-") as folder:
        data = Path(folder, "data")
        limits = {"vocab_size": 2048, "limit_bytes": 4_000_000, "num_workers": 1}
        prepare(PrepareOptions(sources=("stdlib",), out=data, **limits))
        startups: dict[str, list[float]] = {who: [] for who in STARTERS}
        for number in range(args.starts):
            for who in STARTERS if number % 2 == 0 else reversed(STARTERS):
                run = _Run(who, args.ranks, data, Path(folder, f"{who}-{number}"), steps=2)
                startups[who].append(run.first_step_s())
                run.finish()
        speeds = _in_turn(args, data, Path(folder))
    medians = {who: statistics.median(speeds[who]) for who in STARTERS}
    report = {
        "config": {**CONFIG, "ranks": args.ranks, "slices": args.slices, "slice_s": SLICE_S},
        "environment": describe_environment(World()),
        "startup_s": startups,
        "tokens_per_s": speeds,
        "ratio": medians["ray"] / medians["torchrun"],
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
    parser.add_argument("--slices", type=int, default=30, help=f"of {SLICE_S:g} s, for each")
    parser.add_argument("--starts", type=int, default=2, help="of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.ranks, args.starts) < 1 or args.slices < 2:
        raise UserError(
            f"--ranks={args.ranks} and --starts={args.starts} must be 1 or more, "
            f"--slices={args.slices} 2 or more"
        )
    return args


def _in_turn(args: argparse.Namespace, data: Path, folder: Path) -> dict[str, list[float]]:
    """Returns the tokens/s of each step but those of the first slice, of both runs."""
    runs = [_Run(who, args.ranks, data, folder / who, steps=1_000_000) for who in STARTERS]
    try:
        for run in runs:
            run.first_step_s()
        skip = {}
        for number in range(args.slices):
            for run, other in (runs, runs[::-1]):
                other.send(signal.SIGSTOP)
                run.send(signal.SIGCONT)
                time.sleep(SLICE_S)
                if number == 0:
                    skip[run.who] = len(run.rows())
        return {
            run.who: [row["tokens_per_s"] for row in run.rows()[skip[run.who] :]] for run in runs
        }
    finally:
        for run in runs:
            run.send(signal.SIGCONT)
            run.end()


class _Run:
    """A training run and all its processes."""

    def __init__(self, who: str, ranks: int, data: Path, run_dir: Path, *, steps: int) -> None:
        self.who, self._run_dir = who, run_dir
        words = [f"{key}={value}" for key, value in CONFIG.items()]
        words += [f"train.steps={steps}", f"data.path={data}", f"run.dir={run_dir}"]
        script = ["launch/train.py", "--config", "configs/char-tiny.yaml", *words]
        if who == "torchrun":
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, *module, *script]
        else:
            ray = ["cluster.name=ray", "cluster.address=local", f"cluster.workers={ranks}"]
            command = [sys.executable, *script, *ray]
        print(f"{who} ...", file=sys.stderr, flush=True)
        self._log = run_dir.with_suffix(".log")
        self._started_s = time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
            )

    def first_step_s(self) -> float:
        """Waits for the first step; returns the time from the command to its end."""
        while not self.rows():
            if self._process.poll() not in (None, 0):
                self._fail()
            time.sleep(0.05)
        return time.time() - self._started_s

    def rows(self) -> list[dict[str, Any]]:
        path = self._run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == "train"]

    def finish(self) -> None:
        if self._process.wait():
            self._fail()

    def send(self, number: signal.Signals) -> None:
        """Signals the run with all its descendants, those of Ray included."""
        for pid in descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _fail(self) -> NoReturn:
        lines = self._log.read_text().splitlines() or ["nothing"]
        own = [line for line in lines if line.startswith("scalellm: ")]
        raise UserError(f"{self.who} ended with {self._process.poll()}: {(own or lines)[-1]}")


def _table(report: dict[str, Any]) -> str:
    machine, config = report["environment"], report["config"]
    versions = machine["versions"]
    lines = [
        f"{config['ranks']} ranks of one thread, ddp, {config['slices']} slices of "
        f"{config['slice_s']:g} s each in turn, {machine['processor']}, {machine['cores']} cores, "
        f"torch {versions['torch']}, ray {versions['ray']}",
        "",
        "| started by | steps | tokens/s, median | quartiles | start-up s, each |",
        "|---|---|---|---|---|",
    ]
    for who in STARTERS:
        speeds = report["tokens_per_s"][who]
        low, middle, high = statistics.quantiles(speeds, n=4)
        starts = ", ".join(f"{seconds:.1f}" for seconds in report["startup_s"][who])
        lines.append(
            f"| {who} | {len(speeds)} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {starts} |"
        )
    return "\n".join([*lines, "", f"ray / torchrun: {report['ratio']:.3f}"])


if __name__ == "__main__":
    sys.exit(main())
