"""`bench dedup`: the plants are what they say, every contestant is judged by them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scalellm.cli import main

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_plants_have_the_jaccard_similarity_they_say(tmp_path: Path) -> None:
    from _dedup_corpus import DECOYS, EXACT, LEVELS, build, shingles, words_of

    documents = build(tmp_path, 1_000_000, seed=3)
    texts = [text for batch in documents.batches(0, len(documents)) for text in batch]
    assert len(texts) == len(documents)
    assert documents.size_bytes(0, len(documents)) >= 1_000_000
    sets = [shingles(words_of(text)) for text in texts]
    assert len(set(texts)) == len(texts)
    for number, level in enumerate(documents.level_N):
        original = documents.original_N[number]
        assert original < number if level else original == number
        same = len(sets[number] & sets[original]) / len(sets[number] | sets[original])
        if level:
            assert same == documents.jaccard_N[number]
            assert abs(same - level) <= 0.005
    for level in (*LEVELS, *DECOYS, EXACT):
        assert np.count_nonzero(documents.level_N == level) > 5
    # A range is read as the whole is.
    part = [text for batch in documents.batches(100, 200, 1000) for text in batch]
    assert part == texts[100:200]


def test_a_judge_counts_by_level(tmp_path: Path) -> None:
    from _dedup_corpus import build
    from dedup import cut, judge

    documents = build(tmp_path, 100_000, seed=0)
    everything = judge(np.ones(len(documents), bool), documents, 0)
    assert set(everything["recall"].values()) == {1.0}
    assert everything["precision"] == everything["planted"] / len(documents)
    nothing = judge(np.zeros(len(documents), bool), documents, 0)
    assert set(nothing["recall"].values()) == {0.0}
    assert nothing["precision"] == 1.0
    right = judge(documents.level_N >= 0.7, documents, 0)
    assert right["precision"] == 1.0
    assert set(right["removed_decoys"].values()) == {0.0}
    # Who has lost its original is background.
    later = judge(np.ones(100, bool), documents, len(documents) - 100)
    assert later["planted"] < np.count_nonzero(documents.level_N[-100:] >= 0.7)
    assert cut(documents, 10**12, 2) == [
        (0, len(documents) // 2),
        (len(documents) - len(documents) // 2, len(documents)),
    ]


def test_contestants_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    command = ["bench", "dedup", "--mb", "1", "--peer-mb", "1", "--repeats", "2"]
    assert main([*command, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    whole = report["whole"]
    assert whole["precision"] >= 0.98
    assert whole["recall"]["1"] == 1.0
    assert whole["recall"]["0.8"] >= 0.85  # of 50; the big run says more
    assert 0 < whole["accounted_bytes"] < 2**30
    names = ["scalellm"]
    if importlib.util.find_spec("datasketch"):
        names.append("datasketch")
    assert list(report["runs"]) == names
    for runs in report["runs"].values():
        assert len(runs) == 2
        for run in runs:
            assert run["signature_cpu_s"] > 0
            assert run["search_cpu_s"] > 0
            assert run["precision"] >= 0.98
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)


def test_a_python_without_datatrove_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for python in ("/nowhere/python", sys.executable + "-none"):
        assert main(["bench", "dedup", "--mb", "1", "--datatrove", python]) == 2
        assert f"--datatrove={python} is no Python" in capsys.readouterr().err
