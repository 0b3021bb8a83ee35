"""The same loss, shown: strategies x world sizes against one process, and every save in every load.

    scalellm bench parity [--worlds 1,2,4] [--only ddp,fsdp,...] [--size tiny|1m|12m] [--steps 20]
                          [--pairs variants|all|none] [--json FILE] [--markdown FILE]

Each cell trains the same task (tied embeddings, clipping that bites, ragged targets, an odd
vocabulary) and is compared with `single`: the losses, the gradient norms, and the raw gradients of
the first step. Torch-native strategies are held to 1e-11 in fp64, DeepSpeed and Accelerate to 1e-5
in fp32. Then checkpoints taken half-way are resumed and compared with the uninterrupted `single`:
every variant's by every variant at another world size (`--pairs all`: every cell's by every cell).
Resumed by its own cell a checkpoint must give the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _parity_report import make_report, to_markdown
from safetensors.torch import load_file, save_file

from scalellm.clusters.local import launch
from scalellm.config import ModelConfig, StrategyConfig
from scalellm.dist import World, ranks
from scalellm.errors import ConfigError, UserError
from scalellm.parity import REPORTED, VARIANTS, Curve, Task, check_task, differences, run_curve

ALL = VARIANTS | REPORTED
SIZES = {
    "tiny": {"num_layers": 4, "hidden_size": 48, "num_heads": 4, "vocab_size": 61, "seq_len": 24},
    "1m": {"num_layers": 5, "hidden_size": 128, "num_heads": 4, "vocab_size": 1031, "seq_len": 64},
    "12m": {"num_layers": 6, "hidden_size": 384, "num_heads": 6, "vocab_size": 8209, "seq_len": 64},
}


def main(argv: list[str] | None = None) -> int:
    """Runs the matrix; returns 0 if every cell is within its tolerance, else 1."""
    args = _parse(argv)
    if args.worker:
        return _work(args)
    for path in (args.json, args.markdown):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; create it")
    with tempfile.TemporaryDirectory() as folder:
        report = _measure(args, Path(folder))
    text = to_markdown(report)
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench parity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--worlds", type=_numbers, default=[1, 2, 4], help="such as 1,2,4")
    parser.add_argument(
        "--only", type=_labels, default=list(ALL), help="variants or variant@ranks, by comma"
    )
    parser.add_argument("--size", choices=SIZES, default="1m", help="parameters of the model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", choices=["variants", "all", "none"], default="variants")
    parser.add_argument("--cpu-adam", choices=["deepspeed", "torch"], default="deepspeed")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        raise UserError(f"--steps={args.steps} must be 2 or more: half of them come before a save")
    return args


def _numbers(text: str) -> list[int]:
    return sorted({int(word) for word in text.split(",")})


def _labels(text: str) -> list[str]:
    labels = text.split(",")
    unknown = [label for label in labels if label.partition("@")[0] not in ALL]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(ALL)}")
    return labels


# -- cells ------------------------------------------------------------------------------------


def _task(args: argparse.Namespace, precision: str) -> Task:
    model = ModelConfig.model_validate({**SIZES[args.size], "num_kv_heads": 2})
    rate = {"tiny": 2e-3, "1m": 1e-3, "12m": 3e-4}[args.size]
    return Task(model, args.steps, precision, learning_rate=rate, grad_clip=0.5)


def _options(args: argparse.Namespace, label: str) -> dict[str, Any]:
    options = ALL[label].options
    offloads = "offload_optimizer" in options
    return {**options, "cpu_adam": args.cpu_adam} if offloads else options


def _cells(args: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """`label@world` of all cells asked for; the reference is always there."""
    cells = {"single@1": ("single", 1)}
    for words in args.only:
        label, _, only_world = words.partition("@")
        for world in args.worlds:
            if world in ALL[label].worlds and only_world in ("", str(world)):
                cells[f"{label}@{world}"] = (label, world)
    return cells


def _skipped(args: argparse.Namespace) -> dict[str, str]:
    """Cells this machine cannot run, with the sentence that says why."""
    reasons = {}
    for cell, (label, world_size) in _cells(args).items():
        variant = ALL[label]
        config = StrategyConfig.model_validate({"name": variant.name, **_options(args, label)})
        world = World(world_size=world_size, launcher=f"--nproc {world_size}")
        task = _task(args, variant.precision).of(variant)
        try:
            check_task(task, config, world)
        except ConfigError as error:
            reasons[cell] = str(error)
    return reasons


def _pairs(args: argparse.Namespace, cells: dict[str, tuple[str, int]]) -> list[tuple[str, str]]:
    """(saved in, resumed in): each cell in itself, and as `--pairs` says in the others."""
    cells = {cell: value for cell, value in cells.items() if value[0] in VARIANTS}
    if args.pairs == "none":
        return []
    if args.pairs == "all":
        return [(a, b) for a in cells for b in cells]
    worlds: dict[str, list[int]] = {}
    for label, world in cells.values():
        worlds.setdefault(label, []).append(world)
    pairs = [(cell, cell) for cell in cells]
    for saved, saved_in in worlds.items():
        a = saved_in[len(saved_in) // 2]  # the middle: 2 of 1, 2, 4
        for resumed, resumed_in in worlds.items():
            b = max((w for w in resumed_in if w != a), default=resumed_in[-1])
            pairs.append((f"{saved}@{a}", f"{resumed}@{b}"))
    return list(dict.fromkeys(pairs))


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    skipped = _skipped(args)
    cells = {cell: value for cell, value in _cells(args).items() if cell not in skipped}
    pairs = _pairs(args, cells)
    (folder / "runs").mkdir()
    (folder / "jobs.json").write_text(json.dumps({"cells": cells, "pairs": pairs}))
    # Runs first, at every world size, then resumes: those need all checkpoints.
    for phase in ("run", "resume") if pairs else ("run",):
        for world in sorted({world for _, world in cells.values()}):
            _say(f"{phase}: world size {world} ...")
            words = [*_words(args), "--worker", str(folder / f"{phase}-{world}")]
            code = launch(["bench", "parity", *words], world)
            if code:
                raise UserError(f"bench parity stopped at world size {world}; the reason is above")
    print(file=sys.stderr)
    settings = {"size": args.size, "steps": args.steps, **SIZES[args.size]}
    return make_report(settings, folder / "runs", cells, pairs, skipped)


def _words(args: argparse.Namespace) -> list[str]:
    words = ["--size", args.size, "--steps", str(args.steps), "--cpu-adam", args.cpu_adam]
    return [*words, "--device", args.device, "--pairs", args.pairs]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- in the ranks -----------------------------------------------------------------------------


def _work(args: argparse.Namespace) -> int:
    """One phase at one world size: all its cells in the same processes, one after the other."""
    folder = args.worker.parent
    phase = args.worker.name.partition("-")[0]
    jobs = json.loads((folder / "jobs.json").read_text())
    with ranks(args.device, threads=1 if args.device != "cuda" else 0) as world:
        here = {c: label for c, (label, size) in jobs["cells"].items() if size == world.world_size}
        try:
            if phase == "run":
                for cell, label in here.items():
                    _run_cell(args, folder, cell, label, world)
            else:
                for saved, resumed in jobs["pairs"]:
                    if resumed in here:
                        _resume_cell(args, folder, saved, resumed, here[resumed], world)
        except Exception:
            traceback.print_exc()
            # The other ranks may wait for this one in a collective: end at once, the launcher
            # ends them.
            os._exit(1)
    return 0


def _run_cell(args: argparse.Namespace, folder: Path, cell: str, label: str, world: World) -> None:
    variant = ALL[label]
    for precision in sorted({variant.precision, "fp32"}):
        task = _task(args, precision).of(variant)
        is_saved = precision == "fp32" and label in VARIANTS
        save = folder / "checkpoints" / cell if is_saved else None
        with _quiet(world):
            curve = run_curve(task, variant.name, _options(args, label), world, save=save)
        if label == "single" and world.is_main:
            save_file(curve.gradients, folder / f"gradients-{precision}.safetensors")
        if world.is_main:
            _write(folder / "runs" / f"{cell}-{precision}.json", _plain(curve, folder, precision))
    if label == "single":  # what rounding alone does: the same batches in other micro-batches
        with _quiet(world):
            curve = run_curve(replace(_task(args, "fp32"), micro_batch=1), label, {}, world)
        _write(folder / "runs" / "rounding.json", _plain(curve, folder, "fp32"))


def _resume_cell(
    args: argparse.Namespace, folder: Path, saved: str, resumed: str, label: str, world: World
) -> None:
    load = folder / "checkpoints" / saved
    with _quiet(world):
        curve = run_curve(
            _task(args, "fp32").of(ALL[label]),
            ALL[label].name,
            _options(args, label),
            world,
            load=load,
        )
    if world.is_main:
        _write(folder / "runs" / f"{saved}--{resumed}.json", _plain(curve, None, "fp32"))


def _plain(curve: Curve, folder: Path | None, precision: str) -> dict[str, Any]:
    values = asdict(curve)
    del values["gradients"]
    if folder is not None:
        wanted = Curve(gradients=load_file(folder / f"gradients-{precision}.safetensors"))
        found = Curve(gradients=curve.gradients)
        values["gradient_difference"] = differences(found, wanted)["gradients"]
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Backends print to stdout; the table must not be mixed with that."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
    if world.is_main:
        print(".", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
