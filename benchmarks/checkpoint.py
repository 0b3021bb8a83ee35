"""How fast a checkpoint is written and read: this format, raw files, torch.save, safetensors.

    scalellm bench checkpoint [--size-mib 384] [--repeats 7] [--dir DIR] [--json FILE]

All write the state of one decoder, weights and AdamW's moments after a step, to the same disk, once
per repeat and in the opposite order in every other one. Every file is fsynced before it counts;
what is deleted is deleted outside the clock. "raw" writes the bytes of our own files, as many
files, and fsyncs each: no hash, no manifest, no rename. The stall is what the loop waits for with
`checkpoint.asynchronous`: in `Saver.save`, then, after the next forward and backward, for the rest
of the copy, before the weights change. The copy takes cores and memory from that forward and
backward, which is therefore timed too, beside a copy and alone. The first save of a run also asks
the system for the memory of its copy. Reading starts from a warm page cache: raw reads into memory
that is there, "verify" hashes every byte, "load" verifies and fills the model and its optimizer.
CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scalellm import checkpoint
from scalellm.batches import Batch
from scalellm.config import ModelConfig
from scalellm.dist import World
from scalellm.durable import fsync_path
from scalellm.errors import UserError
from scalellm.model import count_parameters
from scalellm.parity import Task, build, train_steps
from scalellm.strategies import Strategy
from scalellm.train.folder import describe_environment

MIB = 1 << 20
STATE_BYTES_A_PARAMETER = 12
WIDTHS = (768, 384, 192, 96, 48)
CHUNK_BYTES = 4 << 20
RAW, OURS = "raw write + fsync", "scalellm, synchronous"
PICKLE, SAFETENSORS = "torch.save + fsync", "safetensors save_file + fsync"
FIRST, STALL = "scalellm, stall of the first asynchronous save", "scalellm, stall of the next ones"
ALONE, BESIDE = "forward and backward, alone", "forward and backward, beside a copy"
STEP_SAMPLES = 8
READ, VERIFY, LOAD = "raw read", "scalellm, verify", "scalellm, verify and load"
# name: (dividend, divisor), of the same repeat
RATIOS = {
    "raw write / synchronous save (goal: at least 0.80)": (RAW, OURS),
    "stall / synchronous save (goal: at most 0.05)": (STALL, OURS),
    "stall of the first / synchronous save": (FIRST, OURS),
    "forward and backward, beside a copy / alone": (BESIDE, ALONE),
    "torch.save / synchronous save": (PICKLE, OURS),
    "safetensors / synchronous save": (SAFETENSORS, OURS),
    "raw read / verify": (READ, VERIFY),
    "raw read / verify and load": (READ, LOAD),
}


@dataclass
class Times:
    """Of one contestant, an entry per repeat."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(time.process_time() - cpu_s)

    def prolong(self, action: Callable[[], None]) -> None:
        """Adds what `action` takes to the last entry."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        action()
        self.wall_s[-1] += time.perf_counter() - wall_s
        self.cpu_s[-1] += time.process_time() - cpu_s


def main(argv: list[str] | None = None) -> int:
    """Measures in a temporary directory, prints a table; returns the exit code."""
    args = _parse(argv)
    model = model_of(args.size_mib * MIB)
    strategy = trained(model)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        bench = Bench(Path(folder), strategy)
        report = {
            "config": {
                "repeats": args.repeats,
                "parameters": count_parameters(model),
                "bytes": sum(map(len, bench.contents.values())),
                "files": len(bench.contents),
                "file_system": file_system(Path(folder)),
            },
            "environment": describe_environment(World()),
            "load_1min_before": os.getloadavg()[0],
        }
        bench.run(args.repeats)
    strategy.close()
    times = bench.times
    report["runs"] = {name: vars(one) for name, one in times.items()}
    report["ratios"] = {name: ratio(times[a], times[b]) for name, (a, b) in RATIOS.items()}
    print(_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench checkpoint", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size-mib", type=_count, default=384, help="of the checkpoint, MiB")
    parser.add_argument("--repeats", type=_count, default=7, help="measured passes")
    parser.add_argument("--dir", type=Path, help="on the disk to measure (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    if args.dir is not None and not args.dir.is_dir():
        raise UserError(f"--dir={args.dir} is no directory; make it, or leave --dir out")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def model_of(size_bytes: int) -> ModelConfig:
    """GPT-2 with fewer layers, narrower if need be; the vocabulary fills what is left."""
    smallest = 0
    for width in WIDTHS:
        shape = {"preset": "gpt2-124m", "hidden_size": width, "seq_len": 64, "vocab_size": 64}
        one, two = (_state_bytes(shape | {"num_layers": layers}) for layers in (1, 2))
        num_layers = min(12, int(0.8 * (size_bytes - one) / (two - one)) + 1)
        smallest = two
        if size_bytes >= two:
            rest_bytes = size_bytes - one - (num_layers - 1) * (two - one)
            vocab_size = 64 + rest_bytes // (width * STATE_BYTES_A_PARAMETER)
            shape |= {"num_layers": num_layers, "vocab_size": vocab_size}
            return ModelConfig.model_validate(shape)
    raise UserError(
        f"--size-mib={size_bytes // MIB}: the smallest decoder here takes {smallest / MIB:.1f} MiB"
    )


def _state_bytes(shape: dict[str, Any]) -> int:
    return STATE_BYTES_A_PARAMETER * count_parameters(ModelConfig.model_validate(shape))


def trained(model: ModelConfig) -> Strategy:
    """Returns the model with its optimizer's state after one step."""
    task = Task(model, 1, "fp32", global_batch=1)
    strategy = build(task, "single", {}, World())
    list(train_steps(strategy, task, World(), range(1), gradients=False))
    return strategy


