"""The plots of a sweep, from `sweep.json` alone; what was not measured is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from _sweep_cells import Cell

from scalellm.errors import UserError
from scalellm.plan.chart import memory_figure, planned
from scalellm.report import charts
from scalellm.report.charts import Bar, Line, Stack
from scalellm.report.document import Chart, is_number

MIB = 1 << 20
PARTS = ("data_wait_s", "forward_s", "backward_s", "optimizer_s", "other_s")
PART_NAMES = ("data wait", "forward", "backward", "optimizer", "other")
_MOST_LABELS = 12  # curves in a legend; above that one for each variant
SweepCell = dict[str, Any]


def sweep_charts(cells: list[SweepCell]) -> list[Chart]:
    """Draws every kind of plot that the cells have figures for, one for each model size."""
    colours = {
        variant: charts.COLOURS[index % len(charts.COLOURS)]
        for index, variant in enumerate(dict.fromkeys(cell["variant"] for cell in cells))
    }
    by_size: dict[str, list[SweepCell]] = {}
    for cell in cells:
        by_size.setdefault(cell["size"], []).append(cell)
    kinds: tuple[Callable[[_Size], Iterable[Chart]], ...] = (
        _throughput,
        _memory,
        _planned_memory,
        _efficiency,
        _step_time,
        _losses,
        _mfu,
    )
    sizes = [_Size(name, found, colours) for name, found in by_size.items()]
    return [chart for draw in kinds for size in sizes for chart in draw(size)]


class _Size:
    """The cells of one model size, and how a plot of them names and paints each."""

    def __init__(self, name: str, cells: list[SweepCell], colours: dict[str, str]) -> None:
        self.name = name
        self.cells = cells
        self.measured = [cell for cell in cells if cell["status"] == "ok"]
        self._colours = colours
        options = [self._options(cell) for cell in cells]
        # An option that all cells share tells nothing.
        self._telling = [len(set(values)) > 1 for values in zip(*options, strict=True)]

    @staticmethod
    def _options(cell: SweepCell) -> tuple[str, ...]:
        kept = cell["activation_checkpointing"]
        return (
            cell["precision"],
            "compile" if cell["compile"] else "",
            "" if kept == "none" else f"act-ckpt {kept}",
            "weak" if cell["scaling"] == "weak" else "",
        )

    def label(self, cell: SweepCell) -> str:
        pairs = zip(self._options(cell), self._telling, strict=True)
        words = [word for word, is_telling in pairs if is_telling and word]
        return " ".join([f"{cell['variant']}@{cell['world_size']}", *words])

    def colour(self, cell: SweepCell) -> str:
        return self._colours[cell["variant"]]

    def chart(self, kind: str, title: str, caption: str, figure: Any) -> Chart:
        name = "".join(c if c.isalnum() and c.isascii() else "-" for c in self.name.lower())
        return Chart(f"{kind}-{name}", f"{title}, {self.name}", caption, figure)


def _throughput(size: _Size) -> Iterable[Chart]:
    rows = []
    for cell in size.cells:
        rate = cell.get("tokens_per_s")
        if cell["status"] == "skipped":
            continue
        if cell["status"] != "ok" or not rate:
            rows.append(Bar(size.label(cell), None, note=cell["status"]))
            continue
        low, high = rate.get("low"), rate.get("high")
        text = f"{rate['median']:,.0f}"
        rows.append(
            Bar(size.label(cell), rate["median"], text, low, high, colour=size.colour(cell))
        )
    if size.measured:
        caption = (
            "Median over the measured steps of all repeats, all ranks together; the line across "
            "the end of a bar goes from quartile to quartile. Skipped cells are in the table."
        )
        yield size.chart("throughput", "Throughput", caption, charts.bars(rows, "tokens/s"))


def _memory(size: _Size) -> Iterable[Chart]:
    on_device = any(any(cell.get("peak_device_bytes") or []) for cell in size.measured)
    key = "peak_device_bytes" if on_device else "rss_above_baseline_bytes"
    rows = []
    for cell in size.measured:
        ranks = [count / MIB for count in cell.get(key) or []]
        theory = cell.get("theory_bytes")
        if not ranks:
            continue
        rows.append(
            Bar(
                size.label(cell),
                max(ranks),
                f"{max(ranks):,.0f}",
                mark=theory / MIB if is_number(theory) else None,
                points=ranks,
                colour=size.colour(cell),
            )
        )
    if not rows:
        return
    what = "device memory" if on_device else "resident memory above what imports take"
    caption = (
        f"Bar: peak {what}, the rank with the most. Tick: theory, which is parameters, gradients "
        "and optimizer state of one rank; activations and buffers come on top of it."
    )
    figure = charts.bars(rows, "MiB a rank", mark="theory", points="a rank")
    yield size.chart("memory", "Memory per rank against theory", caption, figure)


def _planned_memory(size: _Size) -> Iterable[Chart]:
    """What `scalellm plan` says of the same cells; those it does not know are left out."""
    rows = []
    for cell in size.measured:
        on_gpu = any(cell.get("peak_device_bytes") or [])
        ranks = cell.get("peak_device_bytes" if on_gpu else "rss_above_baseline_bytes")
        if not ranks:
            continue
        config = Cell.of(cell).config(1)
        with suppress(UserError):
            found = planned(size.label(cell), config, cell["world_size"], max(ranks), on_gpu=on_gpu)
            rows.append(found)
    if rows:
        caption = (
            "Bar: what the planner predicts for a rank, from the config alone; in brackets over "
            "what was measured. Tick: the peak of the rank with the most, the save at the end "
            "included."
        )
        title = "Memory, predicted and measured"
        yield size.chart("planned-memory", title, caption, memory_figure(rows))


def efficiency(cell: SweepCell, cells: list[SweepCell]) -> tuple[float, str] | None:
    """Returns a cell's tokens/s per worker over those of its base, and the base's name.

    The base has the same size, precision and options: the same variant on one rank, else `single`,
    else the same variant and scaling at its smallest world. A worker is a thread, of which a CPU
    has the same number however many ranks share them; on a GPU it is a rank. None: there is no
    base but the cell itself.
    """
    if cell["world_size"] == 1 or cell["status"] != "ok":
        return None
    options = ("size", "precision", "compile", "activation_checkpointing")
    alike = [
        other
        for other in cells
        if other["status"] == "ok"
        and other["world_size"] < cell["world_size"]
        and all(other[key] == cell[key] for key in options)
    ]
    alone = [other for other in alike if other["world_size"] == 1]
    own = [other for other in alone if other["variant"] == cell["variant"]]
    own = own or [other for other in alone if other["variant"] == "single"]
    same = [o for o in alike if (o["variant"], o["scaling"]) == (cell["variant"], cell["scaling"])]
    base = next(iter(own or sorted(same, key=lambda other: other["world_size"])), None)
    if base is None:
        return None
    ratio = _per_worker(cell) / _per_worker(base)
    return ratio, f"{base['variant']}@{base['world_size']}"


def _per_worker(cell: SweepCell) -> float:
    on_device = any(cell.get("peak_device_bytes") or [])
    workers = cell["world_size"] * (1 if on_device else cell["threads_per_rank"])
    return float(cell["tokens_per_s"]["median"]) / workers


def _efficiency(size: _Size) -> Iterable[Chart]:
    for scaling, constant in (("strong", "global batch"), ("weak", "batch per rank")):
        rows = []
        for cell in size.measured:
            found = efficiency(cell, size.cells) if cell["scaling"] == scaling else None
            if found is not None:
                ratio, base = found
                text = f"{ratio:.0%} of {base}"
                rows.append(Bar(size.label(cell), 100 * ratio, text, colour=size.colour(cell)))
        if rows:
            caption = (
                f"The same {constant} in every world. Tokens/s per thread (CPU: the ranks share "
                "the machine's cores) or per GPU, against the base named beside the bar."
            )
            figure = charts.bars(rows, "% of the base's tokens/s", reference=100)
            title = f"{scaling.capitalize()} scaling efficiency"
            yield size.chart(f"{scaling}-scaling", title, caption, figure)


def _step_time(size: _Size) -> Iterable[Chart]:
    rows = [_stack(size.label(cell), cell) for cell in size.measured if cell.get("step")]
    if not rows:
        return
    has_sent = any(row.hatched_to for row in rows)
    caption = "Medians of host seconds on rank 0."
    if has_sent:
        caption += (
            " Communication is hatched inside backward or optimizer, never added on top of them: "
            "its time is in theirs already. ddp and fsdp communicate in backward (fsdp in forward "
            "too), ZeRO in the optimizer as well; the hatching says how long, not exactly when. "
            "It was measured in a profiled run of its own."
        )
    figure = charts.stacks(
        rows, PART_NAMES, "milliseconds a step", hatched="communication" if has_sent else ""
    )
    yield size.chart("step-time", "Where a step's time goes", caption, figure)


def _stack(label: str, cell: SweepCell) -> Stack:
    parts = [max(0.0, 1e3 * (cell["step"].get(part) or 0.0)) for part in PARTS]
    whole = cell["step"].get("step_time_s")
    sent = (cell.get("communication") or {}).get("time_s_per_step") or 0.0
    last = "optimizer_s" if "deepspeed" in cell["variant"] else "backward_s"
    end = sum(parts[: PARTS.index(last) + 1])
    # Never drawn over the data wait, however the profiled run differed.
    start = max(parts[0], end - 1e3 * sent)
    text = f"{1e3 * whole:,.0f} ms" if is_number(whole) else ""
    return Stack(label, parts, text, start if sent else 0.0, end if sent else 0.0)


def _losses(size: _Size) -> Iterable[Chart]:
    """Curves over each other, and their distance from the first of those with the same batch."""
    cells = [cell for cell in size.measured if cell.get("losses")]
    if not cells:
        return
    curves = _curves(size, cells, [cell["losses"] for cell in cells])
    caption = "First repeat of every cell. Weak scaling has larger batches in larger worlds."
    if len(cells) > _MOST_LABELS:
        caption += " A colour is a variant; dashed is another precision than the first."
    figure = charts.lines(curves, "step", "loss, nats per token")
    yield size.chart("loss", "Loss", caption, figure)
    first: dict[tuple[int, int], SweepCell] = {}
    others, apart = [], []
    for cell in cells:
        base = first.setdefault((cell["global_batch_size"], cell["seq_len"]), cell)
        if cell is not base:
            others.append(cell)
            apart.append(_distances(cell["losses"], base["losses"]))
    known = [value for values in apart for value in values if value]
    if known:
        # Equal to the last bit has no place on a logarithmic axis but its lower edge.
        floor = min(known) / 3
        drawn = [[v if v is None else max(v, floor) for v in values] for values in apart]
        bases = ", ".join(size.label(cell) for cell in first.values())
        caption = (
            f"Distance from the first cell with the same batch ({bases}). Values at the lower "
            "edge are equal to the last bit."
        )
        figure = charts.lines(
            _curves(size, others, drawn), "step", "difference, nats per token", log_y=True
        )
        yield size.chart("loss-difference", "Difference in loss", caption, figure)


def _distances(losses: list[Any], base: list[Any]) -> list[float | None]:
    pairs = zip(losses, base, strict=False)  # a run may have stopped early
    return [abs(a - b) if is_number(a) and is_number(b) else None for a, b in pairs]


def _curves(size: _Size, cells: list[SweepCell], values: list[Any]) -> list[Line]:
    precision = size.cells[0]["precision"]
    are_many = len(cells) > _MOST_LABELS
    seen: set[str] = set()
    curves = []
    for cell, y in zip(cells, values, strict=True):
        label = cell["variant"] if are_many else size.label(cell)
        is_new = label not in seen
        seen.add(label)
        x = range(1, len(y) + 1)
        is_dashed = cell["precision"] != precision
        curves.append(Line(label if is_new else "", x, y, size.colour(cell), dashed=is_dashed))
    return curves


def _mfu(size: _Size) -> Iterable[Chart]:
    rows = []
    for cell in size.measured:
        used = cell.get("mfu")
        if used:
            low, high = (None if used.get(k) is None else 100 * used[k] for k in ("low", "high"))
            share = 100 * used["median"]
            row = Bar(size.label(cell), share, f"{share:.0f}%", low, high, colour=size.colour(cell))
            rows.append(row)
    if rows:
        caption = (
            "Model FLOPs (PaLM's count) over the peak of a matrix product measured in the same "
            "repeat with the same precision, threads and processes; line: quartile to quartile."
        )
        yield size.chart("mfu", "Model FLOPs utilisation", caption, charts.bars(rows, "% of peak"))
