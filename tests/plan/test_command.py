"""`scalellm plan` as it is typed: tables, the config to paste, JSON, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.plan_command import _number

CONFIG: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 32},
    "strategy": {"name": "single"},
    "train": {"global_batch_size": 8},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_tables_a_config_to_paste_and_a_bill(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "plan.json"
    words = [str(config), "--gpus", "2", "--device", "a100-40g", "--json", str(figures)]
    words += ["train.micro_batch_size=4", "--chart", str(tmp_path / "memory.png")]
    assert main(["plan", *words, "--tokens", "1B", "--price", "2.5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    report = json.loads(figures.read_text())
    assert report["world_size"] == 2 and report["given"]["refused"].startswith("strategy.name=sin")
    best = report["best"]
    assert best["fits"] and best["memory"]["peak_bytes"] < report["limit_bytes"]
    assert f"recommended: {best['label']}" in out and "1,000,000,000 tokens take" in out
    assert "with fitted efficiencies, not measurements" in out and "as given: not possible" in out
    seconds = 1e9 / best["time"]["tokens_per_s"]
    assert report["days"] == pytest.approx(seconds / 86_400)
    assert report["cost"] == pytest.approx(seconds / 3600 * 2 * 2.5)
    time = best["time"]
    parts = ("compute_s", "memory_s", "launch_s", "exposed_communication_s", "optimizer_s")
    assert time["total_s"] == pytest.approx(sum(time[part] for part in parts))
    # What is to be pasted is a config, and that of the recommendation.
    pasted = out.partition("put this into the config:\n\n")[2].partition("\n\n")[0]
    changed = parse_config({**CONFIG, **_with_train(yaml.safe_load(pasted))})
    assert changed.strategy.name == best["changes"]["strategy"]["name"]
    changed.batches(2)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    # The dry run stands beside the estimate, with the same peak.
    lines = [line.split() for line in out.splitlines() if line.startswith(("estimate", "dry run"))]
    assert lines[0][1:] == lines[1][2:]
    # So do its collectives beside the formula: the same counts, the same bytes.
    sent = [line.split()[1:] for line in out.splitlines() if line.startswith(("all_", "reduce_"))]
    assert sent and all(count == f and size == g for count, f, size, g in sent)


def _with_train(changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "train": {**CONFIG["train"], **changes["train"]}}


def test_nothing_fits(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = tmp_path / "toy.yaml"
    device.write_text(
        "{memory_bytes: 100000, rates: {fp32: 1e12, bf16: 1e12}, memory_bytes_per_s: 1e11, "
        "node_link_bytes_per_s: 1e10, devices_per_node: 1, network_bytes_per_s: 1e9, "
        "host_link_bytes_per_s: 1e10, host_memory_bytes_per_s: 1e10}"
    )
    assert main(["plan", str(config), "--device", str(device)]) == 1
    out = capsys.readouterr().out
    assert "nothing fits: at least" in out and "put this" not in out
    assert "with assumed efficiencies" in out
    assert "no single change that was tried, more devices among them, is enough" in out


def test_a_model_that_fits_nowhere_is_told_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 3 405B on one V100: not by any strategy, nor by any change of the best one."""
    path, figures = tmp_path / "405b.yaml", tmp_path / "plan.json"
    shape = {"num_layers": 126, "hidden_size": 16384, "num_heads": 128, "num_kv_heads": 8}
    shape |= {"intermediate_size": 53248, "vocab_size": 128256, "seq_len": 131072}
    train = {"global_batch_size": 1, "precision": "fp16"}
    path.write_text(
        yaml.safe_dump({"model": shape, "strategy": {"name": "single"}, "train": train})
    )
    words = ["--gpus", "1", "--device", "v100-16g", "--json", str(figures)]
    assert main(["plan", str(path), *words]) == 1
    out, report = capsys.readouterr().out, json.loads(figures.read_text())
    assert report["best"] is None
    missing = min(row["over_bytes"] for row in report["variants"] if not row["refused"])
    for row in report["variants"]:
        if not row["refused"]:
            peak_bytes = row["memory"]["peak_bytes"]
            assert row["over_bytes"] == peak_bytes - report["limit_bytes"] > 0
    assert f"nothing fits: at least {missing / 1e9:.1f} GB a rank are missing" in out
    assert report["ways_out"] and not any(way["fits"] for way in report["ways_out"])
    assert "more devices among them, is enough" in out
    smallest = report["ways_out"][0]
    assert f"still {smallest['over_bytes'] / 1e9:.1f} GB over" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h1000"], "did you mean"),
        (["--gpus", "0"], "--gpus=0 devices is not between"),
        (["--gpus", "3"], "not a multiple"),
        (["--tokens", "many"], "--tokens=many is not a number of tokens"),
        (["--price", "2"], "--price needs --tokens"),
        (["--tokens", "1B", "--price", "-1"], "--price=-1"),
        (["train.precison=fp32"], "did you mean 'precision'"),
        (
            ["--device", "v100-16g", "train.precision=bf16"],
            "no bf16 matrix units; use fp16 or fp32",
        ),
        (["model.vocab_size=null"], "vocab_size is null"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
        (["--chart", "memory.svg"], "--chart=memory.svg must end in .png"),
    ],
)
def test_mistakes(
    words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config), *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "2"]) == 2
    assert "plan needs a config" in capsys.readouterr().err


def test_numbers_of_tokens() -> None:
    assert [_number(text) for text in ("1T", "300b", "2.5M", "1e9")] == [1e12, 3e11, 2.5e6, 1e9]
