"""The report of cleaning: counts, examples without persons' data, parts that add up."""

from __future__ import annotations

import json

import pytest

from scalellm.data.clean import Cleaner, CleanOptions, CleanReport

CLEANER = Cleaner(
    CleanOptions.model_validate(
        {
            "encoding": {"enabled": True},
            "html": {"enabled": True},
            "length": {"enabled": True, "min_words": 4},
            "pii": {"enabled": True},
        }
    )
)
TEXTS = [
    "A text that stays as it is.",
    "Too short.",
    "Please write to anna.smith@mail.org about the book.",
    "<p>A short page of <b>markup</b> with bob@mail.org in it.</p>",
    "tiny jane.doe@mail.org",
    "Der FrÃ¼hling ist da und die Sonne scheint.",
    "no 4111-1111-1111-1111",
    "one more +49 30 901820",
]


def report_of(texts: list[str], first: int = 0) -> CleanReport:
    report = CleanReport()
    for index, text in enumerate(texts, first):
        report.add(f"books.txt:{index}", text, CLEANER.clean(text))
    return report


def test_counts() -> None:
    found = report_of(TEXTS).to_dict()
    assert (found["documents"], found["kept"]) == (8, 5)
    assert found["characters"] == sum(map(len, TEXTS))
    assert list(found["stages"]) == ["encoding", "html", "length", "pii"]
    assert found["stages"]["length"]["removed"] == {"too few words": 3}
    assert found["stages"]["pii"]["changed"] == 3
    assert found["stages"]["pii"]["changes"] == {"email": 2, "phone": 1}
    assert found["stages"]["html"]["changes"] == {"stripped": 1}
    taken = sum(stage["characters"] for stage in found["stages"].values())
    assert found["characters"] - taken == found["characters_kept"]


def test_examples_name_their_origin_and_hide_persons() -> None:
    found = report_of(TEXTS * 3).to_dict()
    length = found["stages"]["length"]["examples"]
    assert [example["origin"] for example in length] == [
        "books.txt:1",
        "books.txt:4",
        "books.txt:6",
    ]
    assert length[0]["reason"] == "has 2 words, the least is 4"
    assert length[1]["text"] == "tiny <EMAIL>"
    assert length[2]["text"] == "no ###"
    assert "<EMAIL>" in found["stages"]["pii"]["examples"][0]["text"]
    everything = json.dumps(found) + "".join(report_of(TEXTS).lines())
    for secret in ("anna", "bob@", "jane", "4111", "901820"):
        assert secret not in everything
    assert "FrÃ¼hling" in found["stages"]["encoding"]["examples"][0]["text"]


@pytest.mark.parametrize("left", ["", "x" * 150, "word " * 40, "y" * 700])
@pytest.mark.parametrize("right", ["", "z" * 900, " word" * 200])
def test_an_example_never_shows_half_an_address(left: str, right: str) -> None:
    text = f"{left} somebody.private@mail.org{right}"
    cleaner = Cleaner(CleanOptions.model_validate({"length": {"enabled": True, "min_words": 999}}))
    example = cleaner.clean(text).examples["length"]
    assert "mail.org" not in example
    assert "private@" not in example
    assert len(example) <= 160
    assert "\n" not in example


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_parts_in_order_give_the_whole(workers: int) -> None:
    texts = TEXTS * 2
    whole = report_of(texts)
    size = -(-len(texts) // workers)
    merged = CleanReport()
    for start in range(0, len(texts), size):
        merged.merge(report_of(texts[start : start + size], start))
    assert json.dumps(merged.to_dict()) == json.dumps(whole.to_dict())
    assert merged.lines() == whole.lines()


def test_table() -> None:
    lines = report_of(TEXTS).lines()
    assert lines[0].startswith("cleaning kept 5 of 8 documents (62.5%) and")
    assert lines[1].split() == ["stage", "removed", "changed", "characters", "what"]
    assert lines[4].split()[:3] == ["length", "3", "0"]
    assert "too few words 3" in lines[4]
    assert "email 2, phone 1" in lines[5]
    assert CleanReport().lines() == ["cleaning: no documents"]
    untouched = report_of([TEXTS[0]])
    assert len(untouched.lines()) == 1
