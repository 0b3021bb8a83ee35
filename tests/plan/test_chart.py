"""Memory as stacked bars: which rows there are, that parts add up, where ticks stand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.plan.chart import Planned, by_strategy_and_world, memory_figure, run_rows
from scalellm.plan.devices import find_device
from scalellm.plan.forecast import predicted_peak_bytes
from scalellm.plan.memory import estimate
from scalellm.plan.types import Memory
from scalellm.report.runs import read_runs
from scalellm.train import run_training

MEMORY = Memory(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000, 500_000_000, 0)
VALUES: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 32},
    "strategy": {"name": "fsdp"},
    "train": {"global_batch_size": 64, "micro_batch_size": 2},
}


def bars_of(figure: Any) -> list[list[tuple[float, float]]]:
    """(start, length) of the bars of each row, from the top."""
    [axes] = figure.axes
    rows: dict[int, list[tuple[float, float]]] = {}
    for patch in axes.patches:
        y = round(patch.get_y() + patch.get_height() / 2)
        rows.setdefault(y, []).append((patch.get_x(), patch.get_width()))
    return [rows[y] for y in sorted(rows)]


def test_parts_follow_each_other_and_add_up() -> None:
    rows = [Planned("a", MEMORY), Planned("b", replace(MEMORY, temporary_bytes=10**9), 5 * 10**8)]
    figure = memory_figure(rows, 8 * 10**9)
    first, second = bars_of(figure)
    assert [length for _, length in first] == [1, 2, 3, 4, 0.5, 0, 0]
    assert [start for start, _ in first][:4] == [0, 1, 3, 6]
    assert sum(length for _, length in second) == 12
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["10.50", "12.00"]
    [limit] = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert list(limit.get_xdata()) == [8, 8]


def test_what_was_measured_is_a_tick_and_a_ratio() -> None:
    figure = memory_figure([Planned("a", MEMORY, measured_bytes=21 * 10**9)])
    assert figure.axes[0].texts[0].get_text() == "10.50 (0.50)"
    [tick] = figure.axes[0].lines
    assert list(tick.get_xdata()) == [21, 21]
    assert "process and heap" not in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_row_for_each_strategy_and_world() -> None:
    device = find_device("a100-40g")
    rows = by_strategy_and_world(VALUES, 16, device, partial(estimate, device_type="cuda"))
    labels = [row.label for row in rows]
    assert {"ddp, 4 ranks", "ddp, 16 ranks", "fsdp, 16 ranks", "single"} <= set(labels)
    assert "fsdp hybrid, 16 ranks" in labels and "fsdp hybrid, 4 ranks" not in labels
    by_label = {row.label: row.memory for row in rows}
    few, many = by_label["fsdp, 4 ranks"], by_label["fsdp, 16 ranks"]
    assert many.optimizer_bytes < few.optimizer_bytes / 3
    # The micro-batch of a rank is the same in all of them, and so are its activations.
    assert many.activations_bytes == few.activations_bytes


def test_runs_stand_beside_what_is_predicted_for_them(
    tiny_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(parse_config(tiny_values))
    run_dir = Path(tiny_values["run"]["dir"])
    [run] = read_runs([run_dir])
    [row] = run_rows([run])
    assert row.total_bytes == predicted_peak_bytes(parse_config(run.config), 1, "cpu")
    peaks = [r["peak_rss_bytes"] for r in run.train]
    assert row.measured_bytes == max(peaks) - run.end["baseline_rss_bytes"][0]
    assert run_rows([replace(run, end={})]) == []  # it still goes
    out = tmp_path / "report"
    assert main(["report", str(run_dir), "--plan", "--out", str(out)]) == 0
    assert (out / "plots" / "planned-memory.png").is_file()
    assert "Memory, predicted and measured" in (out / "report.md").read_text()
    assert main(["report", str(run_dir), "--out", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "plots" / "planned-memory.png").exists()
