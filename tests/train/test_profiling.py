"""`--profile`: what is recorded, when, and that its figures are those of theory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalellm.cli import main
from scalellm.clusters import local
from scalellm.config import ProfileConfig, parse_config
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.metrics import read_rows
from scalellm.metrics.trace import STEP_SPAN, summarize
from scalellm.train import run_training
from scalellm.train.profiling import NOTHING, Profiler, window

Values = dict[str, Any]


def rows(run_dir: Path) -> list[Values]:
    return list(read_rows(run_dir / "metrics.jsonl"))


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir) if row["kind"] == "train"]


def parameters(run_dir: Path) -> int:
    return int(rows(run_dir)[-1]["parameters"])


def read(run_dir: Path, name: str = "summary.json") -> Any:
    return json.loads((run_dir / "profile" / name).read_text(encoding="utf-8"))


def by_operation(run_dir: Path) -> dict[str, dict[str, float]]:
    return {row["name"]: row for row in read(run_dir)["communication"]["by_operation"]}


def test_the_flag_reaches_the_ranks_that_nproc_starts(
    tiny_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_values))
    started: list[list[str]] = []
    monkeypatch.setattr(local, "launch", lambda words, nproc: started.append(words) or 0)
    tail = ["--nproc=2", "strategy.name=ddp"]
    assert main(["train", str(config), "--profile", *tail]) == 0
    assert main(["train", str(config), *tail]) == 0
    assert ["profile.enabled=true" in words for words in started] == [True, False]


def _profile_from_the_command_line(config: Path) -> int:
    return main(["train", "--config", str(config), "--profile"])


def test_ddp_moves_each_gradient_once(
    tiny_values: Values,
    tmp_path: Path,
    ranks: Callable[..., list[Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    tiny_values["strategy"] = {"name": "ddp"}
    tiny_values["train"] |= {"micro_batch_size": 2, "steps": 9}  # 2 micro-batches, one all-reduce
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_values))
    assert ranks(_profile_from_the_command_line, 2, config) == [0, 0]
    errors = capfd.readouterr().err
    run_dir = Path(tiny_values["run"]["dir"])
    [said] = [line for line in errors.splitlines() if line.startswith("profile: ")]
    assert said.startswith(
        f"profile: 5 steps of rank 0 in {run_dir / 'profile'}; open trace-rank-0"
    )
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == [
        "operators.txt",
        "summary.json",
        "trace-rank-0.json",
    ]
    summary = read(run_dir)
    assert summary["steps"] == 5
    step_s = [row["step_time_s"] for row in rows(run_dir)[3:8]]
    assert 0.99 < summary["step_s"] / (sum(step_s) / 5) < 2
    moved = summary["communication"]
    assert moved["bytes_per_step"] == pytest.approx(4 * parameters(run_dir), rel=5e-3)
    assert [row["name"] for row in moved["by_operation"]] == ["all_reduce"]
    assert moved["by_operation"][0]["bytes_per_step"] == moved["bytes_per_step"]
    assert 0 < moved["time_s_per_step"] < summary["step_s"]
    _check_operators(run_dir)
    _check_trace(run_dir)


def _check_operators(run_dir: Path) -> None:
    operators = read(run_dir)["operators"]
    assert len(operators) == 10
    self_s = [row["self_s"] for row in operators]
    assert self_s == sorted(self_s, reverse=True) and self_s[-1] > 0
    assert 0 < sum(row["share"] for row in operators) < 1
    assert not [row for row in operators if row["name"].startswith((STEP_SPAN, "gloo:"))]
    lines = (run_dir / "profile" / "operators.txt").read_text().splitlines()
    assert [line.split(maxsplit=3)[3] for line in lines[3:]] == [row["name"] for row in operators]


def _check_trace(run_dir: Path) -> None:
    trace = read(run_dir, "trace-rank-0.json")
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = [name for name in names if name.startswith(STEP_SPAN)]
    assert spans == [f"{STEP_SPAN}{step}" for step in (4, 5, 6, 7, 8)]
    assert "aten::mm" in names and "gloo:all_reduce" in names


def _train(values: Values) -> None:
    run_training(parse_config(values))


def test_fsdp_gathers_twice_and_scatters_once(
    tiny_values: Values, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    tiny_values["train"] |= {"steps": 4}
    tiny_values["eval"] = {"max_samples": 8}
    _train(tiny_values)
    plain = losses(Path(tiny_values["run"]["dir"]))
    run_dir = tmp_path / "profiled"
    tiny_values["strategy"] = {"name": "fsdp"}
    tiny_values |= {"run": {"dir": str(run_dir), "threads": 1}, "profile": {"enabled": True}}
    ranks(_train, 2, tiny_values)
    assert losses(run_dir) == pytest.approx(plain, rel=1e-5)
    size = 4 * parameters(run_dir)
    found = by_operation(run_dir)
    # Over gloo a rank sends the other its half of the parameters, and half of its gradients.
    for one in ("send", "recv"):
        assert found[one]["bytes_per_step"] == pytest.approx(3 * size / 2, rel=0.01)
    few = 8 + 16  # grad norm; loss and a vote to stop
    assert found["all_reduce"]["bytes_per_step"] == pytest.approx(few, rel=0.01)
    assert set(found) == {"send", "recv", "all_reduce"}
    parts_s = sum(row["time_s_per_step"] for row in found.values())
    assert read(run_dir)["communication"]["time_s_per_step"] <= parts_s * 1.001


def test_evaluations_and_saves_between_steps_do_not_count(
    tiny_values: Values, tmp_path: Path
) -> None:
    tiny_values["profile"] = {"enabled": True, "skip_steps": 1, "steps": 3}
    tiny_values["train"] |= {"steps": 4}
    calls = []
    for name, every_steps in (("plain", 0), ("evaluated", 1)):
        run_dir = tmp_path / name
        tiny_values |= {
            "run": {"dir": str(run_dir), "threads": 1},
            "eval": {"every_steps": every_steps, "max_samples": 8},
            "checkpoint": {"every_steps": every_steps, "asynchronous": False},
        }
        _train(tiny_values)
        summary = read(run_dir)
        assert summary["steps"] == 3
        assert summary["communication"] == {
            "bytes_per_step": 0,
            "time_s_per_step": 0,
            "by_operation": [],
        }
        trace = read(run_dir, "trace-rank-0.json")["traceEvents"]
        calls.append(summarize({"traceEvents": trace})["operators"])
    found = [{row["name"]: row["calls"] for row in operators} for operators in calls]
    common = found[0].keys() & found[1].keys()
    assert common and {name: found[0][name] for name in common} == {
        name: found[1][name] for name in common
    }


def test_off_it_leaves_nothing(tiny_values: Values) -> None:
    _train(tiny_values)
    assert not (Path(tiny_values["run"]["dir"]) / "profile").exists()


@pytest.mark.parametrize(
    ("step", "steps", "wanted"),
    [
        (0, 100, (4, 8)),
        (0, 8, (4, 8)),
        (0, 7, (3, 7)),
        (0, 6, (2, 6)),
        (0, 4, (2, 4)),
        (0, 2, (2, 2)),
        (40, 100, (44, 48)),  # resumed: the step after a start compiles too
        (98, 100, (100, 100)),
        (99, 100, NOTHING),
    ],
)
def test_a_short_run_skips_less_then_records_less(
    step: int, steps: int, wanted: tuple[int, int]
) -> None:
    assert window(ProfileConfig(), step, steps) == wanted


def test_a_run_that_ends_early_leaves_what_it_recorded(tiny_values: Values) -> None:
    tiny_values["profile"] = {"enabled": True, "skip_steps": 1}
    config = parse_config(tiny_values)
    only_near = Profiler(config, World())
    with only_near.step(1):
        torch.ones(3).sum()
    only_near.close()
    assert not (config.run.dir / "profile").exists()
    profiler = Profiler(config, World())
    for number in (1, 2, 3):
        with profiler.step(number):
            torch.ones(3).sum()
    with pytest.raises(RuntimeError), profiler.step(4):
        torch.ones(3).sum()
        raise RuntimeError
    profiler.close()
    profiler.close()
    summary = read(config.run.dir)
    assert summary["steps"] == 2  # neither the first nor the one that failed
    assert [row["calls"] for row in summary["operators"] if row["name"] == "aten::ones"] == [2]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tiny_values: Values, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_values["profile"] = {"enabled": True}
    run_dir = Path(tiny_values["run"]["dir"])
    run_dir.mkdir()
    (run_dir / "profile").touch()  # where the folder should be
    _train(tiny_values)
    assert len(losses(run_dir)) == 6
    assert (
        f"profile: {run_dir / 'profile'} cannot be written: File exists" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("train", "profile", "words"),
    [
        ({"steps": 1}, {"enabled": True}, "train.steps of 2 or more"),
        ({}, {"skip_steps": 0}, "profile.skip_steps=0 steps is out of range"),
        ({}, {"steps": 1000}, "at most 100"),
        ({}, {"enable": True}, "did you mean"),
    ],
)
def test_mistakes_are_one_sentence(
    tiny_values: Values, train: Values, profile: Values, words: str
) -> None:
    tiny_values["train"] |= train
    tiny_values["profile"] = profile
    with pytest.raises(ConfigError, match=words) as error:
        parse_config(tiny_values)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_memory_timeline_is_written(tiny_values: Values) -> None:
    tiny_values["run"] |= {"device": "cuda"}
    tiny_values["profile"] = {"enabled": True}
    _train(tiny_values)
    run_dir = Path(tiny_values["run"]["dir"])
    memory = read(run_dir, "memory.json")
    times_s = [time_s for time_s, _, _ in memory["timeline"]]
    assert times_s == sorted(times_s) and len(times_s) > 100
    peak_bytes = rows(run_dir)[-1]["peak_device_bytes"][0]
    assert 0.5 * peak_bytes <= memory["peak_allocated_bytes"] <= peak_bytes
    counters = [event for event in read(run_dir, "trace-rank-0.json")["traceEvents"]
                if event["name"] == "device memory"]  # fmt: skip
    assert len(counters) == len(times_s)
    assert [row["name"] for row in read(run_dir)["operators"] if "aten::mm" in row["name"]]
