"""The command line: exit codes, one sentence a mistake, and nothing left half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scalellm.cli import COMMANDS, main

Values = dict[str, Any]


@pytest.fixture
def config_file(tiny_values: Values, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values))
    return path


@pytest.fixture
def copied_dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must end with exit code 2 and one sentence on stderr."""
    code = main(argv)
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("scalellm: ")]
    assert len(lines) == 1 and error.endswith(lines[0]), error
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "train needs a config"),
        (["train", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["train", "x.yaml", "--nprocs", "2"], "--nprocs"),
        (["train", "x.yaml", "--resume", ""], "--resume takes auto or the path"),
        (["generate", "--run", "x", "a\udcff"], "the prompt is not valid UTF-8"),
        (["eval", "x", "--batch-size", "0"], "--batch-size=0 samples must be 1 or more"),
        (["eval", "x", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["prepare", "--out", "x", "--limit-mb", "nan"], "--limit-mb=nan MB"),
        (["generate", "hello"], "--run"),
        (["generate", "--run", "nowhere", "hello"], "there is no checkpoint or run folder"),
        (["eval", "nowhere"], "there is no checkpoint or run folder"),
        (["bench", "dta"], "did you mean 'data'"),
        (["prepare", "--out", "x", "--source", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_at_the_command_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, *argv)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "bench")])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([*command, "--help"]) == 0
    except SystemExit as exit_:  # argparse leaves this way
        assert exit_.code == 0
    assert "usage: scalellm" in capsys.readouterr().out


def test_unknown_config_key(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, "train", str(config_file), "train.stepz=3")
    assert "unknown key train.stepz; did you mean 'steps'?" in text


def test_unknown_strategy_and_option(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'ddp'" in fails(capsys, "train", str(config_file), "strategy.name=dpp")
    text = fails(capsys, "train", str(config_file), "strategy.name=ddp", "strategy.buckt_mb=1")
    assert "unknown key strategy.buckt_mb; did you mean 'bucket_mb'?" in text


@pytest.mark.parametrize("count", ["0", "-1", "100000"])
def test_nproc_out_of_range(
    config_file: Path, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = fails(capsys, "train", str(config_file), f"--nproc={count}")
    assert f"--nproc={count} ranks is not between 1 and 1024" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strategy.name=.", "strategy.name='.' is unknown"),
        ("strategy.name=.ddp", "did you mean 'ddp'"),
        ("model.preset=[1]", "[1] is no preset"),
        ("train.steps=true", "steps takes no true or false"),
        ("run.threads=2147483648", "at most 4096"),
        ("train={? [1] : 2}", "is not a word"),
    ],
)
def test_odd_overrides(
    config_file: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, "train", str(config_file), override)


