"""Whole runs: what they leave behind, how they stop, and that a resumed one is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.checkpoint import buffers
from scalellm.checkpoint.layout import MANIFEST
from scalellm.config import Config, parse_config
from scalellm.dist import detect
from scalellm.errors import CheckpointError, ConfigError, DataError, DivergedError, UserError
from scalellm.metrics import read_rows
from scalellm.report import draw_loss
from scalellm.train import Outcome, run_training

Values = dict[str, Any]


def rows(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_rows(config.run.dir / "metrics.jsonl") if row["kind"] == kind]


def weights(run_dir: Path, step: int) -> list[bytes]:
    """The bytes of a checkpoint's model and optimizer."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_a_run_leaves_a_full_folder(tiny_values: Values) -> None:
    tiny_values["metrics"] = {"tensorboard": True}
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 2}
    tiny_values["eval"] = {"every_steps": 3}
    config = parse_config(tiny_values)
    outcome = run_training(config)
    assert (outcome.reason, outcome.step) == ("done", 6)
    run_dir = config.run.dir
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard"} <= names
    assert "tokenizer.model" in names
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    found = rows(config)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["tokens"] == 6 * 8 * 32
    wanted = {"grad_norm", "learning_rate", "tokens_per_s", "step_time_s", "data_wait_s"}
    assert wanted | {"peak_rss_bytes"} <= found[0].keys()
    assert [row["step"] for row in rows(config, "eval")] == [0, 3, 6]
    assert list((run_dir / "tensorboard").iterdir())
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert resolved["model"]["vocab_size"] > 10  # filled in from the dataset
    assert json.loads((run_dir / "environment.json").read_text())["versions"]["torch"]


def test_the_last_row_sums_up_the_start(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2}
    config = parse_config(tiny_values)
    run_training(config)
    steps, [end] = rows(config), rows(config, "end")
    assert (end["step"], end["reason"], end["world_size"]) == (6, "done", 1)
    assert end["first_step_s"] == steps[0]["step_time_s"]
    assert 0 < end["startup_s"] < end["wall_s"]
    spent_s = sum(row["step_time_s"] for row in steps) + end["save_stall_s"] + end["eval_s"]
    tick_s = 1 / os.sysconf("SC_CLK_TCK")  # of the system's record of when a process began
    assert 0 < end["save_stall_s"] < spent_s < end["wall_s"] - end["startup_s"] + 2 * tick_s
    assert end["goodput_tokens_per_s"] == pytest.approx(steps[-1]["tokens"] / end["wall_s"])
    [baseline], [peak] = end["baseline_rss_bytes"], end["peak_rss_bytes"]
    assert 2**26 < baseline <= peak
    for row in steps:
        parts = [row[key] for key in ("data_wait_s", "forward_s", "backward_s", "optimizer_s")]
        assert min(parts) > 0 and sum(parts) <= row["step_time_s"]


def test_a_resumed_run_counts_only_its_own_tokens(tiny_values: Values) -> None:
    _train(tiny_values)
    tiny_values["train"] |= {"steps": 8, "schedule": "constant"}
    _train(tiny_values, resume="auto")
    first, second = rows(parse_config(tiny_values), "end")
    assert (first["step"], second["step"]) == (6, 8)
    trained_tokens = second["goodput_tokens_per_s"] * second["wall_s"]
    assert trained_tokens == pytest.approx(2 * 8 * 32)


