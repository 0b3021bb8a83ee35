"""A run's saves, in the background and not: killed, failing, damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm import checkpoint
from scalellm.checkpoint import part
from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.dist import detect
from scalellm.errors import CheckpointError, ConfigError
from scalellm.train import RunFolder, run_training

Values = dict[str, Any]


def checkpoints(values: Values) -> Path:
    return Path(values["run"]["dir"]) / "checkpoints"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def config_file(values: Values, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fill_the_disk(patch: pytest.MonkeyPatch, step: int) -> None:
    honest = part.write_safetensors

    def write(path: Path, *arguments: Any) -> Any:
        if int(path.parent.name.split("-")[1].split(".")[0]) >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(path, *arguments)

    patch.setattr(part, "write_safetensors", write)


def test_the_background_writes_what_the_foreground_writes(
    tiny_values: Values, tmp_path: Path
) -> None:
    written = []
    for asynchronous in (True, False):
        tiny_values["run"]["dir"] = str(tmp_path / f"run-{asynchronous}")
        tiny_values["checkpoint"] = {"every_steps": 2, "keep": 9, "asynchronous": asynchronous}
        run_training(parse_config(tiny_values))
        steps = sorted(checkpoints(tiny_values).iterdir())
        assert [path.name for path in steps] == [f"step-{step:08d}" for step in (2, 4, 6)]
        written.append([files(path) for path in steps])
    assert written[0] == written[1]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("step", [4, 6])
def test_a_full_disk_ends_the_run_with_2(
    tiny_values: Values,
    tmp_path: Path,
    step: int,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Failing in the background at step 4, it is tried again at step 6, the end of the run."""
    tiny_values["checkpoint"] = {"every_steps": 2, "asynchronous": asynchronous}
    fill_the_disk(monkeypatch, step)
    assert main(["train", config_file(tiny_values, tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("scalellm: could not save a checkpoint") == 1
    assert "the disk is full" in errors and "Traceback" not in errors
    sound = [f"step-{done:08d}" for done in (2, 4) if done < step]
    assert sorted(path.name for path in checkpoints(tiny_values).iterdir()) == sound


def _one_rank_has_no_space(values: Values) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "MAX_FILE_BYTES", 2000)
        honest = part.write_json

        def write_json(path: Path, value: Values) -> None:
            if detect().rank == 1 and path.name.startswith("part") and "02" not in path.parent.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            honest(path, value)

        patch.setattr(part, "write_json", write_json)
        try:
            run_training(parse_config(values))
        except CheckpointError as error:
            return str(error)
    return "trained"


def test_all_ranks_of_a_run_hear_of_one_ranks_disk(
    tiny_values: Values, ranks: Callable[..., list[Any]]
) -> None:
    tiny_values["strategy"] = {"name": "ddp"}
    tiny_values["checkpoint"] = {"every_steps": 2}
    first, second = ranks(_one_rank_has_no_space, 2, tiny_values)
    assert "another rank failed" in first and "the disk is full" in second
    assert [path.name for path in checkpoints(tiny_values).iterdir()] == ["step-00000002"]


def test_an_error_elsewhere_still_leaves_the_save_in_flight(
    tiny_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2}

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("elsewhere")

    save = checkpoint.Saver.save

    def save_then_fail(*arguments: Any) -> None:
        save(*arguments)
        monkeypatch.setattr("scalellm.train.loop._train_step", fail)

    monkeypatch.setattr(checkpoint.Saver, "save", save_then_fail)
    with pytest.raises(RuntimeError, match="elsewhere"):
        run_training(parse_config(tiny_values))
    assert [path.name for path in checkpoints(tiny_values).iterdir()] == ["step-00000002"]
    assert checkpoint.open_checkpoint(checkpoints(tiny_values)).step == 2


def test_a_damaged_checkpoint_asked_for_is_refused_before_the_model_is_made(
    tiny_values: Values, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_values["checkpoint"] = {"every_steps": 3}
    run_training(parse_config(tiny_values))
    folder = checkpoints(tiny_values) / "step-00000006"
    file = folder / "optimizer-00000-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    before = files(folder)

    def build(*arguments: Any) -> Any:
        raise AssertionError("the model was made")

    monkeypatch.setattr("scalellm.train.build._build", build)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged"):
        run_training(parse_config(tiny_values), resume=str(folder))
    assert capsys.readouterr().out == ""
    assert files(folder) == before


def test_kill_9_in_a_background_write_then_resume_is_bit_identical(
    tiny_values: Values, tmp_path: Path
) -> None:
    """Killed when step 4 is half written and the training is steps ahead: step 2 is resumed."""
    tiny_values["train"]["steps"] = 40
    tiny_values["model"]["dropout"] = 0.1
    straight = {**tiny_values, "run": {"dir": str(tmp_path / "straight"), "threads": 1}}
    run_training(parse_config(straight))
    tiny_values["checkpoint"] = {"every_steps": 2}
    code = textwrap.dedent(
        """
        import sys, time
        from scalellm.checkpoint import part
        from scalellm.cli import main

        honest = part.write_safetensors

        def write(path, *arguments):
            if "step-00000004" in str(path) and "optimizer" in path.name:
                path.write_bytes(b"half of it")
                print("half", file=sys.stderr, flush=True)
                time.sleep(600)
            return honest(path, *arguments)

        part.write_safetensors = write
        main(sys.argv[1:])
        """
    )
    arguments = ["train", config_file(tiny_values, tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any(line.endswith("half\n") for line in process.stderr)
    process.kill()
    process.wait()
    names = {path.name for path in checkpoints(tiny_values).iterdir()}
    assert names == {"step-00000002", ".step-00000004.writing"}
    assert run_training(parse_config(tiny_values), resume="auto").step == 40
    final = files(checkpoints(tiny_values) / "step-00000040")
    assert final == files(checkpoints(straight) / "step-00000040")
    assert not list(checkpoints(tiny_values).glob(".*"))


def train(
    values: Values, steps: int, *, resume: str | None = None, restarts: int = 0
) -> list[tuple[str, int | str]]:
    """Trains as the launcher's start number `restarts`; returns what a cluster hears of it."""
    values = {**values, "train": {**values["train"], "schedule": "constant", "steps": steps}}
    reading, writing = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALELLM_RESTARTS", str(restarts))
        patch.setenv("SCALELLM_EVENTS_FD", str(writing))
        try:
            assert run_training(parse_config(values), resume).step == steps
        finally:
            os.close(writing)
            with os.fdopen(reading) as told:
                events = [json.loads(line) for line in told]
    return [
        (event["kind"], event["step"] if event["kind"] == "started" else Path(event["path"]).name)
        for event in events
    ]


def steps_in(values: Values) -> list[int]:
    lines = Path(values["run"]["dir"], "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]


def saved(step: int) -> tuple[str, str]:
    return "saved", f"step-{step:08d}"


def test_ranks_started_again_go_on_without_being_told_to(tiny_values: Values) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2}
    assert train(tiny_values, 4) == [("started", 0), saved(2), saved(4)]
    with pytest.raises(ConfigError, match="already holds a run: add --resume auto"):
        train(tiny_values, 6)
    assert train(tiny_values, 6, restarts=1) == [("started", 4), saved(6)]
    assert steps_in(tiny_values) == [1, 2, 3, 4, 5, 6]


def test_ranks_started_again_before_a_save_begin_anew(tiny_values: Values) -> None:
    train(tiny_values, 4)
    shutil.rmtree(checkpoints(tiny_values))
    assert train(tiny_values, 3, restarts=1) == [("started", 0), saved(3)]
    assert steps_in(tiny_values) == [1, 2, 3]


def test_ranks_started_again_prefer_their_own_checkpoints(
    tiny_values: Values, tmp_path: Path
) -> None:
    """`--resume OTHER` says where the run began, not where it was when a rank died."""
    train(tiny_values, 3)
    other = tiny_values["run"]["dir"]
    tiny_values["run"] |= {"dir": str(tmp_path / "own")}
    assert train(tiny_values, 4, resume=other, restarts=1) == [("started", 3), saved(4)]
    assert train(tiny_values, 5, resume=other, restarts=2) == [("started", 4), saved(5)]
    assert steps_in(tiny_values) == [4, 5]
    # Without a restart the user has the last word, and goes back.
    assert train(tiny_values, 4, resume=other) == [("started", 3), saved(4)]


def test_ranks_started_again_wait_for_those_before_them(tiny_values: Values) -> None:
    """A rank that lost its worker may still be saving; a second run is a mistake, and told so."""
    train(tiny_values, 2)
    before = RunFolder(Path(tiny_values["run"]["dir"]))
    before.claim(resuming=True)
    with pytest.raises(ConfigError, match="is in use by another training process"):
        train(tiny_values, 4, resume="auto")
    released_s: list[float] = []

    def release() -> None:
        released_s.append(time.monotonic())
        before.release()

    timer = threading.Timer(1.0, release)
    timer.start()
    assert train(tiny_values, 4, restarts=1) == [("started", 2), saved(4)]
    ended_s = time.monotonic()
    timer.join()
    assert ended_s > released_s[0]


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_the_wait_for_a_folder_has_an_end(tmp_path: Path, wait_s: float) -> None:
    before = RunFolder(tmp_path)
    before.claim(resuming=False)
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match="is in use by another"):
        RunFolder(tmp_path).claim(resuming=True, wait_s=wait_s)
    assert wait_s <= time.monotonic() - started_s < wait_s + 5
    before.release()


def test_a_folder_that_is_removed_under_one_who_waits_is_made_again(tmp_path: Path) -> None:
    """Who held it leaves nothing; who waited must not hold the lock of a file that is gone."""
    first, second, third = (RunFolder(tmp_path / "run") for _ in range(3))
    first.claim(resuming=False)
    waiting = threading.Thread(target=second.claim, kwargs={"resuming": True, "wait_s": 5.0})
    waiting.start()
    time.sleep(0.3)
    first.release()
    waiting.join()
    assert second.path.is_dir()
    with pytest.raises(ConfigError, match="in use by another"):
        third.claim(resuming=True)
    second.release()
