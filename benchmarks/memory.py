"""What each rank holds, by strategy and world size, against theory and against the system's count.

    scalellm bench memory [--worlds 1,2,4] [--only ddp,fsdp,...] [--size 40m] [--json FILE]

Each cell is a run of its own processes: two steps of a model with few activations. `held` is what
the strategy says it holds of parameters, gradients and optimizer state; theory is 16 bytes a
parameter for fp32 AdamW, each kind divided by the ranks that share it, plus a master copy where
ZeRO keeps one. `peak` is the resident set's high-water mark above its size before the model was
built, the largest of all ranks: activations, buffers and the allocator's own are in it too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _held import parameters_of_fullest

from scalellm import strategies
from scalellm.clusters.local import launch
from scalellm.config import ModelConfig, StrategyConfig
from scalellm.dist import World, ranks
from scalellm.errors import UserError
from scalellm.metrics import peak_rss_bytes, rss_bytes
from scalellm.model import count_parameters
from scalellm.parity import VARIANTS, Task, Variant, build, train_steps
from scalellm.train.folder import describe_environment

MIB = 1 << 20
SHAPE = {"num_heads": 8, "num_kv_heads": 8, "vocab_size": 8209, "seq_len": 32}
SIZES = {
    "tiny": {"num_layers": 4, "hidden_size": 64},
    "40m": {"num_layers": 12, "hidden_size": 512},
    "150m": {"num_layers": 20, "hidden_size": 768},
}
DEFAULT = ["ddp", "fsdp", "fsdp-no-reshard", "deepspeed-1", "deepspeed-2", "deepspeed-3"]


def main(argv: list[str] | None = None) -> int:
    """Measures all cells, prints a table; returns 0 if fsdp and ZeRO-3 are within 10% of theory."""
    args = _parse(argv)
    if args.worker:
        return _work(args)
    cells = [
        _cell(args, label, world)
        for label in args.only.split(",")
        for world in map(int, args.worlds.split(","))
        if world in VARIANTS[label].worlds
    ]
    report = {
        "config": {**SHAPE, **SIZES[args.size], "parameters": count_parameters(_model(args))},
        "environment": describe_environment(World()),
        "cells": cells,
        "passed": all(abs(c["held_over_theory"] - 1) < 0.1 for c in cells if c["is_sharded"]),
    }
    print(_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--worlds", default="1,2,4", help="such as 1,2,4")
    parser.add_argument("--only", default=",".join(DEFAULT), help="variants, by comma")
    parser.add_argument("--size", choices=SIZES, default="40m", help="parameters of the model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [label for label in args.only.split(",") if label not in VARIANTS]
    if unknown:
        raise UserError(f"--only: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return args


def _model(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.model_validate({**SHAPE, **SIZES[args.size]})


def _cell(args: argparse.Namespace, label: str, world_size: int) -> dict[str, Any]:
    print(f"{label}, {world_size} rank(s) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["bench", "memory", "--size", args.size, "--only", label, "--worker", folder]
        if launch(words, world_size):
            raise UserError(f"bench memory stopped at {label}; the reason is above")
        parts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    held_bytes = max(sum(part["memory"].values()) for part in parts)
    theory_bytes = parts[0]["theory_bytes"]
    return {
        "variant": label,
        "world_size": world_size,
        "held_bytes": held_bytes,
        "theory_bytes": theory_bytes,
        "held_over_theory": held_bytes / theory_bytes,
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "is_sharded": parts[0]["is_sharded"],
    }


def _work(args: argparse.Namespace) -> int:
    variant = VARIANTS[args.only]
    with ranks("auto", threads=1) as world:
        model = _model(args)
        task = Task(model, 2, "fp32", global_batch=4)
        # Imports, groups and kernels are there before the baseline is taken.
        task = task.of(variant)
        warm_model = ModelConfig.model_validate({**SHAPE, **SIZES["tiny"]})
        _run(replace(task, model=warm_model, steps=1), variant.name, variant.options, world)
        baseline_bytes = rss_bytes()
        _reset_peak()
        memory = _run(task, variant.name, variant.options, world)
        sharding = _sharding(variant.name, variant.options, world, task)
        row = {
            "memory": memory,
            "peak_bytes": peak_rss_bytes() - baseline_bytes,
            "theory_bytes": _theory_bytes(parameters_of_fullest(variant, model), variant, sharding),
            "is_sharded": sharding.parameters == world.world_size,
        }
        (args.worker / f"{world.rank}.json").write_text(json.dumps(row))
    return 0


def _run(task: Task, name: str, options: dict[str, Any], world: World) -> dict[str, int]:
    strategy = build(task, name, options, world)
    for _ in range(task.steps):
        # Whole gradients, as `train_steps` gathers for parity, would be counted too.
        list(train_steps(strategy, task, world, range(1), gradients=False))
    memory = strategy.memory()
    strategy.close()
    return memory


def _sharding(name: str, options: dict[str, Any], world: World, task: Task) -> strategies.Sharding:
    strategy = strategies.resolve(name)
    config = StrategyConfig.model_validate({"name": name, **options})
    train = task.train_config()
    parsed = strategies.parse_options(config, strategy, world, train)
    return strategy.sharding(parsed, world, train)


def _theory_bytes(parameters: int, variant: Variant, sharding: strategies.Sharding) -> int:
    # ZeRO 1 and 2 update a master copy of their part of the weights.
    masters = 4 if variant.options.get("stage") in (1, 2) else 0
    bytes_a_parameter = (
        4 / sharding.parameters + 4 / sharding.gradients + (8 + masters) / sharding.optimizer
    )
    return int(bytes_a_parameter * parameters)


def _reset_peak() -> None:
    """Lets Linux count the high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _table(report: dict[str, Any]) -> str:
    machine = report["environment"]
    lines = [
        f"{report['config']['parameters']:,} parameters, fp32 AdamW, {machine['processor']}, "
        f"torch {machine['versions']['torch']}, deepspeed {machine['versions']['deepspeed']}",
        "",
        "| variant | ranks | held MiB a rank | theory MiB | held / theory | peak MiB a rank |",
        "|---|---|---|---|---|---|",
    ]
    for cell in report["cells"]:
        sizes = [cell[key] / MIB for key in ("held_bytes", "theory_bytes", "peak_bytes")]
        lines.append(
            f"| {cell['variant']} | {cell['world_size']} | {sizes[0]:.0f} | {sizes[1]:.0f} | "
            f"{cell['held_over_theory']:.2f} | {sizes[2]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
