"""Cleaning and deduplication inside `prepare`: what stays, what is told, and what a kill leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main
from scalellm.data import DatasetWriter, TokenDataset, refine, spool
from scalellm.data import prepare as prepare_module
from scalellm.data.clean import load_clean_options
from scalellm.data.dedup import Deduplicator, DedupOptions
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.data.refine_options import refine_options
from scalellm.data.staging import StagedDirectory
from scalellm.data.tokenizer import load_tokenizer
from scalellm.errors import ConfigError, DataError, UserError

WORDS = (
    "river mountain letter window orange paper travel winter silent garden machine bridge copper "
    "morning village summer captain history island market doctor number forest kitchen metal "
    "engine planet shadow student teacher voice water yellow animal bottle circle dinner evening"
)
SMALL = ("the", "of", "and", "to", "with", "that", "have", "be", "in", "from")


def essay(seed: int, sentences: int = 30) -> str:
    """Sentences that no other seed has."""
    generator = random.Random(seed)
    lines = []
    for _ in range(sentences):
        size = generator.randint(4, 8)
        words = [generator.choice(part) for _ in range(size) for part in (WORDS.split(), SMALL)]
        lines.append(" ".join([*words, generator.choice(WORDS.split())]).capitalize() + ".")
    return "\n".join(lines)


def near(text: str) -> str:
    """The same essay with two of thirty sentences rewritten."""
    lines = text.split("\n")
    lines[3] = "Something else stands here now that was never there."
    lines[20] = "And once more the writer has thought better of it all."
    return "\n".join(lines)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Essays, copies and near copies, a page of HTML, an address, a line that is too short."""
    folder = tmp_path_factory.mktemp("source")
    texts = [essay(seed) for seed in range(120)]
    texts += [texts[3], texts[4] + "\n\n", near(texts[5]), near(texts[6])]
    page = "<html><head><script>var x = 1;</script></head><body><p>" + essay(900) + "</p></body>"
    texts += [page, essay(901) + "\nWrite to jane.roe@example.org for more of it."]
    texts += ["Too short."]
    with (folder / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder


@pytest.fixture
def options(source: Path, tmp_path: Path) -> PrepareOptions:
    return PrepareOptions(
        sources=(str(source),),
        out=tmp_path / "out",
        tokenizer="char",
        val_fraction=0.1,
        num_workers=1,
        clean=load_clean_options("web"),
        dedup=DedupOptions(),
    )


def texts_of(out: Path) -> list[str]:
    tokenizer = load_tokenizer(out)
    found = []
    for split in ("train", "validation"):
        dataset = TokenDataset.open(out, split)
        ends = dataset.document_ends(0, dataset.num_tokens).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            found.append(tokenizer.decode(dataset.read(start, end - 1).tolist()))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def test_what_is_cleaned_and_what_is_removed(options: PrepareOptions) -> None:
    report = prepare(options, progress=False)
    texts = texts_of(options.out)
    whole = "\n".join(texts)
    assert report.documents == len(texts) == 122
    assert "<p>" not in whole and "var x" not in whole
    assert "jane.roe" not in whole and "<EMAIL>" in whole
    assert "Too short." not in whole
    assert texts.count(essay(3)) == 1 and texts.count(essay(5)) == 1 and near(essay(5)) not in texts
    assert report.deduplication is not None and report.cleaning is not None
    assert (report.deduplication["exact"], report.deduplication["near"]) == (2, 2)
    removed = {example["removed"].rsplit(":", 1)[1] for example in report.deduplication["examples"]}
    assert removed == {"121", "122", "123"}  # the first three of the four
    assert report.cleaning["documents"] == 127 and report.cleaning["kept"] == 126
    shown = str(report)
    assert "duplicates removed: 2 exact and 2 near, of 126 documents" in shown
    assert "cleaning kept 126 of 127 documents" in shown
    extra = TokenDataset.open(options.out).manifest.extra
    assert extra["cleaning"]["stages"]["pii"]["changes"] == {"email": 1}
    assert extra["deduplication"]["exact"] == 2
    assert "jane.roe" not in json.dumps(extra)
    assert beside(options.out) == []


def test_the_same_bytes_with_any_number_of_workers(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "_BATCH_CHARS", 5_000)
    prepare(options, progress=False)
    two = replace(options, out=tmp_path / "two", num_workers=2)
    prepare(two, progress=False)
    assert files_of(options.out) == files_of(two.out)
    assert prepare(replace(options, num_workers=3), progress=False).reused


def test_other_options_are_another_dataset(options: PrepareOptions) -> None:
    prepare(options, progress=False)
    for change in ({"clean": None}, {"dedup": None}, {"dedup": DedupOptions(threshold=0.9)}):
        with pytest.raises(DataError, match="was prepared with other options"):
            prepare(replace(options, **change), progress=False)
    with pytest.raises(DataError, match=r"\(dedup.threshold=0.72 there, 0.9 now\)"):
        prepare(replace(options, dedup=DedupOptions(threshold=0.9)), progress=False)
    more_memory = DedupOptions(memory_bytes=1 << 28)
    assert prepare(replace(options, dedup=more_memory), progress=False).reused
    plain = replace(options, clean=None, dedup=None, overwrite=True)
    prepare(plain, progress=False)
    with pytest.raises(DataError, match="was prepared with other options"):
        prepare(options, progress=False)


def test_what_is_validated_on_is_not_trained_on(
    options: PrepareOptions, source: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (held / "v.txt").write_text(near(essay(7)))
    prepare(replace(options, validation_sources=(str(held),)), progress=False)
    texts = texts_of(options.out)
    assert essay(7) not in texts and near(essay(7)) in texts


def test_a_validation_set_stays_the_same_in_every_run(
    options: PrepareOptions, tmp_path: Path
) -> None:
    held, later = tmp_path / "held", tmp_path / "later"
    for folder, text in ((held, essay(600)), (later, essay(601))):
        folder.mkdir()
        (folder / "a.txt").write_text(text)
    (later / "b.txt").write_text(near(essay(600)))
    (later / "c.txt").write_text(essay(602))
    dedup = DedupOptions(index=tmp_path / "index")
    first = replace(options, dedup=dedup, validation_sources=(str(held),))
    prepare(first, progress=False)
    report = prepare(replace(first, sources=(str(later),), out=tmp_path / "second"), progress=False)
    assert report.splits["validation"].documents == 1
    assert report.splits["train"].documents == 2  # what nearly equals it is not trained on
    assert report.deduplication is not None and report.deduplication["stay_to_validate"] == 1
    assert "1 that earlier runs have stay, to be validated on" in str(report)


def test_prepared_again_it_is_no_duplicate_of_what_it_was(
    options: PrepareOptions, source: Path, tmp_path: Path
) -> None:
    first = replace(options, dedup=DedupOptions(index=tmp_path / "index"))
    assert prepare(first, progress=False).documents == 122
    more = tmp_path / "more.txt"
    more.write_text(essay(700))
    grown = replace(first, sources=(str(source), str(more)), overwrite=True)
    assert prepare(grown, progress=False).documents == 123
    other = replace(grown, vocab_size=100)
    assert prepare(other, progress=False).documents == 123
    elsewhere = replace(other, out=tmp_path / "elsewhere", overwrite=False)
    with pytest.raises(DataError, match=r"no text to train on.*duplicates 127"):
        prepare(elsewhere, progress=False)
    assert "elsewhere.work" not in beside(options.out)


def test_an_index_that_cannot_be_written_is_found_before_the_work(options: PrepareOptions) -> None:
    dedup = DedupOptions(index=Path("/proc/nothing/index"))
    with pytest.raises(DataError, match=r"dedup\.index=/proc.* cannot be made"):
        prepare(replace(options, dedup=dedup), progress=False)
    assert beside(options.out) == []


def test_duplicates_of_earlier_runs(options: PrepareOptions, tmp_path: Path) -> None:
    dedup = DedupOptions(index=tmp_path / "index")
    first = replace(options, dedup=dedup)
    assert prepare(first, progress=False).documents == 122
    later = tmp_path / "later"
    later.mkdir()
    for name, text in (("old", essay(8)), ("close", near(essay(9))), ("new", essay(500))):
        (later / f"{name}.txt").write_text(text)
    (later / "other.txt").write_text(essay(501))
    second = replace(first, sources=(str(later),), out=tmp_path / "second")
    report = prepare(second, progress=False)
    assert report.deduplication is not None
    assert (report.deduplication["exact"], report.deduplication["near"]) == (1, 1)
    assert {one["kept"] for one in report.deduplication["examples"]} == {"earlier run"}
    again = prepare(replace(first, overwrite=True), progress=False)
    assert again.documents == 122  # a run is not its own duplicate


# -- killed, or out of room, at any stage ---------------------------------------------------------


def _die(*_args: Any, **_kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return _die() if calls == number else original(*args, **kwargs)

    return wrapped


STAGES: dict[str, tuple[Any, str, int]] = {
    "while cleaning": (spool.TextsWriter, "add", 4),
    "before the mark": (spool.WorkFolder, "complete", 1),
    "searching duplicates": (Deduplicator, "find", 1),
    "training the tokenizer": (prepare_module, "_train", 1),
    "encoding": (DatasetWriter, "add", 5),
    "packing": (DatasetWriter, "add_row", 40),
    "before the manifest": (DatasetWriter, "finish", 1),
    "before the rename": (StagedDirectory, "commit", 1),
    "removing the work": (spool.WorkFolder, "close", 1),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_it_finishes_with_the_same_bytes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(refine, "_BATCH_CHARS", 20_000)
    options = replace(options, pack=128)
    undisturbed = replace(options, out=tmp_path / "a" / "out")
    prepare(undisturbed, progress=False)

    def killed() -> None:
        owner, name, number = STAGES[stage]
        setattr(owner, name, _at_call(number, getattr(owner, name)))
        prepare(options, progress=False)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert options.out.exists() == (stage == "removing the work")
    left = beside(options.out)
    assert "out.work" in left
    # What was complete is not done again.
    cleaned = []
    original = refine._clean
    monkeypatch.setattr(refine, "_clean", lambda *args: cleaned.append(1) or original(*args))
    prepare(options, progress=False)
    assert files_of(options.out) == files_of(undisturbed.out)
    if stage != "removing the work":
        assert bool(cleaned) == (stage in ("while cleaning", "before the mark"))
    assert beside(options.out) == ["a"]


@pytest.mark.parametrize("size", ["8k", "80k", "160k", "200k"])
def test_a_disk_that_fills_is_one_sentence_and_then_it_goes_on(
    options: PrepareOptions, tmp_path: Path, size: str
) -> None:
    """Full while cleaning, while searching, while encoding: nothing is lost, room mends it."""
    undisturbed = replace(options, out=tmp_path / "a" / "out")
    prepare(undisturbed, progress=False)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny file system needs root")
    try:
        tight = replace(options, out=small / "out")
        with pytest.raises(DataError, match=r"cannot write .*No space left.*make room") as caught:
            prepare(tight, progress=False)
        kept = [path.name for path in small.iterdir()]
        assert kept == (["out.work"] if "was cleaned stays in" in str(caught.value) else [])
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        prepare(tight, progress=False)
        assert [path.name for path in small.iterdir()] == ["out"]
        assert files_of(tight.out) == files_of(undisturbed.out)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_damaged_work_folder_is_not_believed(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(replace(options, out=tmp_path / "a" / "out"), progress=False)
    work = tmp_path / "out.work"
    work.mkdir()
    (work / spool._LOCK).touch()
    (work / "mark.json").write_text('{"key": "', encoding="utf-8")
    (work / "texts.zst").write_bytes(b"\x00" * 99)
    prepare(options, progress=False)
    assert files_of(options.out) == files_of(tmp_path / "a" / "out")


def test_somebody_else_s_folder_is_left_alone(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out\.work is where the work .* is kept, and it is taken"):
        prepare(options, progress=False)
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "mine"


def test_two_at_once_are_refused(options: PrepareOptions) -> None:
    first = spool.WorkFolder(options.out, "key")
    with pytest.raises(DataError, match="another process prepares"):
        prepare(options, progress=False)
    first.close(remove=True)
    prepare(options, progress=False)


# -- the command line -----------------------------------------------------------------------------


def test_the_command_says_what_was_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--source", str(source), "--out", str(tmp_path / "d"), "--workers", "1"]
    words += ["--tokenizer", "char", "--clean", "web", "--dedup", "near", "--pack", "64"]
    assert main([*words, "--set", "clean.pii.enabled=false"]) == 0
    shown = capsys.readouterr().out
    assert "duplicates removed: 2 exact and 2 near" in shown
    assert "packed: " in shown and "rows of 64 tokens, padding 0." in shown
    assert TokenDataset.open(tmp_path / "d").packed_seq_len == 64
    assert TokenDataset.open(tmp_path / "d", "validation").packed_seq_len is None


@pytest.mark.parametrize(
    ("clean", "dedup", "settings", "words"),
    [
        ("wbe", "none", [], "did you mean 'web'"),
        ("web", "none", ["clean.pii.enable=false"], "enable.*did you mean"),
        ("web", "none", ["pii.enabled=false"], "neither clean.STAGE.KEY=VALUE nor dedup"),
        (None, "near", ["clean.pii.enabled=false"], "has no use without --clean"),
        ("web", "none", ["dedup.threshold=0.8"], "has no use without --dedup"),
        (None, "near", ["dedup.threshold=8"], "dedup.threshold=8 is out of range"),
        (None, "near", ["dedup.treshold=0.8"], "unknown key dedup.treshold; did you mean"),
    ],
)
def test_impossible_settings_are_one_sentence(
    clean: str | None, dedup: str, settings: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        refine_options(clean, dedup, settings)
    assert "\n" not in str(caught.value)


def test_a_search_for_nothing_is_refused(options: PrepareOptions) -> None:
    with pytest.raises(UserError, match=r"dedup\.exact and dedup\.near are both off"):
        replace(options, dedup=DedupOptions(exact=False, near=False))
