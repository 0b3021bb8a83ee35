"""Every shipped config is valid, described by the schema, and trains two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.config import load_config
from scalellm.reference import help_text, json_schema
from scalellm.train import run_training

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
SHRUNK = [
    "run.threads=1",
    "train.steps=2",
    "train.warmup_steps=1",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "train.compile=false",
    "model.seq_len=32",
    "model.num_layers=2",
    "model.hidden_size=96",
    "model.vocab_size=null",
    "eval.max_samples=2",
    "metrics.tensorboard=false",
]


# What a config needs more than one of.
RANKS = {"parallel": 2}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_two_steps(
    ranks: Callable[..., list[Any]], path: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    here = [f"data.path={tiny_dataset}", f"run.dir={tmp_path / 'run'}"]
    if path.stem == "mixture":
        here += [f"data.mix.{name}.path={tiny_dataset}" for name in ("code", "prose")]
        here += ["data.stages=[{from_step: 1, seq_len: 16}, {from_step: 2, seq_len: 32}]"]
    config = load_config(path, [*SHRUNK, *here])
    if path.stem in RANKS:
        assert {one.step for one in ranks(run_training, RANKS[path.stem], config)} == {2}
    else:
        assert run_training(config).step == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_keeps_to_the_schema(path: Path) -> None:
    schema = json.loads((path.parent / "schema.json").read_text())
    for section, values in yaml.safe_load(path.read_text()).items():
        name = schema["properties"][section]["$ref"].rpartition("/")[2]
        assert values.keys() <= schema["$defs"][name]["properties"].keys()


def test_the_shipped_schema_is_current() -> None:
    """Regenerate it: scalellm schema > configs/schema.json"""
    assert (CONFIGS[0].parent / "schema.json").read_text() == json_schema()


def test_help_names_every_field_with_unit_and_default() -> None:
    text = help_text()
    assert "train.global_batch_size\n      int = 32, samples: samples of seq_len" in text
    assert "strategy.bucket_mb\n      int = 25, MiB" in text
    assert "metrics.wandb.project" in text
    for key in json.loads(json_schema())["properties"]:
        assert f"\n  {key}." in text
