"""The comparison with other trainers: fair turns, the same ids, failures as rows."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main
from scalellm.config import ModelConfig
from scalellm.errors import UserError
from scalellm.model import count_parameters, flops_per_token

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# Speaks the protocol without torch: says ready, then answers what it was asked, but for "run 3".
FAKE_WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if line == "run 3\\n":
        raise ValueError("three steps are too many")
    print(json.dumps({"step_s": [0.5] * int(line.split()[1])}), flush=True)
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def start_fake(load: Any, tmp_path: Path, code: str, limit_s: float = 60.0) -> Any:
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    process = load("_peer_process").PeerProcess
    return process([sys.executable, str(worker)], tmp_path / "log", threads=1, limit_s=limit_s)


def is_stopped(pid: int) -> bool:
    """Whether it is, or is within a second: a signal takes its time on a busy machine."""
    deadline_s = time.monotonic() + 1
    while time.monotonic() < deadline_s:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_has_no_turn_is_stopped(load: Any, tmp_path: Path) -> None:
    peer = start_fake(load, tmp_path, FAKE_WORKER)
    pid = peer._process.pid
    try:
        for count in (2, 1):
            assert is_stopped(pid)
            assert peer.turn(count) == {"step_s": [0.5] * count}
        assert is_stopped(pid)
    finally:
        peer.end()
    assert peer._process.poll() is not None


def test_a_worker_that_fails_says_why(load: Any, tmp_path: Path) -> None:
    peer_error = load("_peer_process").PeerError
    peer = start_fake(load, tmp_path, FAKE_WORKER)
    with pytest.raises(peer_error, match="exit code 1: ValueError: three steps are too many"):
        peer.turn(3)
    with pytest.raises(peer_error, match="exit code 7: it said nothing"):
        start_fake(load, tmp_path, "raise SystemExit(7)")
    with pytest.raises(peer_error, match=r"no answer within 0\.1 s"):
        start_fake(load, tmp_path, "input()", limit_s=0.1)


def test_versions_come_from_one_place(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = load("_peer_environments")
    constraints = (BENCHMARKS.parent / "constraints.txt").read_text().split()
    for name, packages in environments.ENVIRONMENTS.items():
        pins = environments.pins(name)
        assert [pin.partition("==")[0] for pin in pins] == ["torch", "numpy", *packages]
        assert set(pins[:2]) <= set(constraints)
    monkeypatch.setitem(environments.ENVIRONMENTS, "new", ("unheard-of",))
    with pytest.raises(UserError, match=r"unheard-of has no version: add it to the extra `peers`"):
        environments.pins("new")


@pytest.mark.slow
def test_an_environment_that_cannot_be_made(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments = load("_peer_environments")
    monkeypatch.setenv("PIP_FLAGS", "--no-such-option")
    with pytest.raises(environments.InstallError, match="no such option: --no-such-option"):
        environments.python_of(tmp_path, "plain")
    assert not (tmp_path / "plain" / "installed.txt").exists()  # tried again the next time


def names(load: Any, *words: str) -> list[str]:
    return [one.name for one in load("peers")._parse(list(words)).contestants]


def test_who_takes_part(load: Any) -> None:
    both = names(load)
    for peer in ("plain", "hf-trainer", "accelerate", "litgpt", "scalellm-bare", "scalellm"):
        assert {f"{peer}-fp32", f"{peer}-bf16", f"{peer}-bf16-compile"} <= set(both)
    exact = names(load, "--precisions", "fp32")
    assert "plain-fp32-compile" in exact
    assert not any("bf16" in name for name in exact)
    assert names(load, "--only", "litgpt-fp32,plain-fp32") == ["litgpt-fp32", "plain-fp32"]


def test_bf16_left_out_only_if_asked(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers")
    monkeypatch.setattr(peers, "cpu_multiplies_bf16", lambda: False)
    only = ["--only", "plain-fp32,plain-bf16"]
    assert [one.status for one in peers._parse(only).contestants] == ["ok", "ok"]
    skipped = peers._parse([*only, "--skip-slow-bf16"]).contestants
    assert [one.status for one in skipped] == ["ok", "skipped"]
    assert skipped[1].reason == "slow on this CPU: no native bf16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "plain-fp23"], "did you mean 'plain-fp32'"),
        (["--precisions", "fp64"], "'fp64' is none of fp32, bf16"),
        (["--parts", "speed"], "'speed' is none of train, data"),
        (["--shape", "6x384x256"], "is not layers x width x T x vocabulary"),
        (["--shape", "6x100x256x8192"], "multiple of 64"),
        (["--rounds", "0"], "--rounds=0 must be 1 or more"),
    ],
)
def test_a_wrong_word(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", *words]) == 2
    assert message in capsys.readouterr().err


def test_workers_of_others_know_nothing_of_us() -> None:
    for path in (BENCHMARKS / "peer_workers").glob("[!s]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.startswith("scalellm") for module in modules), path


def fake_python(environments: Path, name: str, pins: list[str], script: str) -> None:
    """An environment that looks installed, whose interpreter is a shell script."""
    python = environments / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (environments / name / "installed.txt").write_text("\n".join(pins) + "\n")


@pytest.mark.slow
def test_a_small_comparison(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pins = load("_peer_environments").pins
    fake_python(tmp_path, "plain", pins("plain"), f'exec "{sys.executable}" "$@"')
    fake_python(tmp_path, "hf", pins("hf"), 'echo "ImportError: it is gone" >&2; exit 3')
    fake_python(tmp_path, "litdata", pins("litdata"), 'echo "OSError: gone too" >&2; exit 4')
    file = tmp_path / "report.json"
    only = "plain-fp32,plain-fused-fp32,hf-trainer-fp32,scalellm-bare-fp32,scalellm-fp32"
    words = ["--shape", "2x64x32x512", "--batch", "4", "--rounds", "2", "--steps", "3"]
    # The text is this Python's library: enough steps to learn from any version of it.
    words += ["--warmup", "14", "--threads", "1", "--only", only, "--checkpoint-every", "4"]
    words += ["--tokens", "200000", "--environments", str(tmp_path), "--json", str(file)]
    assert main(["bench", "peers", *words]) == 0
    shown = capsys.readouterr().out
    report = json.loads(file.read_text())
    rows = {row["name"]: row for row in report["contestants"]}
    assert list(rows) == only.split(",")
    failed = rows.pop("hf-trainer-fp32")
    assert failed["status"] == "failed"
    assert failed["reason"] == "exit code 3: ImportError: it is gone"
    assert "| hf-trainer-fp32 | failed: exit code 3: ImportError: it is gone |" in shown
    ours, bare, plain = rows["scalellm-fp32"], rows["scalellm-bare-fp32"], rows["plain-fp32"]
    check_figures(rows, report)
    # The same model, weights, ids and optimizer: the trainer adds nothing to the arithmetic.
    assert ours["losses"] == bare["losses"]
    assert report["loss_differences"]["largest"]["scalellm-fp32"] == 0
    # The fused AdamW is the same optimizer; another model of the same size learns alike.
    assert plain["losses"] == pytest.approx(rows["plain-fused-fp32"]["losses"], abs=1e-4)
    assert plain["losses"] == pytest.approx(ours["losses"], abs=0.2)
    assert ours["losses"][-1] < ours["losses"][0] - 0.2
    loaders = {row["name"]: row for row in report["loaders"]["rows"]}
    assert loaders["litdata"]["reason"] == "exit code 4: OSError: gone too"
    assert loaders["np.memmap + DataLoader, 0 workers"]["wall_rate"]["median"] > 0
    assert loaders["scalellm, 1 decode threads"]["ours_over_it_wall"]["median"] == 1


def check_figures(rows: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 1, "vocab_size": 512, "seq_len": 32}
    theirs = {"norm": "layernorm", "positions": "learned", "mlp": "gelu"}
    for name, row in rows.items():
        config = ModelConfig(**shape, **(theirs if name.startswith("plain") else {}))
        assert row["parameters"] == count_parameters(config)
        assert row["flops_per_token"] == flops_per_token(config)
        assert [len(turn) for turn in row["step_s"]] == [3, 3]
        assert len(row["losses"]) == 14 + 2 * 3
        rates = [3 * 4 * 32 / sum(turn) for turn in row["step_s"]]
        assert row["tokens_per_s"]["runs"] == pytest.approx(rates)
        ours = rows["scalellm-fp32"]["tokens_per_s"]["runs"]
        ratios = [a / b for a, b in zip(ours, rates, strict=True)]
        assert row["best_over_it"]["raw"]["median"] == pytest.approx(sum(ratios) / 2)
    scale = rows["scalellm-fp32"]["flops_per_token"] / rows["plain-fp32"]["flops_per_token"]
    ratio = rows["plain-fp32"]["best_over_it"]
    assert ratio["per_flop"]["median"] == pytest.approx(ratio["raw"]["median"] * scale)
    assert len(report["gemm_flops_per_s"]["fp32"]) == 2
    times = [
        sum(sum(t) for t in rows[n]["step_s"]) for n in ("scalellm-bare-fp32", "scalellm-fp32")
    ]
    assert report["whole_over_bare"]["fp32"]["by_total_time"] == pytest.approx(times[0] / times[1])
