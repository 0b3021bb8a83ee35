"""`scalellm bench plan`: which cells there are, what is read of a run, what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("plan", None)
    import plan

    yield plan
    sys.modules.pop("plan", None)


def rows(tmp_path: Path, *, is_whole: bool) -> Path:
    path = tmp_path / "metrics.jsonl"
    train = [{"kind": "train", "step": n, "peak_rss_bytes": 500 + 100 * n} for n in (1, 2)]
    end = {"kind": "end", "step": 2, "baseline_rss_bytes": [300, 1], "peak_rss_bytes": [9000, 9000]}
    lines = [*train, *([end] if is_whole else [])]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def test_the_peak_is_that_of_the_steps_not_of_the_save(bench: Any, tmp_path: Path) -> None:
    assert bench.above_baseline(rows(tmp_path, is_whole=True)) == 700 - 300


def test_a_run_that_did_not_end_is_refused(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(bench.UserError, match="no whole"):
        bench.above_baseline(rows(tmp_path, is_whole=False))


def test_cells_that_cannot_be_are_left_out(bench: Any) -> None:
    args = bench._parse(["--variants", "single,ddp", "--worlds", "1,2", "--shapes", "tiny"])
    found = [(cell.variant, cell.world_size) for cell in bench.cells_of(args)]
    assert found == [("single", 1), ("ddp", 1), ("ddp", 2)]


def test_an_unknown_variant_is_named_with_those_there_are(bench: Any) -> None:
    with pytest.raises(bench.UserError, match="'dpp' is none of single, ddp"):
        bench._parse(["--variants", "dpp"])


def test_the_summary_leaves_failed_cells_out_and_the_table_does_not(bench: Any) -> None:
    good = {"id": "a", "parameters": 1000, "predicted_bytes": 110 << 20}
    good |= {"measured_bytes": 100 << 20, "ratio": 1.1}
    good["runs_bytes"] = [100 << 20, 99 << 20, 103 << 20]
    bad = {"id": "b", "parameters": 1000, "predicted_bytes": 1 << 20, "error": "it fell over"}
    found = bench.summary([good, bad])
    assert found["median_ratio"] == 1.1
    assert found["worst_error"] == pytest.approx(0.1)
    machine = {"processor": "a CPU", "versions": {"torch": "2"}}
    text = bench.markdown({"environment": machine, "cells": [good, bad], **found})
    assert "| a | 1,000 | 110 |  | 100 | 99 to 103 | 1.100 |" in text
    assert "it fell over |" in text
    assert "| a | 10.0% | 10.0% |" in text


def test_all_is_every_strategy_and_each_needs_a_folder_to_resume(bench: Any) -> None:
    cells = bench.cells_of(bench._parse(["--all"]))
    assert {cell.variant for cell in cells} >= {"single", "ddp-zero1", "fsdp", "deepspeed-3"}
    assert {cell.world_size for cell in cells} == {1, 2, 4}
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.variant for cell in cells[:22]}) == 8  # the first part has all in it
    with pytest.raises(bench.UserError, match="--resume needs --out"):
        bench._parse(["--resume"])


def test_an_interrupted_table_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--variants", "single,ddp", "--worlds", "1", "--shapes", "tiny", "--data", "data"]
    words += ["--out", str(tmp_path / "out")]
    ran: list[str] = []

    def measured(cell: Any, *_: Any) -> dict[str, int]:
        if ran:
            raise KeyboardInterrupt
        ran.append(cell.id)
        return {"measured_bytes": 100}

    monkeypatch.setattr(bench, "_measured", measured)
    monkeypatch.setattr(bench, "_row", lambda cell, found, args: found)
    with pytest.raises(KeyboardInterrupt):
        bench._rows(bench._parse(words), tmp_path)
    first = ran.pop()
    rows = bench._rows(bench._parse([*words, "--resume"]), tmp_path)
    assert [row["measured_bytes"] for row in rows] == [100, 100]
    assert first.startswith("single") and ran[0].startswith("ddp")


def test_more_runs_are_added_and_the_median_counts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--variants", "single,ddp", "--worlds", "1", "--shapes", "tiny", "--data", "data"]
    words += ["--out", str(tmp_path / "out")]
    answers = iter([100, 200, 130, 210, 110, 260])
    ran: list[str] = []

    def measured(cell: Any, *_: Any) -> dict[str, int]:
        ran.append(cell.variant)
        return {"measured_bytes": next(answers)}

    monkeypatch.setattr(bench, "_measured", measured)
    monkeypatch.setattr(bench, "_row", lambda cell, found, args: found)
    assert [row["runs_bytes"] for row in bench._rows(bench._parse(words), tmp_path)] == [
        [100],
        [200],
    ]
    rows = bench._rows(bench._parse([*words, "--resume", "--runs", "3"]), tmp_path)
    assert ran == ["single", "ddp"] * 3
    assert [row["runs_bytes"] for row in rows] == [[100, 130, 110], [200, 210, 260]]
    assert [row["measured_bytes"] for row in rows] == [110, 210]
    with pytest.raises(bench.UserError, match="--runs=0 runs: it must be at least 1"):
        bench._parse(["--runs", "0"])


def test_what_failed_is_tried_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--variants", "single,ddp", "--worlds", "1", "--shapes", "tiny", "--data", "data"]
    words += ["--out", str(tmp_path / "out")]
    answers = iter(
        [{"status": "failed", "error": "full"}, *[{"measured_bytes": n} for n in (1, 2)]]
    )
    monkeypatch.setattr(bench, "_measured", lambda *_: next(answers))
    monkeypatch.setattr(bench, "_row", lambda cell, found, args: found)
    assert "error" in bench._rows(bench._parse(words), tmp_path)[0]
    rows = bench._rows(bench._parse([*words, "--resume"]), tmp_path)
    assert [row["measured_bytes"] for row in rows] == [2, 1]


def test_a_run_leaves_nothing_behind(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of each of 176 cells fills a disk."""
    [cell] = bench.cells_of(bench._parse(["--variants", "single", "--worlds", "1"]))
    with pytest.raises(bench.UserError, match="not done after"):
        bench.measure(cell.config(3, tmp_path), cell, tmp_path / "run", 0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cell_is_run_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ["--variants", "single", "--worlds", "1", "--shapes", "tiny", "--steps", "2"]
    command = [sys.executable, "-m", "scalellm", "bench", "plan", *words, "--dry-run"]
    subprocess.run([*command, "--json", str(out)], check=True, timeout=600)
    [row] = json.loads(out.read_text())["cells"]
    assert row["predicted_memory"] == row["dry_run_memory"]
    assert row["measured_bytes"] > 0
    assert 0.5 < row["ratio"] < 2
