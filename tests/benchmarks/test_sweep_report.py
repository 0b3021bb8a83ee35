"""The pages of a sweep, drawn from a made `sweep.json` with every kind of cell."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.page import Page

from scalellm.errors import DataError, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
EVIL = "SIGABRT: <script>alert(1)</script> | `x` <img src=x onerror=alert(2)>"
# What each variant does to tokens/s, and how many ranks share the 16 bytes a parameter.
SPEED = {"single": 1.0, "ddp": 0.97, "fsdp": 0.85, "deepspeed-2": 0.78, "accelerate-ddp": 0.96}
SHARED = {"fsdp", "deepspeed-2"}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import _sweep_report

        yield _sweep_report
        for name in ("_sweep_report", "_plots"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def written(module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of the made sweep's report."""
    return module.write_report(write(tmp_path_factory.mktemp("sweep"), made_sweep()))


def made_cell(size: str, variant: str, world: int, precision: str, scaling: str) -> dict[str, Any]:
    random_ = random.Random(f"{size}{variant}{world}{precision}{scaling}")
    parameters = {"3m": 3_400_000, "tiny": 140_000}[size]
    rate = SPEED[variant] * 4e10 / parameters * (1.9 if precision == "bf16" else 1)
    rate *= random_.uniform(0.97, 1.03)
    batch = 16 * (world if scaling == "weak" else 1)
    step_s = batch * 256 / rate
    held = 16 * parameters // (world if variant in SHARED else 1)
    names = [size, f"{variant}@{world}", precision, "eager", "none"]
    sent = {"bytes_per_step": 8 * parameters, "time_s_per_step": 0.12 * step_s}
    return {
        "id": "/".join([*names, "weak"] if scaling == "weak" else names),
        "size": size,
        "parameters": parameters,
        "variant": variant,
        "world_size": world,
        "threads_per_rank": 2 // world,
        "precision": precision,
        "compile": False,
        "activation_checkpointing": "none",
        "global_batch_size": batch,
        "seq_len": 256,
        "scaling": scaling,
        "status": "ok",
        "reason": None,
        "tokens_per_s": {"median": rate, "low": 0.97 * rate, "high": 1.02 * rate, "runs": [rate]},
        "step": {
            "data_wait_s": 0.01 * step_s,
            "forward_s": 0.33 * step_s,
            "backward_s": 0.56 * step_s,
            "optimizer_s": 0.07 * step_s,
            "other_s": 0.03 * step_s,
            "step_time_s": step_s,
        },
        "communication": sent if world > 1 else None,
        "peak_rss_bytes": [held + 700 * MIB] * world,
        "rss_above_baseline_bytes": [held + 90 * MIB + 9 * MIB * rank for rank in range(world)],
        "theory_bytes": held,
        "peak_device_bytes": [0] * world,
        "startup_s": [5.2, 5.4],
        "first_step_s": [1.1, 1.2],
        "mfu": {"median": 0.6, "low": 0.58, "high": 0.61},
        "losses": [9 / (1 + 0.05 * s) + random_.uniform(0, 1e-6) for s in range(20)],
    }


def unmeasured(cell: dict[str, Any], status: str, reason: str | None) -> dict[str, Any]:
    kept = list(cell)[: list(cell).index("status")]
    return {
        **dict.fromkeys(cell),
        **{key: cell[key] for key in kept},
        "status": status,
        "reason": reason,
    }


