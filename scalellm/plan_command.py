"""`scalellm plan`: what its options mean; the comparison itself is in `plan/`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalellm.commands import Parser, check_output_file
from scalellm.errors import EXIT_DONE, EXIT_FAILURE, UserError

if TYPE_CHECKING:
    from scalellm.plan.devices import Device

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_EPILOG = """\
Exit code: 0 something fits, 1 nothing does.
Memory is what the code itself needs on tensors without data; speeds are rooflines with assumed
efficiencies. Nothing is trained, and no GPU is needed."""


def plan(argv: Sequence[str]) -> int:
    """Runs `scalellm plan`."""
    parser = Parser("plan", "What fits, how fast and for how much, before it is run.", _EPILOG)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key.sub=value")
    parser.add_argument("--config", help="the config file, if not the first word")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices, one a rank")
    parser.add_argument(
        "--device", default="h100-80g", help="a name, this-cpu (measured), or a YAML file"
    )
    parser.add_argument("--tokens", help="to train on, such as 300B or 1T: how many days")
    parser.add_argument("--price", type=float, help="of a device and hour: how much it costs")
    parser.add_argument(
        "--dry-run", action="store_true", help="also take a step of the recommended way, dry"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE.png", help="draw memory by strategy and world size"
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="fit the device's efficiencies to these runs (folders of runs, or of a sweep)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.yaml", help="where --calibrate writes the device"
    )
    options = parser.parse_intermixed_args(argv)
    if options.calibrate:
        return _calibrate(options)
    if options.out:
        raise UserError("--out is for --calibrate: the device file that it writes")
    words: list[str] = options.words
    if options.config is None:
        if not words or "=" in words[0]:
            raise UserError("plan needs a config: scalellm plan configs/gpt2-124m.yaml --gpus 8")
        options.config = words.pop(0)
    if not 1 <= options.gpus <= 1 << 16:
        raise UserError(f"--gpus={options.gpus} devices is not between 1 and {1 << 16}")
    if options.price is not None and not 0 <= options.price < 1e6:
        raise UserError(f"--price={options.price:g} an hour is not between 0 and a million")
    check_output_file("--json", options.json)
    check_output_file("--chart", options.chart)
    if options.chart is not None and options.chart.suffix != ".png":
        raise UserError(f"--chart={options.chart} must end in .png")
    num_tokens = None if options.tokens is None else _number(options.tokens)
    if options.price is not None and num_tokens is None:
        raise UserError("--price needs --tokens beside it: the tokens to train on, such as 300B")

    from scalellm.config import read_yaml
    from scalellm.config.yaml_text import merge_overrides
    from scalellm.plan.choose import Chooser
    from scalellm.plan.devices import find_device
    from scalellm.plan.dry_run import dry_run
    from scalellm.plan.memory import estimate
    from scalellm.plan.show import show, show_dry_run, to_json

    values = merge_overrides(read_yaml(Path(options.config)), words)
    device = find_device(options.device, options.gpus)
    kind = "cpu" if device.is_cpu else "cuda"
    found = Chooser(values, device, partial(estimate, device_type=kind)).plan(options.gpus)
    print(show(found, num_tokens, options.price))
    if options.json:
        text = to_json(found, num_tokens, options.price)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.chart:
        _draw(options.chart, values, options.gpus, device)
    if options.dry_run and found.best is not None and found.best.config is not None:
        try:
            dry = dry_run(found.best.config, options.gpus, kind)
            print("\n" + show_dry_run(dry, found.best))
        except UserError as error:
            print(f"\nno dry run: {error}")
    return EXIT_DONE if found.best is not None else EXIT_FAILURE


def _draw(path: Path, values: dict[str, Any], world_size: int, device: Device) -> None:
    from scalellm.plan.chart import by_strategy_and_world, memory_figure
    from scalellm.plan.memory import estimate
    from scalellm.report.figures import write_png

    estimator = partial(estimate, device_type="cpu" if device.is_cpu else "cuda")
    rows = by_strategy_and_world(values, world_size, device, estimator)
    write_png(memory_figure(rows, device.usable_bytes), path)
    print(f"\nmemory by strategy and world size: {path}")


def _calibrate(options: argparse.Namespace) -> int:
    """Fits the factors of `--device` to runs, and writes them as a device file."""
    if options.words or options.config:
        word = options.config or options.words[0]
        raise UserError(f"--calibrate reads what was trained from the runs; leave {word} out")
    out: Path = options.out or Path(f"{Path(options.device).stem}-calibrated.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out={out} must end in .yaml, as --device takes it")
    check_output_file("--out", out)

    from scalellm.plan.calibrate import calibrate
    from scalellm.plan.devices import find_device
    from scalellm.plan.measured import device_text, find_runs, show_calibration

    device = find_device(options.device)
    found = calibrate(find_runs(options.calibrate, device))
    print(show_calibration(device, found))
    out.write_text(device_text(device, found), encoding="utf-8")
    print(f"\nwritten: {out}; plan with --device {out}")
    return EXIT_DONE


def _number(text: str) -> float:
    """Reads 300B as 3e11."""
    scale = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e18:
        raise UserError(f"--tokens={text} is not a number of tokens, such as 300B or 1T")
    return number