def _train(values: Values, resume: str | None = None) -> Outcome:
    return run_training(parse_config(values), resume)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_is_bit_identical(tiny_values: Values, tmp_path: Path, dropout: float) -> None:
    tiny_values["model"]["dropout"] = dropout
    tiny_values["checkpoint"] = {"every_steps": 3}
    _train(tiny_values)
    again = tmp_path / "again"
    shorter = {**tiny_values, "run": {"dir": str(again), "threads": 1}}
    shorter["train"] = {**tiny_values["train"], "schedule": "constant", "steps": 3}
    straight = {**tiny_values, "run": {"dir": str(tmp_path / "straight"), "threads": 1}}
    straight["train"] = {**tiny_values["train"], "schedule": "constant"}
    _train(straight)
    _train(shorter)
    outcome = _train({**straight, "run": {"dir": str(again), "threads": 1}}, resume="auto")
    assert outcome.step == 6
    assert weights(again, 6) == weights(tmp_path / "straight", 6)
    losses = [
        [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
        for folder in (again, tmp_path / "straight")
    ]
    assert [pair for pair in losses[0] if pair[0] != 3] == [p for p in losses[1] if p[0] != 3]


def test_the_update_waits_for_the_copy_of_a_background_save(
    tiny_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that takes longer than a step holds the weights of the step it was asked for."""
    move = buffers._move

    def slow(batch: Any) -> None:
        time.sleep(0.3)
        move(batch)

    monkeypatch.setattr(buffers, "_move", slow)
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 9, "asynchronous": True}
    _train(tiny_values)
    run_dir = Path(tiny_values["run"]["dir"])
    [end] = rows(parse_config(tiny_values), "end")
    assert end["save_stall_s"] > 2 * 0.3
    tiny_values["checkpoint"]["asynchronous"] = False
    tiny_values["run"] |= {"dir": str(tmp_path / "foreground")}
    _train(tiny_values)
    for step in (2, 4, 6):
        assert weights(run_dir, step) == weights(tmp_path / "foreground", step)


def test_resuming_a_finished_run_changes_nothing(tiny_values: Values) -> None:
    _train(tiny_values)
    run_dir = Path(tiny_values["run"]["dir"])
    before = (run_dir / "metrics.jsonl").read_bytes(), weights(run_dir, 6)
    assert _train(tiny_values, resume="auto").reason == "done"
    assert ((run_dir / "metrics.jsonl").read_bytes(), weights(run_dir, 6)) == before


def test_resume_from_another_run(tiny_values: Values, tmp_path: Path) -> None:
    _train(tiny_values)
    first = tiny_values["run"]["dir"]
    tiny_values["run"] |= {"dir": str(tmp_path / "second")}
    tiny_values["train"] |= {"steps": 8}
    assert _train(tiny_values, resume=first).step == 8
    assert [row["step"] for row in rows(parse_config(tiny_values))] == [7, 8]


def test_resume_passes_over_a_damaged_checkpoint(
    tiny_values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 3}
    _train(tiny_values)
    whole = weights(Path(tiny_values["run"]["dir"]), 6)
    folder = Path(tiny_values["run"]["dir"]) / "checkpoints"
    file = folder / "step-00000006" / "model-00000-000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    _train(tiny_values, resume="auto")
    printed = capsys.readouterr().out
    assert "passed over" in printed and "is damaged" in printed
    assert "resumed from" in printed and "step-00000004" in printed
    assert weights(Path(tiny_values["run"]["dir"]), 6) == whole


def test_a_checkpoint_of_another_model_is_refused(tiny_values: Values, tmp_path: Path) -> None:
    _train(tiny_values)
    first = tiny_values["run"]["dir"]
    tiny_values["run"] |= {"dir": str(tmp_path / "second")}
    tiny_values["model"] |= {"num_layers": 3}
    with pytest.raises(
        CheckpointError,
        match=r"another architecture: its model\.num_layers is 2, this model's is 3",
    ):
        _train(tiny_values, resume=first)
    tiny_values["model"] |= {"num_layers": 2, "hidden_size": 64}
    with pytest.raises(CheckpointError, match="another architecture"):
        _train(tiny_values, resume=first)


def test_going_back_in_the_same_folder_leaves_one_timeline(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 5}
    _train(tiny_values)
    run_dir = Path(tiny_values["run"]["dir"])
    tiny_values["train"] |= {"steps": 5}
    _train(tiny_values, resume=str(run_dir / "checkpoints" / "step-00000002"))
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    steps = [row["step"] for row in rows(parse_config(tiny_values))]
    assert steps == [1, 2, 3, 4, 5]


def test_a_damaged_newer_checkpoint_never_outlives_a_new_one(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 3}
    _train(tiny_values)
    folder = Path(tiny_values["run"]["dir"]) / "checkpoints"
    (folder / "step-00000006" / MANIFEST).write_text("{}")
    tiny_values["train"] |= {"steps": 5}
    tiny_values["checkpoint"] = {"keep": 1}
    _train(tiny_values, resume="auto")
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]


def test_a_finished_run_resumed_elsewhere_is_saved_there(
    tiny_values: Values, tmp_path: Path
) -> None:
    _train(tiny_values)
    first = Path(tiny_values["run"]["dir"])
    tiny_values["run"] |= {"dir": str(tmp_path / "second")}
    assert _train(tiny_values, resume=str(first)).step == 6
    assert weights(tmp_path / "second", 6) == weights(first, 6)


def test_another_dataset_cannot_be_resumed(tiny_values: Values, tmp_path: Path) -> None:
    from scalellm.cli import main

    _train(tiny_values)
    source, other = str(Path(__file__)), str(tmp_path / "other")
    assert main(["prepare", "--source", source, "--out", other, "--tokenizer", "char"]) == 0
    tiny_values["data"] |= {"path": other}
    with pytest.raises(DataError, match="was trained on another dataset than"):
        _train(tiny_values, resume="auto")


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("model", {"hidden_size": 65536, "num_heads": 64, "num_layers": 99}, "need at least"),
        ("model", {"seq_len": 2**24}, "need at least"),
        ("train", {"global_batch_size": 2**24}, "need at least"),
        ("train", {"precision": "fp16"}, "fp16 is about 100 times slower .* use bf16 or fp32"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_made(
    tiny_values: Values, section: str, change: Values, words: str
) -> None:
    tiny_values[section] |= change
    with pytest.raises(ConfigError, match=words):
        _train(tiny_values)
    assert not Path(tiny_values["run"]["dir"]).exists()


def test_a_mistake_after_the_claim_leaves_no_folder(tiny_values: Values) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint or run folder at nowhere"):
        _train(tiny_values, resume="nowhere")
    assert not Path(tiny_values["run"]["dir"]).exists()


def test_a_damaged_row_is_named(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2}
    _train(tiny_values)
    path = Path(tiny_values["run"]["dir"]) / "metrics.jsonl"
    path.write_text("x" + path.read_text())
    tiny_values["train"] |= {"steps": 8}
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is damaged; delete that line"):
        _train(tiny_values, resume="auto")


def test_a_diverged_run_still_draws_its_curve(tiny_values: Values) -> None:
    tiny_values["train"] |= {"learning_rate": 1e38, "grad_clip": 0, "warmup_steps": 0}
    tiny_values["eval"] = {"every_steps": 1, "max_samples": 2}
    _train(tiny_values)
    losses = [row["loss"] for row in rows(parse_config(tiny_values), "eval")]
    assert None in losses
    assert draw_loss(Path(tiny_values["run"]["dir"])) is not None


def _rank_one_fails(values: Values) -> str:
    """What the ranks say when only rank 1's checkpoint is damaged, as on storage not shared."""
    if detect().rank == 1:
        values["run"] |= {"dir": values["run"]["dir"] + "-elsewhere"}
    try:
        run_training(parse_config(values), values["run"]["dir"])
    except UserError as error:
        return str(error)
    return "trained"


def test_ranks_agree_on_failure(
    tiny_values: Values, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    tiny_values["strategy"] = {"name": "ddp"}
    _train(tiny_values)
    first, second = ranks(_rank_one_fails, 2, tiny_values)
    assert first == "1 of 2 ranks failed; they say why"
    assert "there is no checkpoint or run folder" in second


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_values: Values) -> None:
    _train(tiny_values)
    with pytest.raises(ConfigError, match="already holds a run: add --resume auto"):
        _train(tiny_values)


def test_another_seed_or_order_cannot_be_resumed(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 3}
    _train(tiny_values)
    tiny_values["run"]["seed"] = 1
    tiny_values["train"]["steps"] = 9
    with pytest.raises(DataError, match="seed=0"):
        _train(tiny_values, resume="auto")


def test_vocabulary_too_small_for_the_data(tiny_values: Values) -> None:
    tiny_values["model"] |= {"vocab_size": 5}
    with pytest.raises(ConfigError, match=r"model.vocab_size=5 tokens is smaller than"):
        _train(tiny_values)
    assert not Path(tiny_values["run"]["dir"]).exists()


def test_early_stopping(tiny_values: Values) -> None:
    tiny_values["eval"] = {
        "every_steps": 1,
        "early_stop_patience": 2,
        "early_stop_min_delta": 100.0,
        "max_samples": 2,
    }
    outcome = _train(tiny_values)
    assert (outcome.reason, outcome.step) == ("early stop", 2)
    assert outcome.run_dir.joinpath("checkpoints/step-00000002").is_dir()
    assert _train(tiny_values, resume="auto").step == 2


def _poisoned(values: Values) -> tuple[list[int], list[bytes]]:
    values["run"] |= {"dir": f"{values['run']['dir']}-{detect().world_size}"}
    values["strategy"] = {"name": "helpers.poisoned", "steps": [2, 3], "rank": 1}
    outcome = _train(values)
    return [row["skipped"] for row in rows(parse_config(values))], weights(outcome.run_dir, 6)


def test_a_poisoned_gradient_on_one_rank_is_skipped_by_all(
    tiny_values: Values, ranks: Callable[..., list[Any]]
) -> None:
    """Rank 1's loss is NaN in steps 2 and 3: both ranks skip them and stay alike."""
    (skipped, _), _ = ranks(_poisoned, 2, tiny_values)
    assert skipped == [0, 1, 1, 0, 0, 0]
    run_dir = Path(tiny_values["run"]["dir"] + "-2")
    found = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] != "end"]
    assert [row["loss"] for row in found[1:3]] == [None, None]
    assert all(row["loss"] for row in found if row["step"] > 3)


