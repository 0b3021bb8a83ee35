"""A rank below a Ray worker saves and stops when it is asked to, and when its worker is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.checkpoint import open_checkpoint
from scalellm.clusters._ray_worker import _last_row, _without_ray

RANK = "scalellm.clusters._ray_rank"
GRACE_S = 0.3
WITHIN_S = 180.0
# In place of a training that would need torch: what it does is told by ACT.
STAND_IN = f"""
import runpy, signal, sys, time
from {RANK.rpartition(".")[0]} import _ray_rank

def act(*arguments, **options):
    {{act}}
    print("ready", flush=True)
    time.sleep({WITHIN_S})

runpy.run_module = act
_ray_rank.GRACE_S = {GRACE_S}
_ray_rank.main()
"""


class Rank:
    """A process, and our end of its lifeline."""

    def __init__(self, *command: str, is_alone: bool = False, **options: Any) -> None:
        lifeline, self._lifeline = os.pipe()
        if is_alone:
            self.leave()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"SCALELLM_LIFELINE_FD": str(lifeline)},
            pass_fds=(lifeline,),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        os.close(lifeline)

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        assert any(words in line for line in self.process.stdout)

    def ask(self) -> None:
        os.write(self._lifeline, b"s")

    def leave(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what it said since."""
        try:
            said = self.process.communicate(timeout=WITHIN_S)[0]
            return self.process.returncode, said
        finally:
            self.process.kill()
            self.leave()


def stand_in(act: str = "pass", **options: Any) -> Rank:
    return Rank("-c", STAND_IN.format(act=act), **options)


def training(values: dict[str, Any], folder: Path, **options: Any) -> Rank:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return Rank("-m", RANK, "train", "--config", str(config), **options)


@pytest.mark.parametrize("how", ["ask", "leave"])
def test_a_rank_saves_and_stops(tiny_values: dict[str, Any], tmp_path: Path, how: str) -> None:
    tiny_values["train"]["steps"] = 1_000_000
    rank = training(tiny_values, tmp_path)
    metrics = Path(tiny_values["run"]["dir"], "metrics.jsonl")
    deadline_s = time.monotonic() + WITHIN_S
    while not _last_row(metrics).get("step"):
        assert rank.process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
    getattr(rank, how)()
    code, said = rank.end()
    assert code == 3 and "stopped by SIGTERM at step" in said, said
    saved = open_checkpoint(Path(tiny_values["run"]["dir"], "checkpoints"))
    assert saved.step == _last_row(metrics)["step"] > 0


def test_a_rank_whose_worker_is_gone_at_once_trains_nothing(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    tiny_values["train"]["steps"] = 1_000_000
    assert training(tiny_values, tmp_path, is_alone=True).end() == (3, "")
    assert not Path(tiny_values["run"]["dir"]).exists()


@pytest.mark.parametrize("how", ["ask", "leave"])
def test_before_training_there_is_nothing_to_save(how: str) -> None:
    rank = stand_in()
    rank.wait_for("ready")
    getattr(rank, how)()
    assert rank.end() == (3, "")


def test_a_rank_that_hangs_has_time_as_long_as_its_worker_lives() -> None:
    """Only SIGKILL, or the worker's end and `GRACE_S`, ends it: its peers may still be saving."""
    rank = stand_in("signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))")
    rank.wait_for("ready")
    rank.ask()
    rank.wait_for("asked")
    time.sleep(3 * GRACE_S)
    assert rank.process.poll() is None
    left_s = time.monotonic()
    rank.leave()
    assert rank.end() == (1, "")
    assert GRACE_S <= time.monotonic() - left_s < WITHIN_S / 2


def test_ctrl_c_reaches_a_rank_although_ray_blocks_it() -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    rank = stand_in(preexec_fn=block)
    rank.wait_for("ready")
    rank.process.send_signal(signal.SIGINT)
    code, said = rank.end()
    assert code == -signal.SIGINT and "KeyboardInterrupt" in said


def test_a_rank_is_no_ray_process() -> None:
    given = {"RAY_ADDRESS": "a:1", "RAY_JOB_ID": "1", "ARRAY_SIZE": "2", "HOME": "/"}
    assert _without_ray(given) == {"ARRAY_SIZE": "2", "HOME": "/"}


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (None, {}),
        ("", {}),
        ('{"step": 1}\n{"step": 2}\n', {"step": 2}),
        ('{"step": 1}\n{"st', {}),  # being written
    ],
)
def test_the_newest_numbers(tmp_path: Path, text: str | None, row: dict[str, int]) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    assert _last_row(path) == row
