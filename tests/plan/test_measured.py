"""`scalellm plan --calibrate`: real runs of this CPU, read, fitted, written and planned with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.errors import UserError
from scalellm.plan.devices import find_device
from scalellm.plan.measured import find_runs
from scalellm.train import run_training

SHAPES = [(32, 32), (64, 32), (32, 64), (128, 32), (64, 64)]  # hidden size, tokens


@pytest.fixture(scope="module")
def runs(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for hidden, seq_len in SHAPES:
        values: dict[str, Any] = {
            "run": {"dir": str(folder / f"{hidden}x{seq_len}"), "device": "cpu", "threads": 1},
            "data": {"path": str(tiny_dataset)},
            "model": {
                "num_layers": 2,
                "hidden_size": hidden,
                "num_heads": 4,
                "seq_len": seq_len,
            },
            "train": {"steps": 8, "global_batch_size": 4, "warmup_steps": 0},
            "metrics": {"tensorboard": False},
        }
        run_training(parse_config(values))
    return folder


def test_runs_of_this_cpu_make_a_device_to_plan_with(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    words = ["plan", "--calibrate", str(runs), "--device", "this-cpu", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(f"{hidden}x{seq_len}" in said for hidden, seq_len in SHAPES)
    assert "error on runs left out" in said
    device = find_device(str(out), 2)
    assert device.is_cpu and device.devices_per_node == 2 and device.name == "mine"
    whole = yaml.safe_load(out.read_text())
    assert device.rates.fp32 == pytest.approx(whole["rates"]["fp32"] / 2)
    assert whole["efficiency"] == device.efficiency.model_dump()
    assert device.efficiency.matrix != 0.7 or device.efficiency.launch != 1.0
    capsys.readouterr()
    config = str(runs / "64x32" / "config.yaml")
    assert main(["plan", config, "--device", str(out)]) == 0
    planned = capsys.readouterr().out
    assert "x mine" in planned and "with fitted efficiencies" in planned


def test_what_is_read_is_the_steps_after_the_first_ones(runs: Path) -> None:
    device = find_device("this-cpu")
    found = {run.label: run for run in find_runs([runs], device)}
    assert set(found) == {f"{hidden}x{seq_len}" for hidden, seq_len in SHAPES}
    rows = [json.loads(x) for x in (runs / "32x32" / "metrics.jsonl").read_text().splitlines()]
    times = sorted(
        row["step_time_s"] - row["data_wait_s"]
        for row in rows
        if row["kind"] == "train" and row["step"] > 2
    )
    assert found["32x32"].step_s == pytest.approx((times[2] + times[3]) / 2)
    assert found["32x32"].world_size == 1


def test_too_few_runs_and_none_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [str(runs / "32x32"), str(runs / "64x32")]
    assert main(["plan", "--calibrate", *few, "--device", "this-cpu"]) == 2
    assert "2 different runs and needs 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no run in"):
        find_runs([tmp_path], find_device("a100-80g"))
    assert main(["plan", "--out", "x.yaml"]) == 2
    assert "--out is for --calibrate" in capsys.readouterr().err
    assert main(["plan", "c.yaml", "--calibrate", str(runs), "--out", "x.yml"]) == 2
    assert "leave" in capsys.readouterr().err


def test_another_device_and_unended_runs(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ran on a CPU, which is not --device a100-80g"):
        find_runs([runs], find_device("a100-80g"))
    going = tmp_path / "runs"
    shutil.copytree(runs, going)
    metrics = going / "64x64" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    labels = {run.label for run in find_runs([going], find_device("this-cpu"))}
    assert "64x64" not in labels and len(labels) == len(SHAPES) - 1
