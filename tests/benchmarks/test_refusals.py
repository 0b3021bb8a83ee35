"""The table in the docs says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalellm.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


def test_the_refusals_in_the_docs_are_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """Anew: `scalellm bench refusals`."""
    assert main(["bench", "refusals"]) == 0
    table = capsys.readouterr().out.strip()
    assert table.count("\n") > 10 and "not refused" not in table
    assert table in PAGE.read_text()
