"""One run, passed from strategy to strategy and from world size to world size, stays one run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalellm.checkpoint import open_checkpoint
from scalellm.checkpoint.layout import checksum
from scalellm.config import parse_config
from scalellm.errors import CheckpointError, UserError
from scalellm.metrics import read_rows
from scalellm.train import run_training

Values = dict[str, Any]
SHARDED = {
    "fsdp": {"name": "fsdp"},
    "deepspeed": {"name": "deepspeed", "stage": 3, "persistent_elements": 0},
}


def train_to(values: Values, strategy: Values, steps: int, resume: str | None = None) -> int:
    values = copy.deepcopy(values)
    values["strategy"] = strategy
    values["train"]["steps"] = steps
    return run_training(parse_config(values), resume).step


def losses(run_dir: str) -> list[float]:
    rows = read_rows(Path(run_dir) / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_run_goes_through_all_strategies(
    ranks: Callable[..., list[Any]], tiny_values: Values, tmp_path: Path
) -> None:
    tiny_values["train"] |= {"schedule": "constant", "learning_rate": 3e-3, "log_every_steps": 1}
    whole = copy.deepcopy(tiny_values)
    whole["run"]["dir"] = str(tmp_path / "whole")
    train_to(whole, {"name": "single"}, 10)

    ranks(train_to, 2, tiny_values, SHARDED["fsdp"], 2)
    ranks(train_to, 4, tiny_values, SHARDED["deepspeed"], 4, "auto")
    train_to(tiny_values, {"name": "single"}, 6, "auto")
    ranks(train_to, 2, tiny_values, {"name": "deepspeed", "stage": 2}, 8, "auto")
    ranks(train_to, 2, tiny_values, {"name": "accelerate"}, 10, "auto")
    found, wanted = losses(tiny_values["run"]["dir"]), losses(whole["run"]["dir"])
    assert len(found) == len(wanted) == 10
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [SHARDED["deepspeed"], {"name": "accelerate", "backend": "deepspeed", "stage": 3}],
    ids=["deepspeed", "accelerate"],
)
def test_alone_under_plain_python(
    tiny_values: Values, monkeypatch: pytest.MonkeyPatch, strategy: Values
) -> None:
    """DeepSpeed reads LOCAL_RANK, which only launchers set, and puts its own `linear` in place."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    linear = torch.nn.functional.linear
    assert train_to(tiny_values, strategy, 2) == 2
    assert "LOCAL_RANK" not in os.environ
    assert torch.nn.functional.linear is linear


def refused(values: Values, strategy: Values, resume: str) -> str:
    try:
        train_to(values, strategy, 8, resume)
    except UserError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("word", SHARDED)
def test_a_checkpoint_of_another_architecture(
    ranks: Callable[..., list[Any]], tiny_values: Values, tmp_path: Path, word: str
) -> None:
    ranks(train_to, 2, tiny_values, SHARDED[word], 2)
    other = copy.deepcopy(tiny_values)
    other["model"]["hidden_size"] = 48
    other["run"]["dir"] = str(tmp_path / "other")
    for sentence in ranks(refused, 2, other, SHARDED[word], tiny_values["run"]["dir"]):
        assert (
            "is of another architecture: its model.hidden_size is 32, this model's is" in sentence
        )


@pytest.mark.parametrize("damage", ["flipped bit", "missing shard"])
def test_a_damaged_shard_falls_back_to_the_one_before(
    ranks: Callable[..., list[Any]],
    tiny_values: Values,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    tiny_values["checkpoint"] = {"every_steps": 2, "keep": 3}
    ranks(train_to, 2, tiny_values, SHARDED["fsdp"], 4)
    newest = Path(tiny_values["run"]["dir"]) / "checkpoints" / "step-00000004"
    shard = sorted(newest.glob("model-00001-*.safetensors"))[0]
    if damage == "missing shard":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(newest)
    for sentence in ranks(refused, 2, tiny_values, SHARDED["deepspeed"], str(newest)):
        assert sentence != "trained"
    capfd.readouterr()
    assert ranks(train_to, 2, tiny_values, SHARDED["deepspeed"], 6, "auto") == [6, 6]
    shown = capfd.readouterr().out
    assert shown.count("passed over: ") == 1
    assert shard.name in shown
    assert "resumed from" in shown
    assert "step-00000002" in shown


def test_a_strategy_of_the_users_own_from_the_command_line(
    tiny_values: Values, tmp_path: Path
) -> None:
    """Found by its file's name in the folder the command is called from."""
    source = Path(__file__).parents[1] / "helpers" / "mypkg"
    shutil.copytree(source, tmp_path / "mypkg", ignore=shutil.ignore_patterns("__pycache__"))
    lines = (tmp_path / "mypkg" / "mystrategy.py").read_text().splitlines()
    assert len(lines) < 30
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_values))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = Path(sys.executable).parent / "scalellm"
    process = subprocess.run(
        [script, "train", "config.yaml", "--nproc", "2", "strategy.name=mypkg.mystrategy"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "mypkg.mystrategy: 2 ranks" in process.stdout
    assert process.stderr.count("Traceback") == 0


@pytest.mark.parametrize("change", [{"rope_theta": 500.0}, {"norm": "layernorm"}])
def test_another_function_of_the_same_shapes(
    tiny_values: Values, tmp_path: Path, change: Values
) -> None:
    train_to(tiny_values, {"name": "single"}, 2)
    other = copy.deepcopy(tiny_values)
    other["model"] |= change
    other["run"]["dir"] = str(tmp_path / "other")
    sentence = refused(other, {"name": "single"}, tiny_values["run"]["dir"])
    assert "is of another architecture: its model." in sentence
    assert "use the config in its run folder" in sentence
    assert not (tmp_path / "other").exists()


def test_the_same_function_in_other_words(tiny_values: Values) -> None:
    """Saying what a default says is no other architecture; dropout changes no function either."""
    train_to(tiny_values, {"name": "single"}, 2)
    tiny_values["model"] |= {"head_dim": 8, "dropout": 0.1, "attention": "explicit"}
    assert train_to(tiny_values, {"name": "single"}, 3, "auto") == 3


@pytest.mark.parametrize("key", ["cursor", "tokens", "early_stopping", "model"])
def test_a_lying_meta_is_found_before_the_model_is_touched(tiny_values: Values, key: str) -> None:
    train_to(tiny_values, {"name": "single"}, 2)
    file = Path(tiny_values["run"]["dir"]) / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["meta"][key] = "a lie"
    manifest["checksum"] = checksum(manifest)
    file.write_text(json.dumps(manifest))
    sentence = refused(tiny_values, {"name": "single"}, "auto")
    assert f"is damaged: meta.{key}" in sentence


def test_a_killed_rank_is_named(tiny_values: Values, tmp_path: Path) -> None:
    source = tmp_path / "mypkg"
    source.mkdir()
    (source / "__init__.py").touch()
    (source / "dies.py").write_text(
        "import os, signal\n"
        "from scalellm.strategies.ddp import DDP\n"
        "class Dies(DDP):\n"
        "    def step(self, learning_rate):\n"
        "        if self.world.rank == 1:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().step(learning_rate)\n"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_values))
    script = Path(sys.executable).parent / "scalellm"
    process = subprocess.run(
        [script, "train", "config.yaml", "--nproc", "2", "strategy.name=mypkg.dies"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert (
        "rank 1 was ended by SIGKILL (out of memory?); go on with --resume auto" in process.stderr
    )
