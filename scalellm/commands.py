"""What each `scalellm` command takes and calls; imports inside, so that it answers at once."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.errors import EXIT_DONE, UserError, did_you_mean

if TYPE_CHECKING:
    from scalellm.report.document import Chart
    from scalellm.report.runs import Run

Command = Callable[[Sequence[str]], int]


class Parser(argparse.ArgumentParser):
    """No prefix matching (launchers append options of their own); errors as one sentence."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"scalellm {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def check_output_file(option: str, path: Path | None) -> None:
    """Refuses before the work what could not be written after it."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder; give the name of a file")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option}={path}: there is no folder {path.parent}")


def generate_text(run_dir: Path, prompt: str, sampling: object) -> str:
    """Streams a continuation to the terminal and returns it with its prompt."""
    from scalellm.generate import stream_text
    from scalellm.inference import load_run

    model, tokenizer = load_run(run_dir)
    print(f"\n{prompt}", end="", flush=True)
    parts = [prompt]
    for part in stream_text(model, tokenizer, prompt, sampling):  # type: ignore[arg-type]
        print(part, end="", flush=True)
        parts.append(part)
    print()
    return "".join(parts)


def _generate(argv: Sequence[str]) -> int:
    parser = Parser("generate", "Continue a text with a trained model, streaming.")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue")
    parser.add_argument("--run", type=Path, required=True, help="run folder or checkpoint")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-k", type=int, help="only the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="only the likeliest tokens up to this mass")
    parser.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, help="the same seed, the same text")
    options = parser.parse_intermixed_args(argv)
    if any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
        raise UserError("the prompt is not valid UTF-8: check the encoding of your terminal")
    from scalellm.generate import Sampling

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        no_repeat_ngram=options.no_repeat_ngram,
        seed=options.seed,
    )
    generate_text(options.run, options.prompt, sampling)
    return EXIT_DONE


def _eval(argv: Sequence[str]) -> int:
    parser = Parser("eval", "Loss and perplexity of a run on a dataset.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", help="dataset folder or URL; default: the run's own")
    parser.add_argument(
        "--split",
        help="train or validation; default: validation of the run's own dataset, "
        "everything of another one",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples per forward")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_intermixed_args(argv)
    if options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size} samples must be 1 or more")
    check_output_file("--json", options.json)
    from scalellm.inference import evaluate_run

    report = evaluate_run(options.run, options.data, options.split, options.batch_size)
    print(report)
    if options.json:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return EXIT_DONE


def _export(argv: Sequence[str]) -> int:
    parser = Parser("export", "Write a run's weights as plain safetensors, for other tools.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    options = parser.parse_intermixed_args(argv)
    from scalellm.export import export_run

    print(export_run(options.run, options.out, options.dtype))
    return EXIT_DONE


def _report(argv: Sequence[str]) -> int:
    parser = Parser("report", "Plots and tables of runs, side by side, on one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write (default: the run's own, or ./report for several runs)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="also what the planner predicts of their memory"
    )
    options = parser.parse_intermixed_args(argv)
    from scalellm.report import report_runs

    more = _planned if options.plan else None
    page, *others = report_runs(options.runs, options.out, more)
    print(f"{page} (also {others[0].name} and {len(others) - 1} plots)")
    return EXIT_DONE


def _planned(runs: list[Run]) -> list[Chart]:
    from scalellm.plan.chart import measured_chart, run_rows

    return measured_chart(run_rows(runs))


def _bench(argv: Sequence[str]) -> int:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    known = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if not known:
        raise UserError("the benchmarks are part of the source checkout: run them from there")
    if not argv or argv[0] not in known:
        near = did_you_mean(argv[0], known) if argv else ""
        asked = f"unknown benchmark {argv[0]!r}{near}" if argv else "bench needs a name"
        raise UserError(f"{asked}; benchmarks: {', '.join(known)}")
    sys.path.insert(0, str(folder))  # benchmarks share modules named _*.py
    module = runpy.run_path(str(folder / f"{argv[0]}.py"))
    return int(module["main"](list(argv[1:])) or 0)


def _schema(argv: Sequence[str]) -> int:
    Parser("schema", "Print the JSON schema of config files.").parse_args(argv)
    from scalellm.reference import json_schema

    print(json_schema(), end="")
    return EXIT_DONE


COMMANDS: dict[str, tuple[Command, str]] = {
    "eval": (_eval, "loss and perplexity of a run on a dataset"),
    "generate": (_generate, "continue a text with a trained model"),
    "export": (_export, "write a run's weights for other tools"),
    "report": (_report, "plots and tables of runs, side by side"),
    "bench": (_bench, "measure on this machine"),
    "schema": (_schema, "print the JSON schema of config files"),
}
