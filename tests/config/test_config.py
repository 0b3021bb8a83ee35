"""Every mistake in a config is one sentence that names the key, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.config import PRESETS, BatchPlan, Config, load_config, parse_config
from scalellm.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"stepz": 3}}, "unknown key train.stepz; did you mean 'steps'"),
        ({"trian": {}}, "unknown key trian; did you mean 'train'"),
        ({"metrics": {"wandb": {"projct": "x"}}}, "metrics.wandb.projct; did you mean 'project'"),
        ({"zzz": 1}, "the top level takes run, data, model"),
        ({"train": {"steps": "abc"}}, "train.steps='abc' is not a whole number"),
        ({"train": {"steps": 3.5}}, "train.steps=3.5 steps is not a whole number"),
        ({"train": {"steps": 0}}, "train.steps=0 steps is out of range: it must be at least 1"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate=nan"),
        ({"train": {"precision": "bf61"}}, "did you mean 'bf16'"),
        ({"train": {"compile": "maybe"}}, "train.compile='maybe' is not true or false"),
        ({"train": 3}, "train is a section of keys"),
        ({"model": {"preset": "char-tny"}}, "did you mean 'char-tiny'"),
        ({"model": {"hidden_size": 64, "num_heads": 5}}, "try hidden_size=60 or 65"),
        ({"model": {"num_heads": 4, "num_kv_heads": 3}}, "try one of 1, 2, 4"),
        ({"eval": {"early_stop_patience": 2}}, "needs every_steps above 0"),
        ({"train": {"learning_rate": 1e-3, "min_learning_rate": 1e-2}}, "lower it"),
    ],
)
def test_mistake_is_one_sentence(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, source="my.yaml")
    text = str(caught.value)
    assert words in text
    assert text.startswith("my.yaml: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [", "not valid YAML"),
        ("- 1", "a config is a mapping of keys, not a list"),
        ("a: &x 1\nb: *x", "aliases"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "stands twice, on lines 1 and 2"),
        ("run: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("x: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no config file at .*; .* has there\.yaml"):
        load_config(tmp_path / "here.yaml")


def test_a_binary_file_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "x.yaml")


def test_overrides_win_in_order_and_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 5}\n")
    overrides = ["train.steps=7", "train.steps=9", "model.num_kv_heads=null", "run.dir=a=b"]
    config = load_config(path, [*overrides, "train.learning_rate=3e-4"])
    assert config.train.steps == 9
    assert config.train.learning_rate == 3e-4
    assert config.model.num_kv_heads is None
    assert config.run.dir == Path("a=b")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.steps.x=3"])
def test_bad_override(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 5}\n")
    with pytest.raises(ConfigError, match="override"):
        load_config(tmp_path / "c.yaml", [override])


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3  # type: ignore[misc]


def test_dump_and_load_are_inverse() -> None:
    config = parse_config({"model": {"preset": "llama-1b"}, "strategy": {"name": "ddp", "x": 1}})
    assert parse_config(config.model_dump(mode="json")) == config


def test_explicit_values_win_over_the_preset() -> None:
    config = parse_config({"model": {"preset": "gpt2-124m", "num_layers": 3}})
    assert config.model.num_layers == 3
    assert config.model.hidden_size == PRESETS["gpt2-124m"]["hidden_size"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset: str) -> None:
    assert parse_config({"model": {"preset": preset}}).model.preset == preset


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_batches_multiply_to_the_global_batch(micro: int, accumulation: int, world: int) -> None:
    plan = BatchPlan.of(micro * accumulation * world, micro, world)
    assert plan.micro_batch_size * plan.grad_accumulation * plan.world_size == (
        micro * accumulation * world
    )


def test_impossible_batches_name_the_nearest_possible() -> None:
    with pytest.raises(
        ConfigError, match="micro_batch_size x world_size = 4 x 4 = 16; try 16 or 32"
    ):
        BatchPlan.of(30, 4, 4)
    with pytest.raises(ConfigError, match="world_size = 3; try 30 or 33"):
        BatchPlan.of(32, None, 3)
