"""`scalellm data inspect`: figures that can be checked by hand, from datasets made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import random_documents, write_documents

from scalellm.cli import main
from scalellm.data import DatasetWriter, TokenDataset
from scalellm.data.tools._stats import Lengths, next_end, previous_end, runs
from scalellm.data.tools._text import visible
from scalellm.data.tools.inspect import InspectOptions, inspect_dataset
from scalellm.errors import DataError, UserError


def figures(path: Path, **options: Any) -> dict[str, Any]:
    result: dict[str, Any] = inspect_dataset(
        InspectOptions(path, **options), progress=False
    ).figures
    return result


def document(size: int, one: int = 7) -> np.ndarray:
    return np.array([one] * (size - 1) + [0])


def test_lengths_and_bins_by_hand() -> None:
    lengths = Lengths()
    lengths.add(np.array([1, 2, 3, 3, 4, 1000]))
    lengths.add(np.array([7, 8, 1]))
    # 1 1 2 3 3 4 7 8 1000
    assert (lengths.count, lengths.longest) == (9, 1000)
    assert [lengths.quantile(share) for share in (0.1, 0.5, 0.9, 0.99)] == [1, 3, 1000, 1000]
    bins = lengths.bins()
    assert bins[:4] == [(1, 1, 2), (2, 3, 3), (4, 7, 2), (8, 15, 1)]
    assert bins[-1] == (512, 1023, 1)
    assert sum(count for _, _, count in bins) == 9


def test_numbers_of_a_split_by_hand(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "data", [document(4), document(200), document(2, 9)])
    split = figures(path)["splits"]["train"]
    assert (split["documents"], split["tokens"]) == (3, 206)
    assert (split["frames"], split["shards"]) == (4, 2)
    assert (split["text_bytes"], split["text_words"]) == (9, 6)
    assert split["bytes_per_token"] == 9 / 206
    assert split["ids_bytes"] == 412
    stored = sum(file.stat().st_size for file in path.glob("train/*.tokens.zst"))
    assert split["ratio_of_ids"] == 412 / stored
    assert split["ratio_of_text"] == 9 / stored
    assert split["lengths"]["bins"] == [
        (1, 1, 0),
        (2, 3, 1),
        (4, 7, 1),
        (8, 15, 0),
        (16, 31, 0),
        (32, 63, 0),
        (64, 127, 0),
        (128, 255, 1),
    ]
    vocabulary = split["vocabulary"]
    assert vocabulary["top"] == [[7, "id 7", 202], [0, "id 0", 3], [9, "id 9", 1]]
    assert (vocabulary["used"], vocabulary["unused"]) == (3, 997)
    assert vocabulary["unused_first"][:3] == [[1, "id 1"], [2, "id 2"], [3, "id 3"]]
    assert vocabulary["unknown_share"] is None
    [sample] = split["samples"]
    assert (sample["first_token"], sample["tokens"]) == (4, 200)
    assert sample["text"].startswith("7 7 7 7")


def test_a_sample_of_frames_is_spread_and_fair_to_long_documents(tmp_path: Path) -> None:
    # One document of 6,400 tokens among 100 of 64: it ends in one frame of 200, as each of them.
    documents = [*(document(64) for _ in range(50)), document(6_400)]
    documents += [document(64) for _ in range(50)]
    path = write_documents(tmp_path / "data", documents)
    dataset = TokenDataset.open(path)
    assert list(runs(dataset, None)) == [(0, dataset.num_tokens)]
    ranges = list(runs(dataset, 640))
    assert len(ranges) == 10
    assert np.diff([start for start, _ in ranges]).tolist() == [20 * 64] * 9
    whole = figures(path)["splits"]["train"]
    assert whole["tokens_read"] == dataset.num_tokens
    every_second = figures(path, max_tokens=6_400)["splits"]["train"]
    assert every_second["tokens_read"] == 6_400
    assert every_second["lengths"]["documents"] in (50, 51)
    assert every_second["lengths"]["longest"] in (64, 6_400)
    all_but_one = figures(path, max_tokens=199 * 64)["splits"]["train"]
    assert all_but_one["lengths"]["longest"] == 6_400
    assert "what follows is of 6,400 tokens, 50.0% of the split" in str(
        inspect_dataset(InspectOptions(path, max_tokens=6_400), progress=False)
    )


def test_the_ends_around_every_position(tmp_path: Path) -> None:
    documents = random_documents(1_000)
    dataset = TokenDataset.open(write_documents(tmp_path / "data", documents))
    ends = np.cumsum([len(one) for one in documents])
    for position in range(0, 1_000, 7):
        assert previous_end(dataset, position) == max([0, *ends[ends <= position].tolist()])
        assert next_end(dataset, position) == min(ends[ends > position].tolist())


def test_a_real_dataset(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_dataset.parent / "figures.json"
    assert main(["data", "inspect", str(tiny_dataset), "--sample", "2", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "char tokenizer, vocabulary of" in text
    assert "validation: " in text
    assert "tokenizer: char" in text  # what prepare says of it
    fields = json.loads(file.read_text())
    assert fields["splits"]["train"]["documents"] == TokenDataset.open(tiny_dataset).num_documents
    assert fields["splits"]["train"]["vocabulary"]["unknown_share"] == 0
    sample = fields["splits"]["train"]["samples"][0]["text"]
    assert len(sample) <= 400 + len("…") + sample.count("\\")
    assert "\\n" in sample
    assert "\n" not in sample
    assert "' '" in text  # the piece of a space among the most frequent
    file.unlink()


def test_one_split_only(tiny_dataset: Path) -> None:
    assert list(figures(tiny_dataset, split="validation")["splits"]) == ["validation"]
    with pytest.raises(DataError, match=r"has no split 'valdation'.*did you mean 'validation'"):
        figures(tiny_dataset, split="valdation")


def test_what_the_maker_says_is_shown_whatever_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 50, "eos_id": 0, "tokenizer_kind": "none"}
    with DatasetWriter(tmp_path / "data", tokenizer_file=None, **options) as writer:
        writer.add("train", document(5))
        writer.finish(
            {
                "dropped": {"empty": 1200},
                "cleaning": {"repetition": {"documents": 3}, "none": {}},
                "dedup": [{"pairs": 7}, {"pairs": 8}],
                "notes": ["one\nnote", "two"],
            }
        )
    lines = str(inspect_dataset(InspectOptions(tmp_path / "data"), progress=False)).splitlines()
    said = lines[lines.index("what its maker says of it") + 1 :]
    assert said == [
        "  cleaning:",
        "    repetition:",
        "      documents: 3",
        "  dedup 1 of 2:",
        "    pairs: 7",
        "  dedup 2 of 2:",
        "    pairs: 8",
        "  dropped:",
        "    empty: 1,200",
        "  notes: one\\nnote, two",
    ]
    assert "  text: unknown, the ids came without their text" in lines


def test_a_very_large_vocabulary_is_not_counted(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "data", [document(5)], vocab_size=1 << 31)
    assert figures(path)["splits"]["train"]["vocabulary"] is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\r\n", "a\\tb\\r\\n"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("\u202eevil\u2028\ufeff", "\\u202eevil\\u2028\\ufeff"),
        ("汉字 é", "汉字 é"),
        ("x" * 9, "xxxxx…"),
    ],
)
def test_control_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text, 5 if text.startswith("xx") else 80) == shown


def test_what_cannot_be_asked_for(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--sample=-1 documents must be 0 or more"):
        figures(tiny_dataset, samples=-1)
    with pytest.raises(UserError, match="--max-tokens=0 tokens must be 1 or more"):
        figures(tiny_dataset, max_tokens=0)
    assert main(["data", "inspect", str(tiny_dataset / "nowhere")]) == 2
    assert "holds no dataset" in capsys.readouterr().err
    assert main(["data"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {word} " in listed for word in ("inspect", "verify", "diff", "convert"))
    assert main(["data", "inspct"]) == 2
    assert "did you mean 'inspect'" in capsys.readouterr().err
