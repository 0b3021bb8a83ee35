"""What is predicted of a run's memory beside what it took: said, kept, and never in the way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm.config import Config, parse_config
from scalellm.dist import World
from scalellm.plan.forecast import BackgroundForecast, predicted_peak_bytes
from scalellm.train import run_training
from scalellm.train.forecast import LEAST_STEPS, MemoryWatch

GIB = 1 << 30


class Told:
    """A forecast that is known from its second question on."""

    def __init__(self, answer: int | None) -> None:
        self.answer, self.asked, self.begun, self.closed = answer, 0, False, False

    def begin(self, config: Config, world_size: int, device_type: str) -> None:
        assert config.model.vocab_size is not None
        self.begun = True

    def peak_bytes(self) -> int | None:
        self.asked += 1
        return self.answer if self.asked > 1 else None

    def close(self) -> None:
        self.closed = True


def long_run(tiny_values: dict[str, Any], **metrics: Any) -> Config:
    tiny_values["train"]["steps"] = LEAST_STEPS
    tiny_values["metrics"] = {"tensorboard": False, **metrics}
    return parse_config(tiny_values)


def end_row(config: Config) -> dict[str, Any]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    row: dict[str, Any] = json.loads(lines[-1])
    assert row["kind"] == "end"
    return row


def test_a_run_says_what_was_predicted_and_what_it_took(
    tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, told = long_run(tiny_values), Told(3 * GIB)
    run_training(config, None, told)
    error = capsys.readouterr().err
    assert error.count("predicted peak: 3.00 GiB on rank 0") == 1
    assert error.count("predicted 3.00 GiB (+") == 1
    assert error.index("predicted peak") < error.index("peak so far")
    assert told.asked == 2 and told.closed
    assert end_row(config)["predicted_peak_bytes"] == 3 * GIB


@pytest.mark.parametrize("answer", [None])
def test_a_prediction_that_never_comes_changes_nothing(
    answer: None, tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = long_run(tiny_values)
    run_training(config, None, Told(answer))
    assert "predicted" not in capsys.readouterr().err
    assert end_row(config)["predicted_peak_bytes"] is None


def test_a_short_run_or_one_that_does_not_want_it_is_not_predicted(
    tiny_values: dict[str, Any],
) -> None:
    unwanted = Told(GIB)
    run_training(long_run(tiny_values, predict_memory=False), None, unwanted)
    assert not unwanted.begun
    tiny_values["train"]["steps"] = LEAST_STEPS - 1
    short = parse_config(tiny_values)
    told = Told(GIB)
    MemoryWatch(told, short, World())
    assert not told.begun
    tiny_values["train"]["steps"] = LEAST_STEPS
    MemoryWatch(told, parse_config(tiny_values), World(rank=1, world_size=2))
    assert not told.begun


def test_on_a_gpu_it_is_the_device_s_bytes(
    tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = long_run(tiny_values)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 300})}
    )
    watch = MemoryWatch(Told(2 * GIB), config, World(device=torch.device("cuda", 0)))
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


def with_vocabulary(tiny_values: dict[str, Any], **model: Any) -> Config:
    tiny_values["model"] |= {"vocab_size": 300, **model}
    return parse_config(tiny_values)


def test_the_process_beside_the_run_says_what_the_planner_would(
    tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_vocabulary(tiny_values)
    monkeypatch.setenv("RANK", "1")  # as a rank's environment has them
    monkeypatch.setenv("WORLD_SIZE", "2")
    forecast = BackgroundForecast()
    assert forecast.peak_bytes() is None
    forecast.begin(config, 1, "cpu")
    assert answer_of(forecast) == predicted_peak_bytes(config, 1, "cpu")
    assert forecast.peak_bytes() == answer_of(forecast)  # also later
    forecast.close()


def test_what_cannot_be_predicted_or_started_is_silent(
    tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_vocabulary(tiny_values)
    forecast = BackgroundForecast()
    forecast.begin(config, 3, "cpu")  # its batch cannot be divided by three
    assert answer_of(forecast) is None
    monkeypatch.setattr("sys.executable", str(Path("/nowhere/python")))
    forecast.begin(config, 1, "cpu")
    assert forecast.peak_bytes() is None
    forecast.close()
    assert capsys.readouterr() == ("", "")


def test_a_run_that_ends_first_ends_the_process_too(tiny_values: dict[str, Any]) -> None:
    forecast = BackgroundForecast()
    forecast.begin(with_vocabulary(tiny_values), 1, "cpu")
    process = forecast._process
    assert process is not None
    forecast.close()
    assert process.returncode is not None
    forecast.close()
