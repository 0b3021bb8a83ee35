"""What is predicted of a run's memory beside what it took: said, kept, and never in the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalellm.config import Config, parse_config
from scalellm.dist import World
from scalellm.plan.forecast import LEAST_STEPS, BackgroundForecast
from scalellm.train import run_training
from scalellm.train.datasets import open_mixture, with_vocabulary
from scalellm.train.forecast import MemoryWatch

GIB = 1 << 30


class Told:
    """A forecast that is known from its second question on."""

    def __init__(self, answer: int | None) -> None:
        self.answer, self.asked = answer, 0

    def peak_bytes(self) -> int | None:
        self.asked += 1
        return self.answer if self.asked > 1 else None


def end_row(config: Config) -> dict[str, Any]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    row: dict[str, Any] = json.loads(lines[-1])
    assert row["kind"] == "end"
    return row


def test_a_run_says_what_was_predicted_and_what_it_took(
    tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, told = parse_config(tiny_values), Told(3 * GIB)
    run_training(config, None, told)
    error = capsys.readouterr().err
    assert error.count("predicted peak: 3.00 GiB on rank 0") == 1
    assert error.count("predicted 3.00 GiB (+") == 1
    assert error.index("predicted peak") < error.index("peak so far")
    assert told.asked == 2
    assert end_row(config)["predicted_peak_bytes"] == 3 * GIB


@pytest.mark.parametrize("answer", [None])
def test_a_prediction_that_never_comes_changes_nothing(
    answer: None, tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(tiny_values)
    run_training(config, None, Told(answer))
    assert "predicted" not in capsys.readouterr().err
    assert end_row(config)["predicted_peak_bytes"] is None


def test_on_a_gpu_it_is_the_device_s_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    watch = MemoryWatch(Told(2 * GIB), World(device=torch.device("cuda", 0)))
    row = {"peak_device_bytes": 4 * GIB, "peak_rss_bytes": GIB}
    for _ in range(3):
        watch.before_step()
        watch.after_step(row)
    assert "peak so far: 4.00 GiB, predicted 2.00 GiB (-50.0%)" in capsys.readouterr().err


def answer_of(forecast: BackgroundForecast) -> int | None:
    for _ in range(1200):
        found = forecast.peak_bytes()
        if found is not None or forecast._process is None:
            return found
        time.sleep(0.1)
    raise AssertionError("no answer within two minutes")


def long_run(tiny_values: dict[str, Any], **metrics: Any) -> Config:
    tiny_values["train"]["steps"] = LEAST_STEPS
    tiny_values["metrics"] = {"tensorboard": False, **metrics}
    return parse_config(tiny_values)


_PLANNER = """
import json, sys
from scalellm.config import parse_config
from scalellm.plan.forecast import predicted_peak_bytes
print(predicted_peak_bytes(parse_config(json.load(sys.stdin)), 1, "cpu"))
"""


def test_the_process_beside_the_run_says_what_the_planner_would(
    tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_run(tiny_values)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a rank's environment has them
    monkeypatch.setenv("RANK", "0")
    forecast = BackgroundForecast(config, World())
    said = answer_of(forecast)
    known = with_vocabulary(config, open_mixture(config))
    # In a new process, as `scalellm plan` is one: this one has done much else.
    planner = subprocess.run(
        [sys.executable, "-c", _PLANNER], input=known.model_dump_json(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert str(said) == planner.stdout.strip() and said == forecast.peak_bytes()
    forecast.close()


def test_a_short_run_one_that_does_not_want_it_and_other_ranks_start_none(
    tiny_values: dict[str, Any],
) -> None:
    config = long_run(tiny_values)
    assert BackgroundForecast(config, World(rank=1, world_size=2))._process is None
    unwanted = long_run(tiny_values, predict_memory=False)
    assert BackgroundForecast(unwanted, World())._process is None
    tiny_values["train"]["steps"] = LEAST_STEPS - 1
    assert BackgroundForecast(parse_config(tiny_values), World())._process is None


def test_what_cannot_be_predicted_or_started_is_silent(
    tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_run(tiny_values)
    forecast = BackgroundForecast(config, World(world_size=3))  # its batch cannot be divided so
    assert answer_of(forecast) is None
    forecast.close()
    monkeypatch.setattr("sys.executable", str(Path("/nowhere/python")))
    forecast = BackgroundForecast(config, World())
    assert forecast.peak_bytes() is None
    forecast.close()
    assert capsys.readouterr() == ("", "")


def test_a_run_that_ends_first_ends_the_process_too(tiny_values: dict[str, Any]) -> None:
    forecast = BackgroundForecast(long_run(tiny_values), World())
    process = forecast._process
    assert process is not None
    forecast.close()
    assert process.returncode is not None
    forecast.close()


@pytest.mark.slow
def test_a_run_as_it_is_typed_hears_of_it_in_time(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    tiny_values["train"]["steps"] = 2000
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values))
    command = [sys.executable, "-m", "scalellm", "train", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert "predicted peak: " in process.stderr and "peak so far: " in process.stderr
    assert end_row(parse_config(tiny_values))["predicted_peak_bytes"] > 1 << 20
