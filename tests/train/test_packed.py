"""Training on packed rows: padding never counts, at any world size, and resuming is exact."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.data import TokenDataset, TokenStream
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.errors import DataError
from scalellm.metrics import read_rows
from scalellm.train import run_training

Values = dict[str, Any]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Lines of very different lengths, in rows of 32 characters."""
    folder = tmp_path_factory.mktemp("packed")
    lines = ["x" * (3 + 7 * n % 29) + f" = {n}" for n in range(900)]
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    options = PrepareOptions(
        sources=(str(folder),),
        out=folder / "data",
        tokenizer=str(tiny_dataset),
        val_fraction=0.1,
        num_workers=1,
        pack=32,
    )
    report = prepare(options, progress=False)
    assert report.packing is not None and report.packing["padding_tokens"] > 0
    return folder / "data"


@pytest.fixture
def values(tiny_values: Values, packed: Path) -> Values:
    tiny_values["data"] |= {"path": str(packed), "document_mask": True}
    tiny_values["train"] |= {"schedule": "constant"}
    return tiny_values


def run(values: Values, run_dir: Path, resume: str | None = None) -> list[dict[str, Any]]:
    values = copy.deepcopy(values)
    values["run"]["dir"] = str(run_dir)
    run_training(parse_config(values), resume)
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]


def test_the_tokens_counted_are_those_of_the_documents(values: Values, tmp_path: Path) -> None:
    rows = run(values, tmp_path / "r")
    dataset = TokenDataset.open(values["data"]["path"])
    with TokenStream(dataset, seq_len=32, global_batch_size=8) as stream:
        counted = [int(batch.num_targets_B.sum()) for batch, _ in itertools.islice(stream, 6)]
    assert [row["tokens"] for row in rows] == list(itertools.accumulate(counted))
    assert max(counted) < 8 * 32


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "ddp"},
        {"name": "deepspeed", "stage": 2},
        {"name": "parallel", "mesh": {"tp": 2}},
        {"name": "parallel", "mesh": {"pp": 2}},
        {"name": "parallel", "mesh": {"cp": 2}},
        {"name": "parallel", "mesh": {"cp": 2}, "context": "ulysses"},
    ],
    ids=str,
)
def test_ranks_with_unequal_padding_find_the_same_loss(
    ranks: Callable[..., list[Any]], values: Values, tmp_path: Path, strategy: Values
) -> None:
    wanted = run(values, tmp_path / "single")
    values["train"]["micro_batch_size"] = 2
    ranks(run, 2, {**values, "strategy": strategy}, tmp_path / "two")
    found = [r for r in read_rows(tmp_path / "two" / "metrics.jsonl") if r["kind"] == "train"]
    for row, want in zip(found, wanted, strict=True):
        assert row["tokens"] == want["tokens"]
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_resumed_in_another_world(
    ranks: Callable[..., list[Any]], values: Values, tmp_path: Path
) -> None:
    values["strategy"] = {"name": "ddp"}
    wanted = run(values, tmp_path / "whole")
    short = {**values, "train": {**values["train"], "steps": 3}}
    ranks(run, 2, short, tmp_path / "parted")
    found = run(values, tmp_path / "parted", "auto")
    for row, want in zip(found, wanted, strict=True):
        assert row["tokens"] == want["tokens"]
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_a_packed_and_a_plain_dataset_can_be_mixed(
    ranks: Callable[..., list[Any]], values: Values, tiny_dataset: Path, tmp_path: Path
) -> None:
    path = values["data"].pop("path")
    values["data"]["mix"] = {"packed": {"path": path}, "plain": {"path": str(tiny_dataset)}}
    wanted = run(values, tmp_path / "single")
    ranks(run, 2, {**values, "strategy": {"name": "ddp"}}, tmp_path / "two")
    found = [r for r in read_rows(tmp_path / "two" / "metrics.jsonl") if r["kind"] == "train"]
    for row, want in zip(found, wanted, strict=True):
        assert row["tokens_by_source"] == want["tokens_by_source"]
        assert row["loss_by_source"] == pytest.approx(want["loss_by_source"], rel=1e-5)
        assert sum(row["tokens_by_source"].values()) == row["tokens"]
    plain = wanted[-1]["tokens_by_source"]["plain"]
    assert plain == 6 * 4 * 32 > wanted[-1]["tokens_by_source"]["packed"]


def test_the_packed_split_can_be_evaluated(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(values, tmp_path / "r")
    assert main(["eval", str(tmp_path / "r"), "--split", "train"]) == 0
    dataset = TokenDataset.open(values["data"]["path"])
    with TokenStream(
        dataset, seq_len=32, global_batch_size=1, shuffle=False, decode_threads=0
    ) as stream:
        rows = dataset.num_tokens // 32
        targets = sum(int(b.num_targets_B[0]) for b, _ in itertools.islice(stream, rows))
    shown = capsys.readouterr().out
    assert f"{targets:,} tokens" in shown
    # The first token of a row is not predicted, so nats and bytes are not of the same text.
    assert "bits per byte" not in shown


def test_rows_without_a_target_are_no_end(values: Values, tmp_path: Path) -> None:
    """A text of two characters in rows of two tokens: a row may hold one token alone."""
    source = tmp_path / "two.txt"
    source.write_text("ab")
    options = PrepareOptions(
        (str(source),), tmp_path / "d", tokenizer="char", val_fraction=0, num_workers=1, pack=2
    )
    prepare(options, progress=False)
    values["data"] |= {"path": str(tmp_path / "d")}
    values["model"]["seq_len"] = 2
    values["train"]["global_batch_size"] = 1
    rows = run(values, tmp_path / "r")
    assert min(row["loss"] for row in rows) == 0 and rows[-1]["tokens"] < 6


def test_another_row_length_is_refused_before_anything_is_built(
    values: Values, tmp_path: Path
) -> None:
    values["model"]["seq_len"] = 16
    with pytest.raises(DataError, match=r"packed into rows of 32 tokens.*set model.seq_len=32"):
        run(values, tmp_path / "r")
    assert not (tmp_path / "r").exists()