def test_out_of_memory_says_where_it_went_and_what_helps(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before is a lower bound, so a real allocation may still fail: here it does."""
    monkeypatch.setattr("scalellm.train.limits._available_bytes", lambda device: 2**60)
    monkeypatch.setattr("scalellm.train.build.check_disk", lambda config, path: None)
    assert main(["train", str(config_file), "model.hidden_size=4194304"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    [sentence] = [line for line in error.splitlines() if line.startswith("scalellm: ")]
    assert "out of memory" in sentence and "can't allocate memory" in sentence
    assert "lower train.micro_batch_size" in sentence
    assert "predicted peak of a rank: " in error and "(parameters " in error
    ways = error.partition("what helps")[2].splitlines()[1:]
    assert 1 <= len(ways) <= 3 and all(line.endswith(" GiB") for line in ways)


def test_another_error_of_torch_keeps_its_traceback(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("scalellm.train.run_training", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["train", str(config_file)])


@pytest.mark.slow
def test_ranks_without_memory_say_it_once_and_rank_0_what_helps(
    config_file: Path, tmp_path: Path
) -> None:
    """Real ranks under a real limit; a third of it is what their libraries map."""
    words = "model.hidden_size=512 model.seq_len=512 model.vocab_size=30000 strategy.name=ddp"
    words += " train.global_batch_size=128 run.device=cpu"
    command = (
        f"ulimit -v 6000000; {sys.executable} -m scalellm train {config_file} --nproc 2 {words}"
    )
    process = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 1, process.stderr
    assert "out of memory on rank 0" in process.stderr
    assert process.stderr.count("predicted peak of a rank: ") == 1
    assert process.stderr.count("train.micro_batch_size=") == 1


def test_a_reader_that_leaves_is_no_error(config_file: Path, tmp_path: Path) -> None:
    assert main(["train", str(config_file), "train.steps=1"]) == 0
    command = f"{sys.executable} -m scalellm generate --run {tmp_path / 'run'} import | head -c 3"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr


def test_a_damaged_tokenizer_of_a_run_is_named(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_file), "train.steps=1"]) == 0
    capsys.readouterr()
    tokenizer = tmp_path / "run" / "tokenizer.model"
    content = bytearray(tokenizer.read_bytes())
    content[len(content) // 2] ^= 1
    tokenizer.write_bytes(content)
    assert "is damaged or missing" in fails(capsys, "generate", "--run", str(tmp_path / "run"), "x")


def test_nproc_reports_the_ranks_mistake_once(config_file: Path, tmp_path: Path) -> None:
    """Two ranks meet the same mistake: one sentence, no launcher's traceback, exit code 2."""
    process = subprocess.run(
        [
            *(sys.executable, "-m", "scalellm", "train", str(config_file), "--nproc", "2"),
            *("strategy.name=ddp", "train.global_batch_size=9"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("global_batch_size=9 samples is not a multiple") == 1
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()


def test_single_under_two_ranks_names_the_right_strategy(config_file: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "scalellm", "train", str(config_file), "--nproc", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "use strategy.name=ddp" in process.stderr


def _damage(dataset: Path, file: str, change: str) -> None:
    path = dataset / file
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[len(content) // 3] ^= 4
    elif change == "cut":
        del content[len(content) // 2 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train/00000.tokens.zst", "flip"),
        ("train/00000.tokens.zst", "cut"),
        ("train/00000.index", "flip"),
        ("manifest.json", "flip"),
        ("manifest.json", "cut"),
    ],
)
def test_damaged_data_never_trains(
    config_file: Path,
    copied_dataset: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: str,
) -> None:
    _damage(copied_dataset, file, change)
    text = fails(capsys, "train", str(config_file), f"data.path={copied_dataset}")
    assert Path(file).name in text or "manifest" in text


def test_a_manifest_that_points_outside_is_refused(
    config_file: Path, copied_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied_dataset / "manifest.json"
    path.write_text(path.read_text().replace("train/00000.tokens.zst", "../00000.tokens.zst"))
    text = fails(capsys, "train", str(config_file), f"data.path={copied_dataset}")
    assert "manifest.json" in text


def test_a_token_beyond_the_vocabulary_is_refused(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset whose hashes are right and whose ids are not: its writer was told a lie."""
    from scalellm.data import DatasetWriter

    out = tmp_path / "lying"
    tokens = np.arange(2001, dtype=np.uint16) % 50
    with DatasetWriter(out, vocab_size=50, eos_id=0, tokenizer_file=None, tokenizer_kind="x") as w:
        w.add("train", tokens)
        w.finish()
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["vocab_size"] = 20
    (out / "manifest.json").write_text(json.dumps(manifest))
    text = fails(capsys, "train", str(config_file), f"data.path={out}")
    assert str(out) in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "there is no text to train on"),
        ("photo.txt", bytes(range(256)) * 40, "photo.txt"),
    ],
)
def test_prepare_refuses_what_is_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    out = tmp_path / "out"
    text = fails(capsys, "prepare", "--source", str(tmp_path / "text"), "--out", str(out))
    assert words in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_too_small_for_a_checkpoint_is_refused_before_training(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        text = fails(capsys, "train", str(config_file), f"run.dir={mount}/run")
        assert "bytes free, one checkpoint of this model needs" in text
        assert not (mount / "run" / "metrics.jsonl").exists()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_train_eval_and_generate(
    config_file: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's path: train, then perplexity per token and per word, then a text."""
    run = tmp_path / "run"
    assert main(["train", str(config_file), "eval.sample_prompt='def '", "train.steps=4"]) == 0
    assert (run / "sample.txt").read_text().startswith("def ")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    figures_file = tmp_path / "figures.json"
    assert main(["eval", str(run), "--json", str(figures_file)]) == 0
    printed = capsys.readouterr().out
    assert "perplexity per word" in printed and "nats per token" in printed
    figures = json.loads(figures_file.read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert figures["loss"] == pytest.approx(evaluated[-1]["loss"], rel=1e-6)
    arguments = ["generate", "--run", str(run), "import", "--max-new-tokens", "20", "--seed", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert first.strip().startswith("import")
    assert "top_p" in fails(capsys, *arguments, "--top-p", "1.5")


def test_eval_refuses_another_tokenizer(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_file), "train.steps=1", "train.warmup_steps=0"]) == 0
    (tmp_path / "other.txt").write_text("another text with other letters\n" * 200)
    other = tmp_path / "other"
    source = str(tmp_path / "other.txt")
    assert main(["prepare", "--source", source, "--out", str(other), "--tokenizer", "char"]) == 0
    capsys.readouterr()
    text = fails(capsys, "eval", str(tmp_path / "run"), "--data", str(other))
    assert "prepare the data again with --tokenizer" in text


def test_eval_of_other_data_takes_all_of_it(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_file), "train.steps=1", "train.warmup_steps=0"]) == 0
    (tmp_path / "test.txt").write_text("import os\n" * 300)
    tokenizer = str(tmp_path / "run" / "tokenizer.model")
    source, out = str(tmp_path / "test.txt"), str(tmp_path / "test")
    assert main(["prepare", "--source", source, "--out", out, "--tokenizer", tokenizer]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data", out]) == 0
    assert "600 words, 3,000 bytes" in capsys.readouterr().out


def test_gbk_chinese_prepares_trains_and_generates(
    tmp_path: Path, tiny_values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "chinese"
    folder.mkdir()
    sentence = "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。寒来暑往,秋收冬藏。\n"
    for number in range(4):
        (folder / f"{number}.txt").write_bytes((sentence * (40 + number)).encode("gbk"))
    data = tmp_path / "data"
    assert (
        main(["prepare", "--source", str(folder), "--out", str(data), "--tokenizer", "char"]) == 0
    )
    tiny_values["data"] = {"path": str(data)}
    tiny_values["train"] |= {"steps": 60}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny_values))
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    arguments = ["--run", str(tmp_path / "run"), "天地", "--temperature", "0"]
    assert main(["generate", *arguments, "--max-new-tokens", "20"]) == 0
    text = capsys.readouterr().out.strip()
    assert text.startswith("天地") and len(text) > 10
    assert set(text) <= set(sentence)
