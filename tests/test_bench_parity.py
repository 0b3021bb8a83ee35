"""The matrix as a command: every cell within its tolerance, every save in every load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scalellm.cli import main

# The cells whose checkpoints must be interchangeable, each with each.
CELLS = ["single@1", "ddp@2", "fsdp@2", "fsdp@4", "deepspeed-1@2", "deepspeed-2@2", "deepspeed-3@2"]


@pytest.mark.slow
def test_every_save_in_every_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [*CELLS, "deepspeed-3-offload@2"]
    file = tmp_path / "report.json"
    words = ["--size", "tiny", "--only", ",".join(cells), "--pairs", "all", "--cpu-adam", "torch"]
    code = main(["bench", "parity", *words, "--json", str(file)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    report = json.loads(file.read_text())
    assert [row["cell"] for row in report["cells"]] == cells
    assert len(report["resumes"]) == len(cells) ** 2
    assert all(entry["difference"] < 1e-5 for entry in report["resumes"])
    own = [entry["bit_identical"] for entry in report["resumes"] if "bit_identical" in entry]
    assert own == [True] * len(cells)
    assert "worst cell: " in shown
    assert f"{len(cells)} of {len(cells)} bit-identical" in shown


def test_a_wrong_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "parity", "--only", "dpd"])
    assert "dpd is none of single, ddp, ddp-zero1, fsdp" in capsys.readouterr().err
