from __future__ import annotations

import json
from pathlib import Path

import pytest

from scalellm.metrics import JSONL_NAME
from scalellm.report import draw_loss, smooth


def test_a_run_without_rows_has_no_picture(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None


def test_the_picture_is_drawn_from_the_rows_alone(tmp_path: Path) -> None:
    rows = [
        {
            "kind": "train",
            "step": step,
            "loss": None if step == 3 else 5.0 / step,  # a skipped step has no loss
            "learning_rate": 0.1,
            "tokens": step,
            "tokens_per_s": 9.0,
        }
        for step in range(1, 30)
    ]
    rows.append({"kind": "eval", "step": 29, "loss": 1.0, "perplexity": 2.7})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / JSONL_NAME).write_text(text + '{"kind": "tra')  # a kill cut the last line
    picture = draw_loss(tmp_path)
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {JSONL_NAME, "loss.png"}


def test_smoothing_keeps_constants_and_ends() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    values = [float(value % 7) for value in range(200)]
    smoothed = smooth(values)
    assert (smoothed[0], smoothed[-1]) == (values[0], values[-1])
    assert max(smoothed[10:-10]) < max(values)
