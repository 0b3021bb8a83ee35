"""A run over several datasets: the same loss, whole and by dataset, under every strategy."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.cli import main
from scalellm.config import load_config, parse_config
from scalellm.data import TokenDataset, shares
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.dist import World
from scalellm.errors import ConfigError, DataError
from scalellm.metrics import read_rows
from scalellm.report import draw_loss
from scalellm.strategies import DataRank
from scalellm.train import check_config, run_training
from scalellm.train.datasets import open_mixture, open_stream

Values = dict[str, Any]
WEIGHTS = {"code": 3.0, "words": 1.0}


@pytest.fixture(scope="module")
def words(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second dataset of the same tokenizer: short lines of letters, far easier to predict."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("abc def\n" * 2000)
    (folder / "more.txt").write_text("def abc\n" * 2000)
    options = PrepareOptions(
        sources=(str(folder),),
        out=folder / "data",
        tokenizer=str(tiny_dataset),
        val_fraction=0.1,
        num_workers=1,
    )
    prepare(options, progress=False)
    return folder / "data"


@pytest.fixture
def mixed(tiny_values: Values, words: Path) -> Values:
    code = tiny_values["data"].pop("path")
    tiny_values["data"]["mix"] = {
        "code": {"path": code, "weight": WEIGHTS["code"]},
        "words": {"path": str(words), "weight": WEIGHTS["words"]},
    }
    tiny_values["train"] |= {"schedule": "constant"}
    return tiny_values


def run(values: Values, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    values = copy.deepcopy(values)
    resume = changes.pop("resume", None)
    for section, change in changes.items():
        values.setdefault(section, {}).update(change)
    values["run"]["dir"] = str(run_dir)
    run_training(parse_config(values), resume)
    return list(read_rows(run_dir / "metrics.jsonl"))


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def test_the_losses_of_the_datasets_make_up_the_loss(
    mixed: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(mixed, tmp_path / "r", eval={"every_steps": 3}, metrics={"tensorboard": True})
    trained = of_kind(rows, "train")
    seen = {"code": 0, "words": 0}
    for row in trained:
        new = {name: row["tokens_by_source"][name] - seen[name] for name in seen}
        seen = row["tokens_by_source"]
        assert sum(seen.values()) == row["tokens"]
        nats = sum(row["loss_by_source"][name] * new[name] for name in new)
        assert nats / sum(new.values()) == pytest.approx(row["loss"], rel=1e-6)
        assert new["code"] == 3 * new["words"]  # of eight rows six and two
    for row in of_kind(rows, "eval"):
        assert set(row["loss_by_source"]) == {"code", "words"}
    last = of_kind(rows, "eval")[-1]["loss_by_source"]
    assert last["words"] < last["code"]
    assert f"(code {last['code']:.4f}, words {last['words']:.4f})" in capsys.readouterr().err
    assert draw_loss(tmp_path / "r") is not None


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"loss_chunk_tokens": 24}},
        {"train": {"micro_batch_size": 2}},
        {"model": {"tie_embeddings": False}},
    ],
    ids=["chunked", "accumulated", "untied"],
)
def test_however_it_is_computed(mixed: Values, tmp_path: Path, change: Values) -> None:
    untied = {"tie_embeddings": change.get("model", {}).get("tie_embeddings", True)}
    whole = of_kind(run(mixed, tmp_path / "a", model=untied), "train")
    other = of_kind(run(mixed, tmp_path / "b", **change), "train")
    for row, wanted in zip(other, whole, strict=True):
        assert row["loss_by_source"] == pytest.approx(wanted["loss_by_source"], rel=1e-5)
        assert row["tokens_by_source"] == wanted["tokens_by_source"]


STRATEGIES = [
    {"name": "ddp"},
    {"name": "fsdp"},
    {"name": "deepspeed", "stage": 2},
    {"name": "deepspeed", "stage": 3, "persistent_elements": 0},
    {"name": "accelerate"},
    {"name": "parallel", "mesh": {"tp": 2}},
    {"name": "parallel", "mesh": {"cp": 2}},
    {"name": "parallel", "mesh": {"pp": 2}},
]


@pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda s: f"{s['name']}{s.get('stage', s.get('mesh', ''))}"
)
def test_every_strategy_agrees_on_every_dataset(
    ranks: Callable[..., list[Any]], mixed: Values, tmp_path: Path, strategy: Values
) -> None:
    mixed["train"]["micro_batch_size"] = 2
    wanted = of_kind(run(mixed, tmp_path / "single"), "train")
    ranks(run, 2, {**mixed, "strategy": strategy}, tmp_path / "other")
    found = of_kind(list(read_rows(tmp_path / "other" / "metrics.jsonl")), "train")
    assert len(found) == len(wanted)
    for row, want in zip(found, wanted, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["loss_by_source"] == pytest.approx(want["loss_by_source"], rel=1e-5)
        assert row["tokens_by_source"] == want["tokens_by_source"]


def test_resumed_under_another_world_size_across_a_stage(
    ranks: Callable[..., list[Any]], mixed: Values, tmp_path: Path
) -> None:
    mixed["data"]["stages"] = [
        {"from_step": 3, "weights": {"words": 1}, "seq_len": 16},
        {"from_step": 5, "weights": {"code": 1, "words": 1}},
    ]
    mixed["strategy"] = {"name": "ddp"}
    whole = of_kind(run(mixed, tmp_path / "whole"), "train")
    assert set(whole[2]["loss_by_source"]) == {"words"}
    assert whole[2]["tokens"] - whole[1]["tokens"] == 8 * 16
    parted = tmp_path / "parted"
    ranks(run, 2, {**mixed, "train": {**mixed["train"], "steps": 4}}, parted)
    found = of_kind(run(mixed, parted, resume="auto"), "train")
    for row, want in zip(found, whole, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["tokens_by_source"] == want["tokens_by_source"]
    stored = yaml.safe_load((parted / "config.yaml").read_text())["data"]
    assert Path(stored["mix"]["words"]["path"]).is_absolute()


def test_rows_of_every_stage_must_be_divisible(mixed: Values) -> None:
    mixed["data"]["stages"] = [{"from_step": 1, "seq_len": 18}, {"from_step": 3, "seq_len": 32}]
    mixed["strategy"] = {"name": "parallel", "mesh": {"cp": 2}}
    with pytest.raises(
        ConfigError, match=r"data\.stages, from step 1: seq_len=18 tokens .* 4 chunks"
    ):
        check_config(parse_config(mixed), World(world_size=2))


def test_a_mixture_of_one(mixed: Values, tmp_path: Path) -> None:
    """It is its dataset: the same run, and nothing counted twice or as nothing."""
    del mixed["data"]["mix"]["words"]
    rows = run(mixed, tmp_path / "r")
    assert "tokens_by_source" not in of_kind(rows, "train")[-1]
    assert set(of_kind(rows, "eval")[-1]["loss_by_source"]) == {"code"}


def test_a_name_may_change(mixed: Values, tmp_path: Path) -> None:
    wanted = of_kind(run(mixed, tmp_path / "whole"), "train")[-1]["tokens_by_source"]
    run({**mixed, "train": {**mixed["train"], "steps": 3}}, tmp_path / "r")
    mixed["data"]["mix"] = {f"the_{name}": it for name, it in mixed["data"]["mix"].items()}
    found = of_kind(run(mixed, tmp_path / "r", resume="auto"), "train")[-1]["tokens_by_source"]
    assert found == {f"the_{name}": count for name, count in wanted.items()}


def test_a_run_on_one_dataset_is_not_resumed_with_stages(mixed: Values, tmp_path: Path) -> None:
    one = copy.deepcopy(mixed)
    one["data"]["path"] = one["data"].pop("mix")["code"]["path"]
    run(one, tmp_path / "r")
    mixed["train"]["steps"] = 8
    with pytest.raises(DataError, match=r"alone, without data\.mix and data\.stages; leave them"):
        run(mixed, tmp_path / "r", resume="auto")


def test_a_stage_from_the_first_step_takes_the_place_of_the_mix(mixed: Values) -> None:
    for dataset in mixed["data"]["mix"].values():
        dataset["weight"] = 0
    with pytest.raises(ConfigError, match=r"data\.mix: no weight of code, words is above 0"):
        open_mixture(parse_config(mixed))
    mixed["data"]["stages"] = [{"from_step": 1, "weights": {"words": 1}}]
    assert open_mixture(parse_config(mixed)).stages[0].units == (0, 4096)
    mixed["data"]["stages"] += [{"from_step": 2, "weights": {"code": 0}}]
    with pytest.raises(ConfigError, match=r"data\.stages\.1: no weight"):
        open_mixture(parse_config(mixed))


def test_another_mixture_is_not_resumed(mixed: Values, tmp_path: Path) -> None:
    run(mixed, tmp_path / "r")
    mixed["data"]["mix"]["words"]["weight"] = 2.0
    mixed["train"]["steps"] = 8
    with pytest.raises(DataError, match=r"was trained on another mixture than .* set data.mix"):
        run(mixed, tmp_path / "r", resume="auto")


def test_a_stage_may_make_the_first_samples_short(mixed: Values) -> None:
    mixed["data"]["stages"] = [{"from_step": 1, "seq_len": 8}, {"from_step": 4, "seq_len": 32}]
    config = parse_config(mixed)
    mixture = open_mixture(config)
    assert [(stage.start_row, stage.seq_len) for stage in mixture.stages] == [(0, 8), (24, 32)]
    assert mixture.stages[0].units == tuple(shares(WEIGHTS).values()) == (3072, 1024)
    with open_stream(config, DataRank(0, 1), mixture, None) as stream:
        lengths = [batch.tokens_BS.shape for batch, _ in itertools.islice(stream, 5)]
    assert lengths == [(8, 9)] * 3 + [(8, 33)] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mix": {}}, "data: mix names no dataset"),
        ({"mix": {"a b": {"path": "x"}}}, "'a b' is no plain name"),
        ({"mix": {"a": {"path": "x", "weight": -1}}}, r"weight=-1.* must be at least 0"),
        ({"mix": {"a": {"weight": 1}}}, "data.mix.a.path"),
        ({"stages": [{"from_step": 3}, {"from_step": 3}]}, "from_step must rise"),
        ({"stages": [{"from_step": 2, "weights": {"cod": 1}}]}, "'cod' is not in data.mix"),
        ({"stages": [{"from_step": 2, "seq_len": 999}]}, "longer than model.seq_len=32"),
        ({"stages": [{"step": 2}]}, "unknown key data.stages.0.step"),
    ],
)
def test_impossible_mixtures_are_one_sentence(mixed: Values, change: Values, words: str) -> None:
    mixed["data"] |= change
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(mixed)
    assert "\n" not in str(caught.value)


def test_a_weight_by_a_word_on_the_command_line(mixed: Values, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(mixed))
    config = load_config(file, ["data.mix.words.weight=9"])
    assert config.data.mix is not None and config.data.mix["words"].weight == 9
    assert set(config.data.paths) == {"code", "words"}
    assert TokenDataset.open(config.data.paths["words"]).num_tokens


def test_eval_of_a_run_on_a_mixture(
    mixed: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(mixed, tmp_path / "r")
    trained = of_kind(rows, "eval")[-1]
    assert main(["eval", str(tmp_path / "r"), "--json", str(tmp_path / "e.json")]) == 0
    shown = json.loads((tmp_path / "e.json").read_text())
    assert shown["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert shown["loss_by_source"] == pytest.approx(trained["loss_by_source"], rel=1e-5)
    assert "  words  " in capsys.readouterr().out
