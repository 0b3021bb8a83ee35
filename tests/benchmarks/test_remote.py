"""`bench remote` reads little, resumes as it starts, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scalellm.cli import main


def test_what_it_reports(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "remote", "--data", str(tiny_dataset), "--seq-len", "64", "--repeats", "2"]
    assert main([*words, "--delay-ms", "5", "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    assert "answers 5 ms late, state " in shown and "resume takes " in shown
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["delays"]["5"]
    assert found["state_bytes"] <= 256
    for name in ("start", "resume"):
        # Manifest, index and frame, one after the other, each 5 ms late.
        assert min(found["milliseconds"][name]) >= 15
        assert 0 < max(found["read_bytes"][name]) < 1 << 20
    assert report["dataset"]["tokens"] > 0 and report["machine"]["cores"] >= 1


def test_impossible_numbers_are_one_sentence(
    tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "remote", "--data", str(tiny_dataset), "--repeats", "0"]) == 2
    assert "--repeats=0 must be 1 or more" in capsys.readouterr().err
