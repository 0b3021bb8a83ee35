"""The page of `scalellm report`: runs side by side, and what was different about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scalellm.report import charts
from scalellm.report.charts import Bar, Line, Stack
from scalellm.report.document import (
    DASH,
    Cell,
    Chart,
    Details,
    Document,
    Heading,
    Listing,
    Paragraph,
    Table,
    facts,
    is_number,
    number,
)
from scalellm.report.files import write_document
from scalellm.report.loss import smooth
from scalellm.report.runs import PARTS, Run, flattened, read_runs

MIB = 1 << 20
_PART_NAMES = ("data wait", "forward", "backward", "optimizer", "other")
_DEFINITIONS = (
    ("tokens/s", "median over the steps in metrics.jsonl: a step's tokens / its whole wall time"),
    ("goodput", "tokens of the last start of a run / its wall time from the start of its process"),
    ("loss", "nats per token; the training loss is that of the last step, not smoothed"),
    ("peak RSS", "most resident memory of a process since it began, imports included"),
    (
        "step time",
        "medians of host seconds on rank 0; waiting for other ranks is inside backward (ddp, fsdp) "
        "or optimizer (ZeRO), not a part of its own",
    ),
)


More = Callable[[list[Run]], Sequence[Chart]]


def report_runs(
    folders: Sequence[Path], out: Path | None = None, more: More | None = None
) -> list[Path]:
    """Writes a page about runs, finished or not; see `write_document` for its files.

    Args:
        out: folder to write into; None: the run's own, or `report` here if there are several.
        more: draws what this room knows nothing of, to stand after the other charts.

    Raises:
        UserError: a folder holds no run, or `out` cannot be written.
    """
    runs = read_runs(folders)
    if out is None:
        out = folders[0] if len(runs) == 1 else Path("report")
    return write_document(run_document(runs, more(runs) if more else ()), out)


def run_document(runs: list[Run], more: Sequence[Chart] = ()) -> Document:
    title = f"Run {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    document = Document(title)
    document.add(_summary(runs))
    document.add(*_loss_charts(runs), *_speed_charts(runs), *_memory_charts(runs), *more)
    document.add(*_config_blocks(runs), Heading("Hardware and versions"), *_environments(runs))
    document.add(Heading("Definitions"), Listing(_DEFINITIONS))
    return document


def _summary(runs: list[Run]) -> Table:
    columns = "run, strategy, ranks, precision, steps, tokens, training loss, validation loss"
    columns += ", tokens/s, goodput tokens/s, peak RSS MiB, start-up s, ended"
    return Table(columns.split(", "), [_summary_row(run) for run in runs])


def _summary_row(run: Run) -> list[Cell]:
    last = run.train[-1]
    losses, evals = run.pairs("loss")[1], run.eval_losses()[1]
    ended = run.end.get("reason")
    return [
        Cell(run.label),
        Cell(_strategy(run)),
        number(run.end.get("world_size", run.environment.get("world_size")), "{:.0f}".format),
        Cell(str(run.setting("train", "precision") or run.end.get("precision") or DASH)),
        number(last["step"], "{:,.0f}".format),
        number(last.get("tokens"), "{:,.0f}".format),
        number(losses[-1] if losses else None, "{:.4f}".format),
        number(evals[-1] if evals else None, "{:.4f}".format),
        number(run.median("tokens_per_s"), "{:,.0f}".format),
        number(run.end.get("goodput_tokens_per_s"), "{:,.0f}".format),
        number(max(run.per_rank("peak_rss_bytes"), default=None), _mib),
        number(run.end.get("startup_s"), "{:.1f}".format),
        Cell(str(ended)) if ended else Cell("not yet, or cut off", tone="muted"),
    ]


def _strategy(run: Run) -> str:
    name = run.setting("strategy", "name") or run.end.get("strategy") or DASH
    stage = run.setting("strategy", "stage")
    return f"{name} stage {stage}" if stage is not None else str(name)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / MIB:,.0f}"


def _colour(index: int) -> str:
    return charts.COLOURS[index % len(charts.COLOURS)]


def _loss_charts(runs: list[Run]) -> list[Chart]:
    caption = "Solid: training loss, mean over a fortieth of the run. Dashed: validation loss."
    found = [Chart("loss", "Loss", caption, _loss_figure(runs, by_tokens=False))]
    tokens_a_step = {
        round(run.train[-1]["tokens"] / run.train[-1]["step"])
        for run in runs
        if is_number(run.train[-1].get("tokens")) and run.train[-1]["step"]
    }
    if len(tokens_a_step) > 1:  # then the same step is not the same amount of data
        figure = _loss_figure(runs, by_tokens=True)
        found.append(Chart("loss-by-tokens", "Loss by tokens seen", caption, figure))
    return found


def _loss_figure(runs: list[Run], *, by_tokens: bool) -> Any:
    series = []
    for index, run in enumerate(runs):
        last = run.train[-1]
        tokens_a_step = last.get("tokens", 0) / max(1, last["step"])
        steps, losses = run.pairs("loss")
        eval_steps, eval_losses = run.eval_losses()
        x = [step * tokens_a_step / 1e6 for step in steps] if by_tokens else steps
        eval_x = [step * tokens_a_step / 1e6 for step in eval_steps] if by_tokens else eval_steps
        if len(runs) <= 3:
            series.append(Line("", x, losses, _colour(index), faint=True))
        series.append(Line(run.label, x, smooth(losses), _colour(index)))
        if eval_x:
            dashed = Line("", eval_x, eval_losses, _colour(index), dashed=True, markers=True)
            series.append(dashed)
    return charts.lines(series, "million tokens" if by_tokens else "step", "loss, nats per token")


def _speed_charts(runs: list[Run]) -> list[Chart]:
    series = []
    for index, run in enumerate(runs):
        steps, rates = run.pairs("tokens_per_s")
        if steps:
            series.append(Line("", steps, rates, _colour(index), faint=True))
            series.append(Line(run.label, steps, smooth(rates), _colour(index)))
    found = []
    if series:
        caption = "All ranks together. Faint: every step; solid: mean over a fortieth of the run."
        figure = charts.lines(series, "step", "tokens/s")
        found.append(Chart("tokens-per-s", "Throughput", caption, figure))
    stacks = [stack for run in runs if (stack := _step_stack(run)) is not None]
    if stacks:
        caption = (
            "Medians of host seconds on rank 0. Waiting for other ranks is inside backward (ddp, "
            "fsdp) or optimizer (ZeRO). Runs of older versions tell the data wait alone; the rest "
            "of their step is in other."
        )
        figure = charts.stacks(stacks, _PART_NAMES, "milliseconds a step")
        found.append(Chart("step-time", "Where a step's time goes", caption, figure))
    return found


def _step_stack(run: Run) -> Stack | None:
    total_s = run.median("step_time_s")
    if total_s is None:
        return None
    parts_s = [run.median(part) or 0.0 for part in PARTS]
    parts_s.append(max(0.0, total_s - sum(parts_s)))
    return Stack(run.label, [1e3 * part_s for part_s in parts_s], f"{1e3 * total_s:,.0f} ms")


def _memory_charts(runs: list[Run]) -> list[Chart]:
    found = []
    for key, name, title in (
        ("peak_rss_bytes", "memory", "Peak resident memory per rank"),
        ("peak_device_bytes", "device-memory", "Peak device memory per rank"),
    ):
        rows = [_memory_bar(run, key, _colour(index)) for index, run in enumerate(runs)]
        if not any(row.value for row in rows):
            continue
        has_mark = any(row.mark is not None for row in rows)
        caption = "The bar is the rank with the most. A run that has not ended knows rank 0 alone."
        if has_mark:
            caption += " The tick is what was resident after imports, before the model was built."
        figure = charts.bars(
            rows,
            "MiB",
            mark="after imports" if has_mark else "",
            points="a rank" if any(len(row.points) > 1 for row in rows) else "",
        )
        found.append(Chart(name, title, caption, figure))
    return found


def _memory_bar(run: Run, key: str, colour: str) -> Bar:
    sizes = [size_bytes / MIB for size_bytes in run.per_rank(key)]
    if not sizes:
        return Bar(run.label, None, note="not recorded")
    baseline = run.per_rank("baseline_rss_bytes") if key == "peak_rss_bytes" else []
    return Bar(
        run.label,
        max(sizes),
        f"{max(sizes):,.0f}",
        mark=max(baseline) / MIB if baseline else None,
        points=sizes,
        colour=colour,
    )


def _config_blocks(runs: list[Run]) -> list[Heading | Paragraph | Table | Details]:
    configs = [flattened(run.config) for run in runs]
    blocks: list[Heading | Paragraph | Table | Details] = []
    if len(runs) > 1:
        blocks.append(Heading("What is different in their configs"))
        rows = _differences(configs, leave_out={"run.dir"})
        same = Paragraph(("Nothing but run.dir.",))
        blocks.append(Table(("key", *(run.label for run in runs)), rows) if rows else same)
    for run, config in zip(runs, configs, strict=True):
        if config:
            text = "\n".join(f"{key}: {value}" for key, value in config.items())
            blocks.append(Details(f"Config of {run.label}", text))
    return blocks


def _environments(runs: list[Run]) -> list[Table | Paragraph]:
    """What holds for all runs once, then a table of what does not."""
    flat = [flattened(run.environment | {"command": None}) for run in runs]
    for one in flat:
        one.pop("command")
    shared = {
        key: value
        for key, value in flat[0].items()
        if value != "null" and all(other.get(key) == value for other in flat)
    }
    blocks: list[Table | Paragraph] = []
    if shared:
        blocks.append(facts((key, value) for key, value in shared.items()))
    rows = _differences(flat)
    if rows:
        blocks.append(Table(("differs", *(run.label for run in runs)), rows))
    return blocks or [Paragraph(("The runs do not say where they ran.",))]


def _differences(flat: list[dict[str, str]], leave_out: set[str] | None = None) -> list[list[Cell]]:
    keys = dict.fromkeys(key for one in flat for key in one if key not in (leave_out or set()))
    return [
        [Cell(key), *(Cell(one[key]) if key in one else number(None, str) for one in flat)]
        for key in keys
        # A key that a run does not know is no difference from one that is not set.
        if len({one.get(key, "null") for one in flat}) > 1
    ]
