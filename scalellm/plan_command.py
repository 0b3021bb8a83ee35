"""`scalellm plan`: what its options mean; the comparison itself is in `plan/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalellm.commands import Parser
from scalellm.errors import EXIT_DONE, EXIT_FAILURE, UserError

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
    options = parser.parse_intermixed_args(argv)
    words: list[str] = options.words
    if options.config is None:
        if not words or "=" in words[0]:
            raise UserError("plan needs a config: scalellm plan configs/gpt2-124m.yaml --gpus 8")
        options.config = words.pop(0)
    if not 1 <= options.gpus <= 1 << 16:
        raise UserError(f"--gpus={options.gpus} devices is not between 1 and {1 << 16}")
    if options.price is not None and not 0 <= options.price < 1e6:
        raise UserError(f"--price={options.price:g} an hour must be a number of 0 or more")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json={options.json}: there is no folder {options.json.parent}")
    num_tokens = None if options.tokens is None else _number(options.tokens)
    if options.price is not None and num_tokens is None:
        raise UserError("--price needs --tokens beside it: the tokens to train on, such as 300B")

    from functools import partial

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
    if options.dry_run and found.best is not None and found.best.config is not None:
        try:
            dry = dry_run(found.best.config, options.gpus, kind)
            print("\n" + show_dry_run(dry, found.best))
        except UserError as error:
            print(f"\nno dry run: {error}")
    return EXIT_DONE if found.best is not None else EXIT_FAILURE


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
