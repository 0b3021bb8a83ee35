"""The benchmark of the loader measures every contestant over the same tokens."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


def test_every_contestant_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    file = tmp_path / "report.json"
    options = ["--tokens", "150k", "--seq-len", "128", "--repeats", "1", "--json", str(file)]
    assert benchmark.main(options) == 0
    report = json.loads(file.read_text())
    assert report["zstd_ratio"] > 1.5
    assert len(report["runs"]) == 6
    for name, (run,) in report["runs"].items():
        assert run["wall_s"] > 0
        assert abs(run["tokens"] - 150_000) < 2048, name
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*report["runs"], *report["ratios"]])
