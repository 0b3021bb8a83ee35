"""Exported weights are the run's, whole, in the layout other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalellm import checkpoint, export
from scalellm.cli import main
from scalellm.config import ModelConfig, parse_config
from scalellm.dist import World
from scalellm.inference import load_run
from scalellm.model import Decoder, count_parameters
from scalellm.strategies import Piece
from scalellm.train import run_training


@pytest.fixture(scope="module")
def run_dir(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 32}
    values = {
        "run": {"dir": str(folder), "threads": 1},
        "data": {"path": str(tiny_dataset)},
        "model": model,
        "train": {"steps": 2, "global_batch_size": 4},
        "checkpoint": {"every_steps": 1},
        "metrics": {"tensorboard": False},
    }
    run_training(parse_config(values))
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    model, _ = load_run(run)
    return dict(model.named_parameters())


def config_in(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "config.json").read_text())
    return content


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err.strip()


def test_exported_weights_make_the_same_model(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    assert "parameters of step 2" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.model",
    }
    assert (out / "tokenizer.model").read_bytes() == (run_dir / "tokenizer.model").read_bytes()
    content = config_in(out)
    assert (content.pop("format"), content.pop("step"), content.pop("dtype")) == (
        "scalellm-decoder",
        2,
        "float32",
    )
    model = Decoder(ModelConfig.model_validate(content))
    found = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in found.values()) == count_parameters(model.config)
    model.load_state_dict(found, strict=True)
    for name, weight in weights_of(run_dir).items():
        assert torch.equal(found[name], weight)


def test_one_checkpoint_as_bf16(run_dir: Path, tmp_path: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000001"
    report = export.export_run(path, tmp_path / "out", "bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {name: weight.bfloat16() for name, weight in weights_of(path).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert (config_in(tmp_path / "out")["step"], config_in(tmp_path / "out")["dtype"]) == (
        1,
        "bfloat16",
    )
    assert report.size_bytes == 2 * report.num_parameters


def test_a_large_model_is_split_with_an_index(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 20_000)
    out = tmp_path / "out"
    report = export.export_run(run_dir, out, "fp32")
    files = sorted(out.glob("model-*.safetensors"))
    total = len(files)
    assert total == report.num_files > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    wanted = weights_of(run_dir)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], wanted[name])
    assert not (out / "model.safetensors").exists()


def test_pieces_become_whole_tensors(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    pieces = [
        Piece("model.a", whole[rows], (6, 4), (rows.start, 0))
        for rows in (slice(0, 4), slice(4, 6))
    ]
    checkpoint.save(tmp_path / "run" / "checkpoints", 3, pieces, {"model": {}}, World(), keep=1)
    export.export_run(tmp_path / "run", tmp_path / "out", "fp32")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], whole)


def test_what_is_there_is_not_overwritten(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    words = fails(capsys, "export", str(run_dir), "--out", str(tmp_path))
    assert f"--out={tmp_path} is not empty; choose another folder" in words
    assert "is a file" in fails(capsys, "export", str(run_dir), "--out", str(file))
    under = str(file / "out")
    assert "cannot be written: Not a dir" in fails(capsys, "export", str(run_dir), "--out", under)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["export", str(run_dir), "--out", str(tmp_path / "empty")]) == 0


def test_nothing_half_written_is_left(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_json", fail)
    words = fails(capsys, "export", str(run_dir), "--out", str(tmp_path / "out"))
    assert "No space left on device; free space" in words
    assert not list(tmp_path.iterdir())


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "there is no checkpoint" in fails(capsys, "export", "nowhere", "--out", out)
    assert "--dtype" in fails(capsys, "export", "x", "--out", out, "--dtype", "fp8")
    piece = Piece("model.a", torch.ones(2), (2,), (0,))
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, [piece], {}, World(), keep=1)
    words = fails(capsys, "export", str(tmp_path / "run"), "--out", out)
    assert "does not say which model it is of" in words
