"""Loaders beside ours on the same ids: np.memmap, raw zstd, litdata in its own environment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _peer_environments import InstallError, python_of
from _peer_process import PeerError, PeerProcess
from _peer_report import loader_rows
from data import Run, build, make_contestants

OURS = "scalellm, 1 decode threads"
# Name -> options of peer_workers/litdata_stream.py. As litdata ships: no compression, no workers.
LITDATA: dict[str, dict[str, Any]] = {
    "litdata": {},
    "litdata, 2 workers": {"workers": 2},
    "litdata zstd": {"compression": "zstd"},
}


def measure_loaders(args: argparse.Namespace, folder: Path, workers: Path) -> dict[str, Any]:
    """Makes `--rounds` passes of each loader in turn, after one that does not count."""
    home = folder / "loaders"
    home.mkdir()
    print("preparing the loaders' data ...", file=sys.stderr, flush=True)
    dataset, memmap = build(home, args.tokens)
    loaders: dict[str, Callable[[], Run]] = make_contestants(
        dataset, memmap, args.model.seq_len, args.batch
    )
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for name, options in LITDATA.items():
            loader = _Litdata(args, home, workers, options, stack)
            loaders[name] = loader
        runs: dict[str, list[Run]] = {name: [] for name in loaders}
        for number in range(-1, args.rounds):
            for name in loaders if number % 2 == 0 else reversed(loaders):
                if name in failed:
                    continue
                try:
                    run = loaders[name]()
                except (InstallError, PeerError) as error:
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                    failed[name] = str(error)
                    continue
                if number >= 0:
                    runs[name].append(run)
    return {
        "tokens": dataset.num_tokens,
        "seq_len": args.model.seq_len,
        "batch": args.batch,
        "rounds": args.rounds,
        "ours": OURS,
        "rows": loader_rows(runs, failed, OURS),
        "runs": {name: [vars(run) for run in passes] for name, passes in runs.items()},
    }


class _Litdata:
    """Makes one pass when called; the worker starts with the first, which does not count."""

    def __init__(
        self,
        args: argparse.Namespace,
        home: Path,
        workers: Path,
        options: dict[str, Any],
        stack: ExitStack,
    ) -> None:
        self._args, self._home, self._workers = args, home, workers
        self._options, self._stack = options, stack
        self._process: PeerProcess | None = None

    def __call__(self) -> Run:
        if self._process is None:
            self._process = self._start()
        (run,) = self._process.turn(1)["runs"]
        return Run(**run)

    def _start(self) -> PeerProcess:
        args = self._args
        name = "-".join(["litdata", *map(str, self._options.values())])
        folder = self._home / name
        folder.mkdir()
        task = {
            "file": str(self._home / "tokens.bin"),
            "folder": str(folder),
            "seq_len": args.model.seq_len,
            "batch": args.batch,
            "seed": args.seed,
            "threads": args.threads,
            "options": self._options,
        }
        file = folder / "task.json"
        file.write_text(json.dumps(task))
        python = python_of(args.environments, "litdata")
        command = [str(python), str(self._workers / "litdata_stream.py"), str(file)]
        process = PeerProcess(command, folder / "log", threads=args.threads, limit_s=args.limit_s)
        self._stack.callback(process.end)
        return process
