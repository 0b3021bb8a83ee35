"""`bench checkpoint`: every contestant writes and reads the same state, and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scalellm.cli import main
from scalellm.config import ModelConfig
from scalellm.errors import UserError
from scalellm.model import count_parameters

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "checkpoint.py"
MIB = 1 << 20


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_checkpoints", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_contestant_is_measured_in_every_repeat(
    tmp_path: Path, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    file, place = tmp_path / "report.json", tmp_path / "disk"
    place.mkdir()
    words = ["--size-mib", "2", "--repeats", "2", "--dir", str(place), "--json", str(file)]
    assert main(["bench", "checkpoint", *words]) == 0
    report = json.loads(file.read_text())
    assert 0.8 < report["config"]["bytes"] / (2 * MIB) < 1.1
    assert report["config"]["files"] == 2
    assert set(report["runs"]) == {name for pair in benchmark.RATIOS.values() for name in pair}
    for run in report["runs"].values():
        assert len(run["wall_s"]) == len(run["cpu_s"]) == 2 and min(run["wall_s"]) > 0
    for name, (dividend, divisor) in benchmark.RATIOS.items():
        walls = report["runs"][dividend]["wall_s"], report["runs"][divisor]["wall_s"]
        assert report["ratios"][name] == [a / b for a, b in zip(*walls, strict=True)]
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*report["runs"], *report["ratios"]])
    assert list(place.iterdir()) == []


def test_raw_and_ours_write_the_same_bytes(tmp_path: Path, benchmark: ModuleType) -> None:
    strategy = benchmark.trained(benchmark.model_of(2 * MIB))
    bench = benchmark.Bench(tmp_path, strategy)
    raw, ours = tmp_path / "raw", tmp_path / "ours"
    raw.mkdir()
    bench._raw(raw)
    bench._synchronous(ours)
    for name, content in bench.contents.items():
        assert (raw / name).read_bytes() == content
        assert (ours / "step-00000001" / name).read_bytes() == content
    assert len(bench._tensors()) == 4 * len(list(strategy.named_parameters()))
    strategy.close()


@pytest.mark.parametrize("size_mib", [1, 3, 50, 384, 4096])
def test_the_state_has_the_size_asked_for(benchmark: ModuleType, size_mib: int) -> None:
    model: ModelConfig = benchmark.model_of(size_mib * MIB)
    assert 12 * count_parameters(model) == pytest.approx(size_mib * MIB, rel=0.01)


def test_what_cannot_be_is_refused(tmp_path: Path, benchmark: ModuleType) -> None:
    with pytest.raises(UserError, match=r"the smallest decoder here takes 0\.\d MiB"):
        benchmark.model_of(1000)
    with pytest.raises(UserError, match="is no directory; make it"):
        benchmark.main(["--dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        benchmark.main(["--repeats", "0"])
