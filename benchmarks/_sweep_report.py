"""The pages of a sweep: `report.md`, its plots, and `report.html` on its own."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from _plots import MIB, sweep_charts

from scalellm.errors import DataError
from scalellm.report.document import (
    Cell,
    Details,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Table,
    facts,
    number,
)
from scalellm.report.files import write_document

SCHEMA_VERSION = 1
REPOSITORY = Path(__file__).resolve().parents[1]
_TIMES = ("started", "finished")
_COLUMNS = (
    "cell",
    "status",
    "tokens/s",
    "quartiles",
    "ratio to first",
    "MFU",
    "step ms",
    "data wait",
    "comm. MB a step",
    "comm. ms a step",
    "RSS MiB a rank",
    "theory MiB",
    "device MiB a rank",
    "start-up s",
    "first step s",
)
_DEFINITIONS = (
    (
        "tokens/s",
        "of all ranks, median over the measured steps; warm-up is left out",
    ),
    ("quartiles", "of the measured steps of all repeats"),
    ("ratio to first", "against the first cell that ran of the same size and precision"),
    (
        "MFU",
        "model FLOPs (PaLM's count) / the peak of a matrix product measured in the same repeat",
    ),
    ("data wait", "share of a step that rank 0 waited for its batch"),
    (
        "communication",
        "rank 0 in a profiled run of its own; part of the step, not added to it",
    ),
    (
        "RSS above imports",
        "peak of the rank with the most, less what was resident after imports",
    ),
    ("theory", "parameters, gradients and optimizer state of one rank"),
    ("start-up", "from the start of the process to the first step; median of the repeats"),
    ("first step", "with compile it holds the compilation; median of the repeats"),
)


def write_report(sweep_json: Path) -> list[Path]:
    """Writes `report.html`, `report.md` and `plots/*.png` beside a `sweep.json`, whatever ran.

    Raises:
        DataError: the file is missing, damaged, or of another schema.
    """
    report = _read(sweep_json)
    return write_document(_document(report, sweep_json.parent), sweep_json.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        version = report["schema_version"]
    except FileNotFoundError:
        raise DataError(f"there is no sweep {path}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged or no sweep: run the sweep again") from None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}: run the "
            "sweep again, or read it with the version that wrote it"
        )
    return report


def _document(report: dict[str, Any], folder: Path) -> Document:
    cells = report["cells"]
    document = Document("Sweep: " + ", ".join(dict.fromkeys(cell["size"] for cell in cells)))
    document.add(_summary(report), _fastest(cells))
    document.add(*sweep_charts(cells), Heading("All cells"), _cell_table(cells))
    document.add(Heading("Definitions"), _definition_source(folder), Listing(_DEFINITIONS))
    document.add(Heading("GEMM peak of this machine"), _gemm_table(report["gemm"]))
    document.add(Heading("Hardware and versions"), _machine(report["environment"]))
    document.add(Heading("What was asked"), _asked(report["config"]))
    text = json.dumps(report["config"], indent=1, ensure_ascii=False)
    document.add(Details("The same as JSON", text))
    return document


def _summary(report: dict[str, Any]) -> Paragraph:
    counts = Counter(cell["status"] for cell in report["cells"])
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    machine = report["environment"]
    started, finished = (str(report.get(key) or "").replace("T", " ") for key in _TIMES)
    ended = f"finished {finished}" if finished else "not finished yet"
    return Paragraph(
        (
            f"{len(report['cells'])} cells: {words}. Started {started}, {ended}. "
            f"{machine.get('processor')}, {machine.get('cores')} cores"
            + (f", {machine['gpu']}" if machine.get("gpu") else "")
            + f", torch {machine.get('versions', {}).get('torch')}.",
        )
    )


def _fastest(cells: list[dict[str, Any]]) -> Paragraph:
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell["status"] == "ok" and _rate(cell) > _rate(best.get(cell["size"])):
            best[cell["size"]] = cell
    if not best:
        return Paragraph(("No cell has figures yet.",))
    words = [f"{size}: {cell['id']}, {_rate(cell):,.0f} tokens/s" for size, cell in best.items()]
    return Paragraph((f"Fastest of {'; '.join(words)}.",))


def _rate(cell: dict[str, Any] | None) -> float:
    return float(((cell or {}).get("tokens_per_s") or {}).get("median") or 0.0)


def _cell_table(cells: list[dict[str, Any]]) -> Table:
    first: dict[tuple[str, str], float] = {}
    rows = []
    for cell in cells:
        base = None
        if cell["status"] == "ok":
            base = first.setdefault((cell["size"], cell["precision"]), _rate(cell))
        rows.append([Cell(cell["id"]), _status(cell), *_figures(cell, base)])
    # A column that no cell has a figure for, as the GPU's on a CPU, is left out.
    keep = [
        index < 2 or any(row[index].value is not None for row in rows)
        for index in range(len(_COLUMNS))
    ]
    kept = [[item for item, is_kept in zip(row, keep, strict=True) if is_kept] for row in rows]
    return Table([name for name, is_kept in zip(_COLUMNS, keep, strict=True) if is_kept], kept)


def _status(cell: dict[str, Any]) -> Cell:
    status, reason = cell["status"], cell.get("reason")
    tone = {"ok": "", "skipped": "muted", "pending": "muted"}.get(status, "bad")
    return Cell(f"{status}: {reason}" if reason else status, tone=tone)


def _figures(cell: dict[str, Any], base: float | None) -> list[Cell]:
    rate, step = cell.get("tokens_per_s") or {}, cell.get("step") or {}
    sent = cell.get("communication") or {}
    step_s, wait_s = step.get("step_time_s"), step.get("data_wait_s")
    low, high = rate.get("low"), rate.get("high")
    known = low is not None and high is not None
    spread = Cell(f"{low:,.0f} to {high:,.0f}", high - low) if known else number(None, str)
    above = max(cell.get("rss_above_baseline_bytes") or [], default=None)
    device = max(cell.get("peak_device_bytes") or [], default=None)
    return [
        number(rate.get("median"), "{:,.0f}".format),
        spread,
        number(_rate(cell) / base if base else None, "{:.2f}".format),
        number((cell.get("mfu") or {}).get("median"), "{:.1%}".format),
        number(step_s and 1e3 * step_s, "{:,.1f}".format),
        number(wait_s / step_s if step_s and wait_s is not None else None, "{:.1%}".format),
        number(sent.get("bytes_per_step"), lambda count: f"{count / 1e6:,.1f}"),
        number(sent.get("time_s_per_step"), lambda time_s: f"{1e3 * time_s:,.1f}"),
        number(above, _mib),
        number(cell.get("theory_bytes"), _mib),
        number(device or None, _mib),
        number(_median(cell.get("startup_s")), "{:.1f}".format),
        number(_median(cell.get("first_step_s")), "{:.2f}".format),
    ]


def _mib(count: float) -> str:
    return f"{count / MIB:,.0f}"


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _definition_source(folder: Path) -> Paragraph:
    """A link that works where the report lies; outside the checkout there is none that would."""
    page = REPOSITORY / "docs" / "measuring.md"
    if not folder.resolve().is_relative_to(REPOSITORY):
        return Paragraph(("In full: docs/measuring.md of scalellm.",))
    target = Path(os.path.relpath(page, folder.resolve())).as_posix()
    return Paragraph(("In full: ", Link("docs/measuring.md", target), "."))


def _gemm_table(peaks: list[dict[str, Any]]) -> Table | Paragraph:
    rows = []
    for peak in peaks:
        found = [value / 1e9 for value in peak["flops_per_s"]]
        if found:
            rows.append(
                [
                    Cell(peak["precision"]),
                    number(peak["world_size"], "{:.0f}".format),
                    number(peak["threads"], "{:.0f}".format),
                    number(statistics.median(found), "{:,.0f}".format),
                    Cell(f"{min(found):,.0f} to {max(found):,.0f}", max(found) - min(found)),
                ]
            )
    if not rows:
        return Paragraph(("Not measured.",))
    columns = ("precision", "processes", "threads each", "GFLOP/s, median", "least to most")
    return Table(columns, rows)


def _machine(environment: dict[str, Any]) -> Table:
    flat = {**environment, **environment.get("versions", {})}
    memory = flat.pop("memory_bytes", None)
    if memory:
        flat["memory"] = f"{memory / (1 << 30):.1f} GiB"
    command = flat.pop("command", None) or []
    if command:
        flat["command"] = " ".join([Path(command[0]).name, *command[1:]])
    flat.pop("versions", None)
    return facts((key, _words(value)) for key, value in flat.items() if value is not None)


def _asked(config: dict[str, Any]) -> Table:
    return facts((key, _words(value)) for key, value in config.items())


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "default" if value is None else str(value)
