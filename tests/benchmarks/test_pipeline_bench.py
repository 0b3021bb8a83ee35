"""Bubbles of real pipelines, beside their formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scalellm.cli import main


@pytest.mark.slow
def test_bubbles_are_measured_beside_their_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bubbles.json"
    words = ["--steps", "2", "--micro-batches", "2", "--schedules", "1f1b,zero_bubble"]
    assert main(["bench", "pipeline", *words, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    plain, zero = json.loads(file.read_text())["rows"]
    assert plain["formula"] == pytest.approx(1 / 3)
    assert zero["formula"] < plain["formula"]
    for row in (plain, zero):
        assert 0 < row["least"] <= row["measured"] <= row["most"] < 1
        assert 0 < row["simulated"] < 1
        assert f"| {row['schedule']} | 2 | {row['formula']:.1%} |" in shown
