from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scalellm.config import parse_config
from scalellm.errors import ConfigError
from scalellm.metrics import (
    JSONL_NAME,
    Progress,
    check_writers,
    open_writers,
    peak_rss_bytes,
    read_rows,
)
from scalellm.metrics.writers import JsonlWriter

ROW = {"kind": "train", "step": 1, "loss": 2.0, "tokens_per_s": 1234.0, "step_time_s": 0.5}
ROW["peak_rss_bytes"] = 3 * 2**30


def test_rows_come_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / JSONL_NAME, -1)
    writer.write({**ROW, "loss": float("nan")})
    assert json.loads((tmp_path / JSONL_NAME).read_text())["loss"] is None  # flushed at once
    writer.close()


def test_resuming_drops_later_rows_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / JSONL_NAME
    rows = [{**ROW, "step": step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    writer = JsonlWriter(path, 2)
    writer.write({**ROW, "step": 3, "loss": 9.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 2.0), (2, 2.0), (3, 9.0)]


def test_a_line_in_a_log_says_loss_speed_memory_and_time_left() -> None:
    stream = io.StringIO()
    progress = Progress(0, 10, shown=True, stream=stream)
    progress.write(dict(ROW))
    progress.write({"kind": "eval", "step": 1, "loss": 1.0, "perplexity": 2.718})
    first, second = stream.getvalue().splitlines()
    assert first == "step 1/10  loss 2.0000  1,234 tokens/s  3.00 GiB  4 s left"
    assert second == "step 1  validation loss 1.0000 nats/token  perplexity 2.72"


def test_a_skipped_step_is_shown_as_such() -> None:
    stream = io.StringIO()
    Progress(0, 10, shown=True, stream=stream).write({**ROW, "loss": float("nan")})
    assert "loss nan" in stream.getvalue()


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(0, 2, shown=True, stream=stream)
    for step in (1, 2):
        progress.write({**ROW, "step": step})
    progress.close()
    assert "2/2" in stream.getvalue() and "loss 2.0000" in stream.getvalue()


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    Progress(0, 10, shown=False, stream=stream).write(dict(ROW))
    assert not stream.getvalue()


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = open_writers(parse_config({}), tmp_path, -1)
    for writer in writers:
        writer.write(dict(ROW))
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [scalar] = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (1, 2.0)


def test_wandb_gets_rows_and_its_absence_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config({"metrics": {"tensorboard": False, "wandb": {"project": "p"}}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'scalellm\[wandb\]'"):
        check_writers(config)

    logged: list[Any] = []

    class Fake:
        """Stands for the package, which wants an account: what we call is recorded."""

        @staticmethod
        def init(**arguments: Any) -> Any:
            logged.append(arguments["project"])
            return Fake

        @staticmethod
        def log(values: dict[str, Any], step: int) -> None:
            logged.append((step, values["train/loss"]))

        @staticmethod
        def finish() -> None:
            logged.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    for writer in open_writers(config, tmp_path, -1):
        writer.write(dict(ROW))
        writer.close()
    assert logged == ["p", (1, 2.0), "finished"]


def test_peak_memory_is_in_bytes() -> None:
    assert 10 * 2**20 < peak_rss_bytes() < 2**40