def test_too_many_poisoned_steps_end_the_run(tiny_values: Values) -> None:
    tiny_values["strategy"] = {"name": "helpers.poisoned", "steps": [2, 3, 4], "rank": 0}
    tiny_values["train"] |= {"max_nonfinite_steps": 3}
    with pytest.raises(DivergedError, match="in the 3 steps up to 4"):
        _train(tiny_values)


def _two_rank_losses(values: Values) -> list[float]:
    config = parse_config(values)
    run_training(config)
    return [row["loss"] for row in rows(config)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp_run_agrees_with_single(
    tiny_values: Values, tmp_path: Path, ranks: Callable[..., list[Any]], world_size: int
) -> None:
    _train(tiny_values)
    wanted = [row["loss"] for row in rows(parse_config(tiny_values))]
    values = {
        **tiny_values,
        "run": {"dir": str(tmp_path / "ddp"), "threads": 1},
        "strategy": {"name": "ddp"},
    }
    values["train"] = {**tiny_values["train"], "micro_batch_size": 1}
    found = ranks(_two_rank_losses, world_size, values)[0]
    assert found == pytest.approx(wanted, rel=1e-5)


def _start(values: Values, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return subprocess.Popen(
        [sys.executable, "-m", "scalellm", "train", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_step(run_dir: Path, step: int) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if any(row["step"] >= step for row in read_rows(run_dir / "metrics.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached in a minute")


def test_kill_9_at_a_random_step_then_resume_is_bit_identical(
    tiny_values: Values, tmp_path: Path
) -> None:
    tiny_values["train"] |= {"steps": 150}
    tiny_values["checkpoint"] = {"every_steps": 7, "keep": 2}
    tiny_values["model"] |= {"dropout": 0.1}
    straight = {**tiny_values, "run": {"dir": str(tmp_path / "straight"), "threads": 1}}
    killed = {**tiny_values, "run": {"dir": str(tmp_path / "killed"), "threads": 1}}
    assert _start(straight, tmp_path).wait() == 0
    choose = random.Random(time.time_ns())
    for low, high in ((1, 50), (51, 140)):
        process = _start(killed, tmp_path, "--resume", "auto")
        _wait_for_step(tmp_path / "killed", choose.randint(low, high))
        process.kill()
        process.wait()
    process = _start(killed, tmp_path, "--resume", "auto")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "resumed from" in output
    assert weights(tmp_path / "killed", 150) == weights(tmp_path / "straight", 150)
    steps = [row["step"] for row in read_rows(tmp_path / "killed" / "metrics.jsonl")]
    assert [step for step in steps if steps.count(step) > 1] == [150, 150, 150]  # train, eval, end


@pytest.mark.parametrize(("nproc", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_leaves_with_3(
    tiny_values: Values, tmp_path: Path, number: signal.Signals, nproc: int
) -> None:
    tiny_values["train"] |= {"steps": 100_000}
    tiny_values["strategy"] = {"name": "ddp"}
    run_dir = Path(tiny_values["run"]["dir"])
    process = _start(tiny_values, tmp_path, "--nproc", str(nproc))
    _wait_for_step(run_dir, 3)
    if number == signal.SIGINT:  # as a terminal does: launcher and ranks get it, all at once
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert f"stopped by {number.name} at step" in output and "--resume auto" in output
    [saved] = (run_dir / "checkpoints").iterdir()
    assert (saved / MANIFEST).exists()
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")][-1] == int(
        saved.name.removeprefix("step-")
    )
