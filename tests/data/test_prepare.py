"""Text in, dataset out: whole or not at all, the same bytes with any number of workers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scalellm.data.prepare import PrepareOptions, PrepareReport, prepare
from scalellm.data.reader import TokenDataset
from scalellm.data.tokenizer import load_tokenizer
from scalellm.errors import DataError, UserError

LIBRARY = Path(os.__file__).parent
MODULES = ("abc", "argparse", "ast", "bisect", "code", "heapq", "inspect", "json/decoder", "queue")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real Python files, about 350 kB."""
    folder = tmp_path_factory.mktemp("code")
    for name in MODULES:
        text = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name.replace('/', '-')}.py").write_text(text, encoding="utf-8")
    return folder


def run(source: Path | str, out: Path, **options: object) -> PrepareReport:
    defaults: dict[str, object] = {"vocab_size": 512, "num_workers": 1}
    chosen = PrepareOptions((str(source),), out, **(defaults | options))  # type: ignore[arg-type]
    return prepare(chosen, progress=False)


def documents(path: Path, split: str = "train") -> list[str]:
    """The texts of a split, decoded by the dataset's own tokenizer."""
    dataset = TokenDataset.open(path, split)
    assert dataset.tokenizer_path is not None
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    ids = dataset.read(0, dataset.num_tokens)
    ends = dataset.document_ends(0, dataset.num_tokens)
    assert (ids[ends - 1] == dataset.eos_id).all()
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_the_text_comes_back_from_the_dataset(code: Path, tmp_path: Path, kind: str) -> None:
    report = run(code, tmp_path / "out", tokenizer=kind, val_fraction=0.3)
    train, validation = (documents(tmp_path / "out", split) for split in ("train", "validation"))
    originals = sorted(path.read_text(encoding="utf-8") for path in code.iterdir())
    assert train and validation
    # The alphabet is that of the train documents; François has a letter of his own.
    known = set("".join(train)) if kind == "char" else set("".join(originals))
    expected = ["".join(c if c in known else "\ufffd" for c in text) for text in originals]
    assert sorted(train + validation) == sorted(expected)
    assert report.unknown_tokens == "".join(expected).count("\ufffd")
    assert report.tokenizer_kind == kind
    texts_of = dict(zip(expected, originals, strict=True))
    for split, texts in (("train", train), ("validation", validation)):
        texts = [texts_of[text] for text in texts]
        dataset = TokenDataset.open(tmp_path / "out", split)
        assert dataset.num_bytes_text == sum(len(text.encode()) for text in texts)
        assert dataset.num_words_text == sum(len(text.split()) for text in texts)
        numbers = report.splits[split]
        assert numbers.tokens == report.tokens[split] == dataset.num_tokens
        assert numbers.documents == dataset.num_documents == len(texts)
        assert numbers.text_bytes == dataset.num_bytes_text
        assert numbers.text_words == dataset.num_words_text
    assert report.encodings == {"utf-8": len(MODULES)}


