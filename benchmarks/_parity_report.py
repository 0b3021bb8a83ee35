"""The matrix of `bench parity` as numbers and as Markdown, the worst cell named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalellm.dist import World
from scalellm.parity import REPORTED, TOLERANCE, VARIANTS, Curve, differences, order_digest
from scalellm.train.folder import describe_environment

PAIR_TOLERANCE = TOLERANCE["fp32"]


def make_report(
    settings: dict[str, Any],
    folder: Path,
    cells: dict[str, tuple[str, int]],
    pairs: list[tuple[str, str]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Puts together what the ranks of all cells have left in `folder`."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / f"{name}.json").read_text())

    wanted = {p: read(f"single@1-{p}") for p in ("fp32", "fp64")}
    rows = [
        _row(cell, label, world, read(f"{cell}-{p}"), wanted[p], p)
        for cell, (label, world) in cells.items()
        for p in [(VARIANTS | REPORTED)[label].precision]
    ]
    orders = {world: order_digest(world) for world in {world for _, world in cells.values()}}
    for row in rows:
        row["same_order"] = orders[row["world_size"]] == orders[1]
    half = settings["steps"] // 2
    tail = {key: wanted["fp32"][key][half:] for key in ("losses", "grad_norms")}
    resumes = []
    for saved, resumed in pairs:
        found = read(f"{saved}--{resumed}")
        own = read(f"{saved}-fp32")
        entry = {"saved": saved, "resumed": resumed, "difference": _curve_difference(found, tail)}
        if saved == resumed:
            entry["bit_identical"] = all(found[key] == own[key][half:] for key in tail)
        resumes.append(entry)
    promised = [row for row in rows if row["variant"] in VARIANTS]
    passed = all(row["passed"] and row["same_order"] for row in promised) and all(
        entry["difference"] < PAIR_TOLERANCE and entry.get("bit_identical", True)
        for entry in resumes
    )
    return {
        "config": settings,
        "environment": describe_environment(World()),
        "cells": rows,
        "rounding": _apart(read("rounding"), wanted["fp32"]),
        "resumes": resumes,
        "skipped": skipped,
        "passed": passed,
    }


def _curve_difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    curves = [Curve(side["losses"], side["grad_norms"]) for side in (found, wanted)]
    return max(differences(*curves).values())


def _row(
    cell: str,
    label: str,
    world: int,
    found: dict[str, Any],
    wanted: dict[str, Any],
    precision: str,
) -> dict[str, Any]:
    apart = _apart(found, wanted)
    return {
        "cell": cell,
        "variant": label,
        "world_size": world,
        "precision": precision,
        "tolerance": TOLERANCE[precision],
        **apart,
        "memory": found["memory"],
        "passed": max(apart.values()) < TOLERANCE[precision],
    }


def _apart(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    apart = differences(
        Curve(found["losses"], found["grad_norms"]), Curve(wanted["losses"], wanted["grad_norms"])
    )
    return {**apart, "gradients": found["gradient_difference"]}


def to_markdown(report: dict[str, Any]) -> str:
    config, machine = report["config"], report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    lines = [
        f"{config['size']} model ({config['num_layers']} layers of {config['hidden_size']}), "
        f"{config['steps']} steps, {machine['processor']}, {versions}",
        "",
        "| variant | ranks | precision | loss | grad norm | raw gradients | order | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["cells"]:
        figures = " | ".join(f"{row[key]:.1e}" for key in ("loss", "grad_norm", "gradients"))
        order = "same" if row["same_order"] else "DIFFERS"
        verdict = f"< {row['tolerance']:.0e}" if row["passed"] else f"OVER {row['tolerance']:.0e}"
        if row["variant"] in REPORTED:
            verdict = "reported"
        lines.append(
            f"| {row['variant']} | {row['world_size']} | {row['precision']} | {figures} | {order} "
            f"| {verdict} |"
        )
    promised = [row for row in report["cells"] if row["variant"] in VARIANTS]
    worst = max(promised, key=lambda row: _largest(row) / row["tolerance"])
    lines += [
        "",
        f"worst cell: {worst['cell']}, {_largest(worst):.1e} of {worst['tolerance']:.0e} allowed",
        "fp32 rounding alone (`single`, one row a micro-batch): "
        f"{_largest(report['rounding']):.1e}",
        *_resume_lines(report["resumes"]),
        *(f"skipped {cell}: {reason}" for cell, reason in report["skipped"].items()),
    ]
    return "\n".join(lines)


def _largest(row: dict[str, Any]) -> float:
    return max(row["loss"], row["grad_norm"], row["gradients"])


def _resume_lines(resumes: list[dict[str, Any]]) -> list[str]:
    """A table of the pairs of different cells, and what became of each cell's own checkpoint."""
    if not resumes:
        return []
    own = [entry for entry in resumes if "bit_identical" in entry]
    pairs = [entry for entry in resumes if "bit_identical" not in entry]
    worst = max(resumes, key=lambda entry: entry["difference"])
    changed = [entry["saved"] for entry in own if not entry["bit_identical"]]
    return [
        *_pair_table(pairs),
        "",
        f"worst pair: saved in {worst['saved']}, resumed in {worst['resumed']}: "
        f"{worst['difference']:.1e} of {PAIR_TOLERANCE:.0e} allowed",
        f"resumed in its own cell: {len(own) - len(changed)} of {len(own)} bit-identical"
        + (f", not {', '.join(changed)}" if changed else ""),
    ]


def _pair_table(pairs: list[dict[str, Any]]) -> list[str]:
    if not pairs:
        return []
    saved = list(dict.fromkeys(entry["saved"] for entry in pairs))
    variants = list(dict.fromkeys(entry["resumed"].partition("@")[0] for entry in pairs))
    found: dict[tuple[str, str], list[str]] = {}
    for entry in pairs:
        variant, _, world = entry["resumed"].partition("@")
        over = "" if entry["difference"] < PAIR_TOLERANCE else "OVER "
        found.setdefault((entry["saved"], variant), []).append(
            f"{over}{entry['difference']:.0e} @{world}"
        )
    lines = ["", "| saved in, resumed in | " + " | ".join(variants) + " |"]
    lines.append("|---" * (len(variants) + 1) + "|")
    for a in saved:
        words = [", ".join(found.get((a, b), [])) for b in variants]
        lines.append(f"| {a} | " + " | ".join(words) + " |")
    return lines