class Bench:
    """One state, the ways to write and to read it, and how long each took.

    `contents` are the bytes of our own files, which the raw contestant writes.
    """

    def __init__(self, folder: Path, strategy: Strategy) -> None:
        self._folder = folder
        self._strategy = strategy
        self.times: dict[str, Times] = {}
        self._kept = checkpoint.save(folder / "kept", 1, strategy.state(), {}, World(), keep=1)
        files = sorted(self._kept.glob("*.safetensors"))
        self.contents = {file.name: file.read_bytes() for file in files}

    def run(self, repeats: int) -> None:
        """Runs all contestants in turn, first without counting."""
        contestants: list[Callable[[Path], None]] = [
            self._raw,
            self._synchronous,
            self._pickle,
            self._safetensors,
            self._asynchronous,
            self._read,
        ]
        for repeat in range(-1, repeats):
            if repeat == 0:
                self.times.clear()
            order = contestants[::-1] if repeat % 2 else contestants
            for contestant in order:
                place = self._folder / "place"
                place.mkdir()
                contestant(place)
                shutil.rmtree(place)
            print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)

    def _measured(self, name: str) -> Any:
        return self.times.setdefault(name, Times()).measured()

    def _raw(self, place: Path) -> None:
        with self._measured(RAW):
            for name, content in self.contents.items():
                with (place / name).open("wb", buffering=0) as file:
                    view = memoryview(content)
                    for start in range(0, len(view), CHUNK_BYTES):
                        file.write(view[start : start + CHUNK_BYTES])
                    os.fsync(file.fileno())

    def _synchronous(self, place: Path) -> None:
        saver = checkpoint.Saver(place, World(), keep=9, asynchronous=False)
        with self._measured(OURS):
            saver.save(1, self._strategy.state(), {})
        saver.close()

    def _pickle(self, place: Path) -> None:
        with self._measured(PICKLE):
            torch.save(self._tensors(), place / "state.pt")
            fsync_path(place / "state.pt")

    def _safetensors(self, place: Path) -> None:
        with self._measured(SAFETENSORS):
            save_file(self._tensors(), place / "state.safetensors")
            fsync_path(place / "state.safetensors")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {piece.name: piece.tensor for piece in self._strategy.state()}

    def _asynchronous(self, place: Path) -> None:
        saver = checkpoint.Saver(place, World(), keep=9, asynchronous=True)
        self._compute()
        with self._measured(ALONE):
            self._compute()
        for step, name in enumerate((FIRST, STALL)):
            with self._measured(name):
                saver.save(step, self._strategy.state(), {})
            with self._measured(BESIDE) if name == STALL else nullcontext():
                self._compute()
            self.times[name].prolong(saver.wait_for_copy)
            saver.wait()
        saver.close()

    def _compute(self) -> None:
        """The forward and backward of a step."""
        tokens_BT = torch.zeros(STEP_SAMPLES, 64, dtype=torch.long)
        with self._strategy.micro_step(True):
            loss = self._strategy.forward(Batch(tokens_BT, tokens_BT))
            self._strategy.backward(loss, tokens_BT.numel())

    def _read(self, place: Path) -> None:
        del place
        buffer = memoryview(bytearray(CHUNK_BYTES))
        files = [self._kept / name for name in self.contents]
        for name in ("warming", READ):
            with self._measured(name):
                for path in files:
                    with path.open("rb", buffering=0) as file:
                        while file.readinto(buffer):
                            pass
        self.times.pop("warming")
        with self._measured(VERIFY):
            checkpoint.open_checkpoint(self._kept)
        with self._measured(LOAD):
            found = checkpoint.open_checkpoint(self._kept)
            self._strategy.load_state(found)
            found.close()


def ratio(dividend: Times, divisor: Times) -> list[float]:
    """Returns the ratios of wall times of the same repeat: a slow spell meets both sides."""
    return [a / b for a, b in zip(dividend.wall_s, divisor.wall_s, strict=True)]


def file_system(path: Path) -> str:
    """Returns the type of the file system at `path`; in memory an fsync is nothing."""
    path = path.resolve()
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    places = [(len(place), kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(places, default=(0, "unknown"))[1]


def _table(report: dict[str, Any]) -> str:
    machine, config = report["environment"], report["config"]
    versions = machine["versions"]
    lines = [
        f"{config['bytes'] / MIB:.0f} MiB in {config['files']} files, {config['file_system']}, "
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"safetensors {versions['safetensors']}; medians of {config['repeats']} (range)",
        "",
        "| | wall s | CPU s | MiB/s |",
        "|---|---|---|---|",
    ]
    for name, run in report["runs"].items():
        speed = config["bytes"] / MIB / statistics.median(run["wall_s"])
        cells = [
            spread(run["wall_s"], 3),
            f"{statistics.median(run['cpu_s']):.3f}",
            f"{speed:,.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio of wall times, within a repeat | |", "|---|---|"]
    lines += [f"| {name} | {spread(values, 3)} |" for name, values in report["ratios"].items()]
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
