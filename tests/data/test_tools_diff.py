"""`scalellm data diff`: the same, another order, other documents, another meaning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import random_documents, write_documents

from scalellm.cli import main
from scalellm.data import DatasetWriter, TokenDataset
from scalellm.data.tools import _stats
from scalellm.data.tools.diff import Difference, diff_datasets, document_hashes

DOCUMENTS = random_documents(2_000)


def diff(a: Path, b: Path) -> Difference:
    return diff_datasets(a, b, progress=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("diff") / "a", DOCUMENTS)


def other(tmp_path: Path, documents: list[np.ndarray], **options: Any) -> Path:
    return write_documents(tmp_path / "b", documents, **options)


def test_the_same_dataset(first: Path, tmp_path: Path) -> None:
    result = diff(first, other(tmp_path, DOCUMENTS))
    assert (result.differences, result.notes) == ((), ())


@pytest.mark.parametrize("options", [{"frame_tokens": 50}, {"shard_frames": 2}, {"level": 9}])
def test_other_storage_is_no_difference(
    first: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = diff(first, other(tmp_path, DOCUMENTS, **options))
    assert result.same
    assert result.notes == (("frame_tokens: 64 and 50",) if "frame_tokens" in options else ())


@pytest.mark.parametrize("run_tokens", [64, 1 << 20])
def test_the_first_changed_id_is_shown(
    first: Path, tmp_path: Path, run_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stats, "_RUN_TOKENS", run_tokens)
    documents = [one.copy() for one in DOCUMENTS]
    place = next(n for n, one in enumerate(documents) if n > 30 and len(one) > 40)
    documents[place][33] = 998 if documents[place][33] == 997 else 997
    result = diff(first, other(tmp_path, documents))
    said, ours, theirs = result.differences
    assert said == (
        f"train: 1 documents only in {first}, 1 only in {tmp_path / 'b'}; the first that differs "
        f"is document {place}"
    )
    shown = " ".join(map(str, DOCUMENTS[place][21:45].tolist()))
    assert ours == f"  {first}: from its token 21: {shown}"
    shown = " ".join(map(str, documents[place][21:45].tolist()))
    assert theirs == f"  {tmp_path / 'b'}: from its token 21: {shown}"


def test_only_the_order(first: Path, tmp_path: Path) -> None:
    documents = [*DOCUMENTS[:5], DOCUMENTS[6], DOCUMENTS[5], *DOCUMENTS[7:]]
    said, *_ = diff(first, other(tmp_path, documents)).differences
    assert said == "train: the same documents in another order, from document 5 on"


def test_only_the_bounds(first: Path, tmp_path: Path) -> None:
    # The same ids: an end of text inside a document of the other.
    documents = [np.concatenate(DOCUMENTS[:2]), *DOCUMENTS[2:]]
    lines = diff(first, other(tmp_path, documents)).differences
    assert lines[0] == f"train: num_documents: {len(DOCUMENTS)} and {len(DOCUMENTS) - 1}"
    assert "2 documents only in" in lines[1]


def test_one_is_the_beginning_of_the_other(first: Path, tmp_path: Path) -> None:
    documents = DOCUMENTS[:-3]
    lines = diff(first, other(tmp_path, documents)).differences
    assert "3 documents only in" in lines[2]
    assert f", 0 only in {tmp_path / 'b'}; the first that differs is document" in lines[2]
    assert lines[-1] == f"  {tmp_path / 'b'}: has no document {len(documents)}"


def test_counts_of_repeated_documents_against_a_counter(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sides = [
        [np.array([int(one), 0]) for one in generator.integers(1, 40, size)] for size in (300, 200)
    ]
    paths = [write_documents(tmp_path / str(n), side) for n, side in enumerate(sides)]
    counts = [Counter(int(one[0]) for one in side) for side in sides]
    only = [(counts[0] - counts[1]).total(), (counts[1] - counts[0]).total()]
    line = next(line for line in diff(*paths).differences if "only in" in line)
    assert line.startswith(f"train: {only[0]} documents only in {paths[0]}, {only[1]} only in ")


def test_hashes_do_not_depend_on_how_ids_are_stored(tmp_path: Path) -> None:
    documents = [np.array([one, one + 1, 0]) for one in range(1, 100)]
    hashes = [
        document_hashes(TokenDataset.open(path), lambda count: None)
        for path in (
            write_documents(tmp_path / "a", documents),
            write_documents(tmp_path / "b", documents, vocab_size=1 << 17, frame_tokens=7),
        )
    ]
    assert (hashes[0] == hashes[1]).all()
    assert len(set(hashes[0].tolist())) == len(documents)


def test_another_meaning_and_other_splits(tmp_path: Path) -> None:
    for name, size, splits in (("a", 100, ("train", "test")), ("b", 101, ("train",))):
        with DatasetWriter(
            tmp_path / name,
            vocab_size=size,
            eos_id=0,
            tokenizer_file=None,
            tokenizer_kind="none",
        ) as writer:
            for split in splits:
                writer.add(split, np.array([1, 2, 0]))
            writer.finish({"made_from": {"seed": size, "sources": ["x"]}, "notes": []})
    result = diff(tmp_path / "a", tmp_path / "b")
    assert result.differences == (
        "vocab_size: 100 and 101",
        f"split test is only in {tmp_path / 'a'}",
    )
    assert result.notes == ("made_from.seed: 100 and 101",)


def test_another_tokenizer(tiny_dataset: Path, first: Path) -> None:
    lines = diff(tiny_dataset, first).differences
    assert any(line.startswith("tokenizer: char ") and line.endswith("none none") for line in lines)
    # The context of the side that has a tokenizer is text.
    [shown] = [line for line in lines if line.startswith(f"  {tiny_dataset}")]
    assert shown.split(": ", 2)[2][0] in "\"#'if"


def test_exit_codes(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = other(tmp_path, DOCUMENTS)
    assert main(["data", "diff", str(first), str(same)]) == 0
    assert "hold the same documents in the same order" in capsys.readouterr().out
    different = write_documents(tmp_path / "c", DOCUMENTS[1:])
    assert main(["data", "diff", str(first), str(different)]) == 1
    assert "documents only in" in capsys.readouterr().out
    assert main(["data", "diff", str(first), str(tmp_path / "nowhere")]) == 2
    assert "holds no dataset" in capsys.readouterr().err
