"""From the journal of a sweep to `sweep.json` (schema 1) and to a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from _sweep_cells import Cell, Gemm
from _sweep_run import OK, PENDING, STEP_KEYS

SCHEMA_VERSION = 1
MIB = 1 << 20
Entry = dict[str, Any]


def make_report(
    head: Entry,
    entries: list[Entry],
    cells: list[Cell],
    skipped: dict[str, str],
    finished: str | None,
) -> dict[str, Any]:
    """Puts together what is known: cells without a finished run are pending, failed or skipped."""
    runs: dict[str, list[Entry]] = {cell.id: [] for cell in cells}
    for entry in entries:
        if entry["kind"] == "run":
            runs[entry["cell"]].append(entry)
    peaks = {
        (Gemm(*entry["gemm"]), entry["repeat"]): entry["flops_per_s"]
        for entry in entries
        if entry["kind"] == "gemm"
    }
    profiles = {entry["cell"]: entry for entry in entries if entry["kind"] == "profile"}
    return {
        "schema_version": SCHEMA_VERSION,
        "config": head["config"],
        "environment": head["environment"],
        "started": head["started"],
        "finished": finished,
        "gemm": [
            {
                **gemm._asdict(),
                "flops_per_s": [v for (g, _), v in sorted(peaks.items()) if g == gemm],
            }
            for gemm in dict.fromkeys(gemm for gemm, _ in peaks)
        ],
        "cells": [
            _cell(cell, runs[cell.id], peaks, profiles.get(cell.id), skipped.get(cell.id))
            for cell in cells
        ],
    }


def _cell(
    cell: Cell,
    runs: list[Entry],
    peaks: dict[tuple[Gemm, int], float],
    profile: Entry | None,
    skipped: str | None,
) -> dict[str, Any]:
    ordered = sorted(runs, key=lambda run: run["repeat"])
    bad = next((run for run in ordered if run["status"] != OK), None)
    status, reason = PENDING, None
    if skipped is not None:
        status, reason = "skipped", skipped
    elif bad is not None:
        status, reason = bad["status"], bad["reason"]
    elif ordered:
        status = OK
    figures = _figures(cell, ordered, peaks) if status == OK else dict.fromkeys(_FIGURE_KEYS)
    return {
        **cell.describe(),
        "theory_bytes": cell.theory_bytes() if skipped is None else None,
        "status": status,
        "reason": reason,
        **figures,
        "communication": (profile or {}).get("communication"),
    }


_FIGURE_KEYS = (
    "tokens_per_s",
    "goodput_tokens_per_s",
    "step",
    "peak_rss_bytes",
    "rss_above_baseline_bytes",
    "peak_device_bytes",
    "startup_s",
    "first_step_s",
    "mfu",
    "losses",
)


def _figures(cell: Cell, runs: list[Entry], peaks: dict[tuple[Gemm, int], float]) -> dict[str, Any]:
    found = [run["figures"] for run in runs]
    above = [
        [
            peak - base
            for peak, base in zip(f["peak_rss_bytes"], f["baseline_rss_bytes"], strict=True)
        ]
        for f in found
    ]
    speeds = [speed for figures in found for speed in figures["tokens_per_s"]]
    # Against the peak of the same repeat, which met the same mood of the machine.
    used = [
        speed * cell.flops_per_token / peaks[cell.gemm, run["repeat"]]
        for run in runs
        if (cell.gemm, run["repeat"]) in peaks
        for speed in run["figures"]["tokens_per_s"]
    ]
    medians = [statistics.median(figures["tokens_per_s"]) for figures in found]
    values = {
        "tokens_per_s": {**spread(speeds), "runs": medians},
        "goodput_tokens_per_s": [figures["goodput_tokens_per_s"] for figures in found],
        "step": _step(found),
        "peak_rss_bytes": _per_rank(figures["peak_rss_bytes"] for figures in found),
        "rss_above_baseline_bytes": _per_rank(above),
        "peak_device_bytes": _per_rank(figures["peak_device_bytes"] for figures in found),
        "startup_s": [figures["startup_s"] for figures in found],
        "first_step_s": [figures["first_step_s"] for figures in found],
        "mfu": spread(used) if used else None,
        "losses": found[0]["losses"],
    }
    return {key: values[key] for key in _FIGURE_KEYS}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, both of them measured values' neighbours and never beyond them."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def _step(found: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of a step's parts over the measured steps of all repeats; other: what is left."""
    columns = {
        key: [v for f in found for v in f[key]] for key in STEP_KEYS if key != "tokens_per_s"
    }
    parts = [key for key in columns if key != "step_time_s"]
    known = zip(*(columns[key] for key in parts), strict=True)
    columns["other_s"] = [
        whole - sum(row) for whole, row in zip(columns["step_time_s"], known, strict=True)
    ]
    return {key: statistics.median(values) for key, values in columns.items()}


def _per_rank(repeats: Iterable[list[int]]) -> list[int]:
    return [int(statistics.median(rank)) for rank in zip(*repeats, strict=True)]


# -- as a table -------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    """One row a cell; ratios are to the first cell that ran of the same size and precision."""
    machine, config = report["environment"], report["config"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    peaks = [
        f"GEMM peak {peak['precision']}, {peak['world_size']} x {peak['threads']} threads: "
        f"{statistics.median(peak['flops_per_s']) / 1e9:,.0f} GFLOP/s"
        for peak in report["gemm"]
    ]
    lines = [
        f"{config['repeats']} repeats of {config['steps']} steps, the first {config['warmup']} "
        f"left out, {machine['processor']}, {machine['cores']} cores, {versions}",
        *peaks,
        "",
        "| cell | tokens/s, median | quartiles | ratio | MiB a rank above baseline | MFU | "
        "data wait | start-up s | first step s | communication a step | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple[str, str], float] = {}
    for cell in report["cells"]:
        if cell["status"] == OK:
            speed = cell["tokens_per_s"]["median"]
            base = first.setdefault((cell["size"], cell["precision"]), speed)
            lines.append(_row(cell, speed / base))
        else:
            reason = f"{cell['status']}: {cell['reason']}" if cell["reason"] else cell["status"]
            lines.append(f"| {cell['id']} |" + " |" * 9 + f" {reason.replace('|', '/')} |")
    return "\n".join(lines)


def _row(cell: dict[str, Any], ratio: float) -> str:
    speed, step, sent = cell["tokens_per_s"], cell["step"], cell["communication"]
    above = "/".join(f"{size / MIB:.0f}" for size in cell["rss_above_baseline_bytes"])
    if any(cell["peak_device_bytes"]):
        device = "/".join(f"{size / MIB:.0f}" for size in cell["peak_device_bytes"])
        above += f" (device {device})"
    words = [
        cell["id"],
        f"{speed['median']:,.0f}",
        f"{speed['low']:,.0f} to {speed['high']:,.0f}",
        f"{ratio:.2f}",
        above,
        f"{cell['mfu']['median']:.1%}" if cell["mfu"] else "",
        f"{step['data_wait_s'] / step['step_time_s']:.1%}",
        f"{statistics.median(cell['startup_s']):.1f}",
        f"{statistics.median(cell['first_step_s']):.2f}",
        f"{sent['bytes_per_step'] / 1e6:,.1f} MB, {sent['time_s_per_step']:.3f} s" if sent else "",
        "",
    ]
    return "| " + " | ".join(words) + " |"
