"""Speed and memory of every way to train: sizes x strategies x worlds x precisions x more.

    scalellm bench sweep [--sizes 13m] [--variants single,ddp,fsdp|all] [--worlds 1,2]
                         [--precisions fp32,bf16] [--compile off,on] [--repeats 3] [--steps 30]
                         [--out runs/sweep] [--resume]

Each run of a cell is a process tree of its own; the repeats are interleaved (all cells, then all of
them in the opposite order, and so on), and the GEMM peak that model FLOPs are compared with is
measured in every repeat. `--out` gets sweep.json, report.md and report.html; what a figure means is
in docs/measuring.md. A sweep that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _gemm
from _sweep_cells import ALL_VARIANTS, SIZES, Cell, Gemm, Task, make_cells, schedule
from _sweep_figures import make_report, to_markdown
from _sweep_report import write_report as write_pages
from _sweep_run import OK, profile_cell, run_cell
from _sweep_state import Journal, write_report
from tqdm import tqdm

from scalellm.commands import Parser
from scalellm.cores import available_cores
from scalellm.data.pool import sigterm_as_interrupt
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import EXIT_DONE, EXIT_FAILURE, UserError, did_you_mean
from scalellm.parity import VARIANTS
from scalellm.train.folder import describe_environment

DATA_BYTES = 4_000_000
# What may differ between a sweep and its --resume: where it lies, and where figures go besides.
_NOT_ASKED = ("out", "resume", "json")


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet, prints a table; returns 0 if any cell ran, 1 if it was stopped."""
    given = sys.argv[1:] if argv is None else argv
    args = _parse(given)
    sweep = _Sweep(args)
    try:
        with sigterm_as_interrupt():
            sweep.run()
    except KeyboardInterrupt:
        # The words of this call, so that it can be copied.
        words = [word for word in given if word != "--resume"]
        again = shlex.join(["scalellm", "bench", "sweep", *words, "--resume"])
        print(f"\nscalellm: stopped; what is done is kept, go on with: {again}", file=sys.stderr)
        return EXIT_FAILURE
    finally:
        sweep.close()
    statuses = [cell["status"] for cell in sweep.report()["cells"]]
    return EXIT_DONE if OK in statuses else EXIT_FAILURE


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("bench sweep", (__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=_of("size", SIZES), default=["13m"], help=", ".join(SIZES))
    add("--variants", type=_variants, default=["single", "ddp", "fsdp", "deepspeed-2"],
        help="all, or by comma: " + ", ".join(ALL_VARIANTS))  # fmt: skip
    add("--worlds", type=_numbers, default=[1, 2], help="ranks, such as 1,2,4")
    add("--precisions", type=_of("precision", ["fp32", "bf16", "fp16", "fp64"]), default=["fp32"])
    add("--compile", type=_of("word", ["off", "on"]), default=["off"], help="off,on: both")
    add("--activation-checkpointing", type=_of("word", ["none", "selective", "alternate", "full"]),
        default=["none"])  # fmt: skip
    add("--scaling", choices=["strong", "weak", "both"], default="strong",
        help="the same batch in every world, or the same batch per rank")  # fmt: skip
    add("--repeats", type=int, default=3, help="runs of each cell")
    add("--steps", type=int, default=30, help="of each run")
    add("--warmup", type=int, default=5, help="steps at the start that no figure counts")
    add("--seq-len", type=int, help="tokens per sample; default: the size's")
    add("--batch", type=int, default=8, help="samples per step; of one rank, if it scales weakly")
    add("--threads", type=int, default=available_cores(),
        help="cores to divide among the ranks; default: all")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--timeout-s", type=float, default=1800.0, help="longest a run of a cell may take")
    add("--gemm-s", type=float, default=3.0, help="seconds of each measurement of the peak")
    add("--profile", action=argparse.BooleanOptionalAction, default=True,
        help="a short extra run of each cell of several ranks, for its communication")  # fmt: skip
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR")
    add("--resume", action="store_true", help="go on with the sweep in --out")
    add("--json", type=Path, metavar="FILE", help="write sweep.json here too")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    for name in ("repeats", "steps", "batch", "threads", "seq_len"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be 1 or more")
    if not 0 <= args.warmup < args.steps:
        raise UserError(
            f"--warmup={args.warmup} steps must be 0 or more and below --steps={args.steps}"
        )
    for name in ("timeout_s", "gemm_s"):
        if not 0 < getattr(args, name) < 1e6:
            raise UserError(
                f"--{name.replace('_', '-')}={getattr(args, name):g} s must be above 0 s"
            )
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json={args.json} is a folder; give a file to write")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {args.json.parent}; create it")


def _of(what: str, known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        for word in words:
            if word not in known:
                near = did_you_mean(word, known)
                raise argparse.ArgumentTypeError(f"no {what} {word!r}{near}; {', '.join(known)}")
        return words

    return parse


def _variants(text: str) -> list[str]:
    return list(VARIANTS) if text == "all" else _of("variant", ALL_VARIANTS)(text)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of ranks, such as 1,2")
    return numbers


class _Sweep:
    """A sweep's folder, what it has to do, and what it has done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._folder = args, args.out.resolve()
        self._cells = make_cells(args)
        reasons = {cell.id: cell.skip_reason() for cell in self._cells}
        self._skipped = {cell: reason for cell, reason in reasons.items() if reason is not None}
        asked = {key: value for key, value in vars(args).items() if key not in _NOT_ASKED}
        asked["global_batch"] = asked.pop("batch")
        head = {
            "config": asked,
            "environment": describe_environment(World()),
            "started": _now(),
        }
        self._journal = Journal(self._folder)
        self._head = self._journal.begin(head, resume=args.resume)

    def run(self) -> None:
        """Does what is left, then writes and prints everything."""
        write_report(self._folder, self.report())
        tasks = [task for task in self._tasks() if task.key not in self._done()]
        if tasks:
            self._prepare_data()
        with tqdm(total=len(tasks), unit="run", file=sys.stderr, smoothing=0.1) as bar:
            for task in tasks:
                bar.set_description_str(str(task))
                if not self._is_worth(task):
                    bar.total -= 1  # it would make the time left look shorter
                    continue
                self._journal.add(self._do(task))
                write_report(self._folder, self.report())
                bar.update()
        if self._finished() is None:
            self._journal.add({"kind": "end", "finished": _now()})
        path = write_report(self._folder, self.report())
        print(to_markdown(self.report()))
        pages = [page for page in write_pages(path) if page.suffix != ".png"]
        print("report:", *map(os.path.relpath, pages), file=sys.stderr)
        if self._args.json is not None:
            self._args.json.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")

    def report(self) -> dict[str, Any]:
        entries = self._journal.entries
        return make_report(self._head, entries, self._cells, self._skipped, self._finished())

    def close(self) -> None:
        self._journal.close()

    def _finished(self) -> str | None:
        return next((e["finished"] for e in self._journal.entries if e["kind"] == "end"), None)

    def _tasks(self) -> list[Task]:
        cells = [cell for cell in self._cells if cell.id not in self._skipped]
        return schedule(cells, self._args.repeats, profile=self._args.profile)

    def _done(self) -> set[tuple[str, str, int]]:
        return {
            (entry["kind"], entry.get("cell") or str(Gemm(*entry["gemm"])), entry["repeat"])
            for entry in self._journal.entries
            if entry["kind"] != "end"
        }

    def _is_worth(self, task: Task) -> bool:
        """Nothing more of a cell that failed, nor a peak that no cell is compared with."""
        failed = {
            entry["cell"]
            for entry in self._journal.entries
            if entry["kind"] == "run" and entry["status"] != OK
        }
        if isinstance(task.what, Cell):
            return task.what.id not in failed
        live = [cell for cell in self._cells if cell.id not in failed | self._skipped.keys()]
        return any(cell.gemm == task.what for cell in live)

    def _do(self, task: Task) -> dict[str, Any]:
        args = self._args
        if isinstance(task.what, Gemm):
            try:
                speed = _gemm.measure(*task.what, args.gemm_s, args.device)
            except RuntimeError as error:
                raise UserError(f"{task.what} could not be measured: {error}") from None
            gemm = list(task.what)
            return {"kind": "gemm", "repeat": task.repeat, "gemm": gemm, "flops_per_s": speed}
        cell, folder = task.what, self._folder / "cells" / task.what.id
        head = {"kind": task.kind, "cell": cell.id, "repeat": task.repeat}
        data = self._data(cell)
        if task.kind == "profile":
            found = profile_cell(cell, folder / "profile", data, args.timeout_s)
        else:
            place = folder / f"repeat-{task.repeat}"
            found = run_cell(cell, place, data, args.steps, args.warmup, args.timeout_s)
        if found["status"] != OK:
            tqdm.write(f"{cell.id}: {task.kind} {found['status']}: {found['reason']}", sys.stderr)
        return {**head, **found}

    def _data(self, cell: Cell) -> Path:
        return self._folder / "data" / f"bpe-{cell.tokenizer_size}"

    def _prepare_data(self) -> None:
        cells = [cell for cell in self._cells if cell.id not in self._skipped]
        for size in sorted({cell.tokenizer_size for cell in cells}):
            out = self._folder / "data" / f"bpe-{size}"
            # No validation split: it would be evaluated at the end of every run.
            prepare(
                PrepareOptions(
                    sources=("stdlib",), out=out, vocab_size=size, val_fraction=0.0,
                    limit_bytes=DATA_BYTES,
                )
            )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