def made_sweep() -> dict[str, Any]:
    cells = [
        made_cell(size, variant, world, precision, scaling)
        for size in ("3m", "tiny")
        for precision in (("fp32", "bf16") if size == "3m" else ("fp32",))
        for scaling in ("strong", "weak")
        for variant in SPEED
        for world in (1, 2)
        if (variant != "single" or world == 1) and (scaling == "strong" or world > 1)
    ]
    left_out = made_cell("3m", "single", 1, "fp32", "strong") | {"world_size": 2}
    left_out["id"] = "3m/single@2/fp32/eager/none"
    cells.append(unmeasured(left_out, "skipped", "strategy single runs in one process, not 2"))
    found = {cell["id"]: index for index, cell in enumerate(cells)}
    for name, status, reason in (
        ("3m/fsdp@2/bf16/eager/none", "failed", EVIL),
        ("3m/deepspeed-2@2/fp32/eager/none", "out of memory", "out of memory; lower the batch"),
        ("tiny/ddp@2/fp32/eager/none/weak", "pending", None),
    ):
        cells[found[name]] = unmeasured(cells[found[name]], status, reason)
    peaks = {"fp32": 9e10, "bf16": 3e11}
    return {
        "schema_version": 1,
        "config": {"sizes": ["3m", "tiny"], "variants": list(SPEED), "repeats": 2, "steps": 20},
        "environment": {
            "command": ["/home/someone/.venv/bin/scalellm", "bench", "sweep"],
            "python": "3.11.7",
            "processor": "A Processor @ 2.50GHz",
            "cores": 2,
            "memory_bytes": 24 << 30,
            "gpu": None,
            "versions": {"torch": "2.13.0+cpu", "ray": None},
        },
        "started": "2025-01-01T10:00:00+00:00",
        "finished": None,
        "gemm": [
            {"precision": p, "threads": 2 // w, "world_size": w, "flops_per_s": [peak, 1.02 * peak]}
            for p, peak in peaks.items()
            for w in (1, 2)
        ],
        "cells": cells,
    }


def write(folder: Path, sweep: Any) -> Path:
    path = folder / "sweep.json"
    path.write_text(json.dumps(sweep))
    return path


def test_the_page_stands_alone_and_names_every_cell(written: list[Path]) -> None:
    sweep = made_sweep()
    assert [path.name for path in written[:2]] == ["report.html", "report.md"]
    text = written[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "url(http" not in text and "@import" not in text
    assert page.elements.count("script") == 1 and "img" not in page.elements
    assert page.handlers == []
    assert len(set(page.ids)) == len(page.ids)
    rows = {row[0]: row for row in page.rows}
    for cell in sweep["cells"]:
        row = rows[cell["id"]]
        if cell["status"] == "ok":
            assert row[1] == "ok" and row[2] == f"{cell['tokens_per_s']['median']:,.0f}"
        else:
            reason = f": {cell['reason']}" if cell["reason"] else ""
            assert row[1] == cell["status"] + reason
            assert set(row[2:]) <= {"—", f"{(cell.get('theory_bytes') or 0) / MIB:,.0f}"}


def test_plots_of_all_kinds_and_sizes(written: list[Path]) -> None:
    plots = written[2:]
    kinds = ["throughput", "memory", "strong-scaling", "weak-scaling", "step-time", "loss"]
    kinds += ["loss-difference", "mfu", "planned-memory"]
    assert {path.stem for path in plots} == {
        f"{kind}-{size}" for kind in kinds for size in ("3m", "tiny")
    }
    for path in plots:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    markdown = written[1].read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert {written[1].parent / name for name in shown} == set(plots)
    assert "<script" not in markdown and "<img" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("| 3m/")]
    cells_of_a_row = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(cells_of_a_row) == 1, "a reason has broken the table"


def test_no_scaling_plot_without_a_second_world(module: ModuleType, tmp_path: Path) -> None:
    sweep = made_sweep()
    sweep["cells"] = [cell for cell in sweep["cells"][:2] if cell["world_size"] == 1]
    for cell in sweep["cells"]:
        del cell["mfu"]
    names = {path.stem for path in module.write_report(write(tmp_path, sweep))}
    assert "throughput-3m" in names
    assert not [name for name in names if "scaling" in name or "mfu" in name]


@pytest.mark.parametrize("status", ["pending", "failed"])
def test_a_sweep_without_any_figures(module: ModuleType, tmp_path: Path, status: str) -> None:
    sweep = made_sweep()
    sweep["cells"] = [unmeasured(cell, status, "why") for cell in sweep["cells"][:4]]
    sweep["gemm"] = []
    pages = module.write_report(write(tmp_path, sweep))
    assert [path.suffix for path in pages] == [".html", ".md"]
    assert "No cell has figures yet" in pages[0].read_text(encoding="utf-8")


def test_efficiency_counts_threads_on_a_cpu_and_ranks_on_a_gpu(module: ModuleType) -> None:
    import _plots

    base = made_cell("3m", "single", 1, "fp32", "strong")
    cell = made_cell("3m", "accelerate-ddp", 2, "fp32", "strong")
    base["tokens_per_s"]["median"], cell["tokens_per_s"]["median"] = 100.0, 90.0
    # Two ranks of one thread against one rank of two: the same cores.
    assert _plots.efficiency(cell, [base, cell]) == (pytest.approx(0.9), "single@1")
    for one in (base, cell):
        one["peak_device_bytes"] = [MIB] * one["world_size"]
    assert _plots.efficiency(cell, [base, cell]) == (pytest.approx(0.45), "single@1")
    own = made_cell("3m", "accelerate-ddp", 1, "fp32", "strong")
    assert _plots.efficiency(cell, [base, own, cell])[1] == "accelerate-ddp@1"
    other = made_cell("3m", "single", 1, "bf16", "strong")
    assert _plots.efficiency(cell, [other, cell]) is None


def test_communication_is_hatched_inside_the_step(module: ModuleType) -> None:
    import _plots

    for variant, last in (("ddp", 0.90), ("deepspeed-2", 0.97)):
        cell = made_cell("3m", variant, 2, "fp32", "strong")
        stack = _plots._stack("x", cell)
        step_ms = 1e3 * cell["step"]["step_time_s"]
        assert sum(stack.parts) == pytest.approx(step_ms)
        assert stack.hatched_to == pytest.approx(last * step_ms)
        assert stack.hatched_to - stack.hatched_from == pytest.approx(0.12 * step_ms)
        cell["communication"]["time_s_per_step"] = 99.0
        assert _plots._stack("x", cell).hatched_from == pytest.approx(0.01 * step_ms)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no sweep"),
        ('{"schema_version": 1, "cel', "damaged"),
        ("[1]", "damaged"),
        ('{"schema_version": 7}', "schema_version 7"),
    ],
)
def test_a_bad_file_is_one_sentence(
    module: ModuleType, tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "sweep.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        module.write_report(path)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"sweep.json"}


def test_a_folder_that_cannot_be_written(module: ModuleType, tmp_path: Path) -> None:
    sweep = made_sweep()
    path = write(tmp_path, sweep | {"cells": sweep["cells"][-1:]})
    (tmp_path / "plots").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written"):
        module.write_report(path)


def test_the_link_to_the_definitions_leads_there(module: ModuleType, tmp_path: Path) -> None:
    inside = module._definition_source(REPOSITORY / "runs" / "sweep")
    assert inside.parts[1].target == "../../docs/measuring.md"
    assert "docs/measuring.md" in module._definition_source(tmp_path).parts[0]