def test_any_number_of_workers_gives_the_same_bytes(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, so that every worker has several and they can finish out of order.
    monkeypatch.setattr("scalellm.data.encode_job.BATCH_CHARS", 5_000)
    expected = None
    for workers in (1, 2, 3):
        run(code, tmp_path / f"out{workers}", val_fraction=0.2, num_workers=workers)
        found = contents(tmp_path / f"out{workers}")
        assert found == (expected or found)
        expected = found


def test_the_tokenizer_learns_from_train_documents_only(code: Path, tmp_path: Path) -> None:
    run(code, tmp_path / "first", val_fraction=0.3)
    train = tmp_path / "train"
    train.mkdir()
    for number, text in enumerate(documents(tmp_path / "first")):
        (train / f"{number}.txt").write_text(text, encoding="utf-8")
    run(train, tmp_path / "second", val_fraction=0)
    first, second = ((tmp_path / n / "tokenizer.model").read_bytes() for n in ("first", "second"))
    assert first == second


def test_gbk_chinese_prepares_with_characters(tmp_path: Path) -> None:
    source = tmp_path / "chinese"
    source.mkdir()
    texts = [
        "语言是人类最重要的交际工具。人们利用语言来交流思想。表达感情。\n",
        "今天天气很好。我们去公园散步。\n孩子们在草地上玩得很开心。\n",
        "他每天早上六点起床。先喝一杯水。然后去上班。\n",
    ]
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_bytes(text.encode("gbk"))
    report = run(source, tmp_path / "out", tokenizer="char")
    found = documents(tmp_path / "out") + documents(tmp_path / "out", "validation")
    known = [text for text in found if "\ufffd" not in text]
    # Characters that only the validation document has are unknown to the tokenizer.
    assert len(known) == 2 and set(known) < set(texts)
    assert report.encodings == {"gb18030": 3}
    assert report.unknown_tokens > 0
    assert any("tokens stand for characters" in note for note in report.notes)


def test_one_big_text_file_gives_both_splits(tmp_path: Path) -> None:
    text = "".join((LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    run(tmp_path / "one.txt", tmp_path / "out", val_fraction=0.05)
    (train,), (validation,) = documents(tmp_path / "out"), documents(tmp_path / "out", "validation")
    assert train + validation == text
    assert 0.03 < len(validation) / len(text) < 0.08


def test_validation_can_be_given(code: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("Held out text.\n")
    held = (str(tmp_path / "held.txt"),)
    report = run(code, tmp_path / "out", validation_sources=held)
    assert documents(tmp_path / "out", "validation") == ["Held out text.\n"]
    assert report.splits["train"].documents == len(MODULES)


def test_filters_are_counted(tmp_path: Path) -> None:
    records = ["long enough", "  short  ", "", "\ud800 half a pair", "also long enough", None]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in records)
    (tmp_path / "data.jsonl").write_text(lines)
    report = run(
        tmp_path / "data.jsonl", tmp_path / "out", min_chars=6, tokenizer="char", val_fraction=0
    )
    assert report.documents == 2
    assert report.dropped == {
        "shorter than 6 characters": 2,
        "not valid Unicode": 1,
        "no text": 1,
    }
    assert TokenDataset.open(tmp_path / "out").manifest.extra["dropped"] == report.dropped


def test_a_tokenizer_file_is_used_and_copied(code: Path, tmp_path: Path) -> None:
    run(code, tmp_path / "first")
    model = tmp_path / "first" / "tokenizer.model"
    for number, tokenizer in enumerate((model, tmp_path / "first")):
        out = tmp_path / f"out{number}"
        run(code / "abc.py", out, tokenizer=str(tokenizer))
        assert (out / "tokenizer.model").read_bytes() == model.read_bytes()
        found = documents(out) + documents(out, "validation")
        assert "".join(found) == (code / "abc.py").read_text(encoding="utf-8")


def test_a_small_text_lowers_the_vocabulary_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a few words\nand no more\n")
    report = run(tmp_path / "few.txt", tmp_path / "out", vocab_size=8192)
    assert report.vocab_size < 400
    assert any(f"only {report.vocab_size} pieces" in note for note in report.notes)


def test_the_report_reads_well(code: Path, tmp_path: Path) -> None:
    report = run(code, tmp_path / "out", val_fraction=0.3)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"prepared {tmp_path / 'out'} in ")
    assert lines[0].endswith(
        f"{report.documents_per_s:,.0f} documents/s, {report.mb_per_s:,.1f} MB/s"
    )
    assert f"{report.tokens['train']:,}" in lines[1]
    assert lines[2].split()[0] == "validation"
    assert f"encodings: utf-8 {len(MODULES)}" in lines[3]


# The same command again.


def test_the_same_again_is_done_already(code: Path, tmp_path: Path) -> None:
    first = run(code, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = run(code, tmp_path / "out", num_workers=2)
    assert not first.reused and again.reused
    assert "already prepared" in str(again)
    assert (again.splits, again.vocab_size) == (first.splits, first.vocab_size)
    assert contents(tmp_path / "out") == before


def test_other_options_or_sources_are_not_mixed_up(code: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    options = {"tokenizer": "char", "val_fraction": 0.0}
    (source / "a.txt").write_text("some text\n" * 100)
    run(source, tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"min_chars=1 there, 5 now\); replace it with --overwrite"):
        run(source, tmp_path / "out", **options, min_chars=5)
    (source / "b.txt").write_text("new text\n" * 100)
    with pytest.raises(DataError, match=r"prepared before its sources changed; .*--overwrite"):
        run(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before
    report = run(source, tmp_path / "out", **options, overwrite=True)
    assert not report.reused and report.documents == 2


def test_what_is_there_is_never_destroyed(code: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is taken and holds no dataset"):
        run(code, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


# Mistakes leave nothing behind.


def test_a_binary_file_leaves_nothing(code: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.txt").write_text("good text " * 100)
    (source / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    run(code, tmp_path / "tokenizer", tokenizer="char")
    for tokenizer in ("char", str(tmp_path / "tokenizer")):
        with pytest.raises(UserError, match=r"picture\.txt is not a text file"):
            run(source, tmp_path / "out", tokenizer=tokenizer)
        assert nothing_left(tmp_path)


def test_an_empty_corpus_leaves_nothing(code: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    run(code, tmp_path / "tokenizer", tokenizer="char")
    for tokenizer in ("char", str(tmp_path / "tokenizer")):
        with pytest.raises(DataError, match=r"no text to train on in .*empty 1"):
            run(tmp_path / "empty.txt", tmp_path / "out", tokenizer=tokenizer)
        assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction=1\.0 is out of range; it must be in \[0, 1\)"),
        ({"min_chars": -1}, "min_chars=-1 .* 0 or more characters"),
        ({"num_workers": -2}, "num_workers=-2 .* 0 .all cores. or more"),
        ({"limit_bytes": 0}, "limit_bytes=0 .* 1 byte or more"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"encoding": "klingon"}, "unknown text encoding 'klingon'"),
        ({"tokenizer": "unigrm"}, "unknown tokenizer 'unigrm'.*did you mean 'unigram'"),
        ({"tokenizer": "no/such.model"}, r"there is no tokenizer file no/such\.model"),
        ({"vocab_size": 12}, "vocab_size=12 is too small for bpe"),
    ],
)
def test_wrong_options(
    code: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(code, tmp_path / "out", **options)
    assert nothing_left(tmp_path)


def test_a_place_that_cannot_be_written_fails_before_the_work(code: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is no folder that can be written"):
        run(code, tmp_path / "file" / "out")


def test_options_are_frozen_and_know_files() -> None:
    options = PrepareOptions(("stdlib",), Path("out"))
    assert options.trains_tokenizer
    assert not replace(options, tokenizer="some/tokenizer.json").trains_tokenizer
