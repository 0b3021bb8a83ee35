"""`scalellm report`: a page about any runs, whole, still going, cut off or of older versions."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.page import Page

from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.metrics import JSONL_NAME
from scalellm.report import report_runs
from scalellm.report.charts import Line, _shortened, _thinned
from scalellm.report.markdown import _escaped
from scalellm.report.runs import read_runs
from scalellm.train import run_training

MIB = 1 << 20
OLD_KEYS = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_s", "step_time_s")
ENVIRONMENT = {"processor": "A Processor", "cores": 2, "versions": {"torch": "2.13.0", "ray": None}}


def train_row(step: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": None if step == 3 else 5.0 / step,  # a skipped step has no loss
        "tokens": 1000 * step,
        "tokens_per_s": 900.0 + step,
        "step_time_s": 1.0,
        "data_wait_s": 0.1,
        "forward_s": 0.3,
        "backward_s": 0.4,
        "optimizer_s": 0.1,
        "peak_rss_bytes": 300 * MIB,
        "peak_device_bytes": 0,
    }


def made_run(folder: Path, *, ended: bool = True, old: bool = False, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = [train_row(step) for step in range(1, 21)]
    if old:
        rows = [
            {key: row[key] for key in row if key in ("kind", "step", *OLD_KEYS)} for row in rows
        ]
    rows.insert(10, {"kind": "eval", "step": 10, "loss": 1.25, "perplexity": 3.5})
    if ended:
        end = {"kind": "end", "step": 20, "reason": "done", "strategy": "ddp", "world_size": 2}
        end |= {"goodput_tokens_per_s": 456.0, "startup_s": 4.5}
        end |= {"baseline_rss_bytes": [200 * MIB] * 2, "peak_rss_bytes": [300 * MIB, 345 * MIB]}
        rows.append(end)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / JSONL_NAME).write_text(text + tail)
    config = {"run": {"dir": str(folder)}, "strategy": {"name": "ddp"}, "train": {"steps": 20}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def read(files: list[Path]) -> Page:
    page = Page(files[0].read_text(encoding="utf-8"))
    assert page.open == []
    assert page.loaded == []
    assert page.elements.count("script") == 1
    assert len(set(page.ids)) == len(page.ids)
    for path in files[2:]:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    return page


def test_a_real_run(tiny_values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tiny_values["eval"] = {"every_steps": 3}
    config = parse_config(tiny_values)
    run_training(config)
    run_dir = config.run.dir
    assert main(["report", str(run_dir)]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    plots = sorted((run_dir / "plots").iterdir())
    page = read([run_dir / "report.html", run_dir / "report.md", *plots])
    assert [path.stem for path in plots] == ["loss", "memory", "step-time", "tokens-per-s"]
    heads, row = page.rows[:2]
    shown = dict(zip(heads, row, strict=True))
    rows = [json.loads(line) for line in (run_dir / JSONL_NAME).read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert shown["run"] == run_dir.name and shown["steps"] == "6"
    assert shown["training loss"] == f"{trained[-1]['loss']:.4f}"
    assert shown["validation loss"] == f"{evaluated[-1]['loss']:.4f}"
    assert shown["ended"] == "done"
    assert shown["goodput tokens/s"] == f"{rows[-1]['goodput_tokens_per_s']:,.0f}"


def test_runs_of_all_kinds_side_by_side(tmp_path: Path) -> None:
    whole = made_run(tmp_path / "a" / "run")
    going = made_run(tmp_path / "b" / "run", ended=False, tail='{"kind": "tra')
    old = made_run(tmp_path / "_old $x^2$ <b>", ended=False, old=True)
    (old / "config.yaml").write_text("strategy: {name: fsdp}\n")
    (old / "environment.json").unlink()
    out = tmp_path / "new" / "page"
    files = report_runs([whole, going, old, whole], out)
    page = read(files)
    assert files[0].parent == out and (out / "report.md").is_file()
    assert {path.stem for path in files[2:]} == {"loss", "tokens-per-s", "step-time", "memory"}
    heads, *rows = page.rows[:4]
    shown = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert list(shown) == ["a/run", "b/run", f"{tmp_path.name}/_old $x^2$ <b>"]
    assert [row["ended"] for row in shown.values()] == ["done", *["not yet, or cut off"] * 2]
    assert [row["peak RSS MiB"] for row in shown.values()] == ["345", "300", "—"]
    assert [row["strategy"] for row in shown.values()] == ["ddp", "ddp", "fsdp"]
    different = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    assert different["strategy.name"] == ["ddp", "ddp", "fsdp"]
    assert different["train.steps"] == ["20", "20", "—"]
    assert "run.dir" not in different


def test_same_step_is_not_same_data(tmp_path: Path) -> None:
    """With another batch, losses are compared over tokens too."""
    one, two = made_run(tmp_path / "one"), made_run(tmp_path / "two", ended=False)
    assert "loss-by-tokens" not in {p.stem for p in report_runs([one, two], tmp_path / "out")}
    rows = [train_row(step) | {"tokens": 2000 * step} for step in range(1, 9)]
    (two / JSONL_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "loss-by-tokens" in {p.stem for p in report_runs([one, two], tmp_path / "out")}


def test_the_end_of_an_earlier_start_is_not_the_end(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    with (folder / JSONL_NAME).open("a") as file:
        file.write(json.dumps(train_row(21)) + "\n")
    [run] = read_runs([folder])
    assert run.end == {} and run.per_rank("peak_rss_bytes") == [300 * MIB]


def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = str(made_run(tmp_path / "runs" / "good"))
    for name, content in (("none", ""), ("eval", '{"kind": "eval", "step": 0, "loss": 1.0}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / JSONL_NAME).write_text(content)
    torn = made_run(tmp_path / "torn", tail='{"kind"\n')
    odd = made_run(tmp_path / "odd")
    (odd / "config.yaml").write_text("a: [")
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "sweep.json").write_text("{}")
    for words, said in (
        (["nowhere"], "there is no run folder nowhere"),
        ([good, "runs"], "not a run folder: it has no metrics.jsonl; runs inside it: good"),
        (["odd/config.yaml"], "is a file"),
        (["swept"], "it is a sweep"),
        (["none"], "no training step"),
        (["eval"], "no training step"),
        ([str(torn)], "line 23 is damaged"),
        ([str(odd)], "config.yaml is damaged"),
        ([good, "--out", "odd/config.yaml"], "cannot be written"),
        ([], "RUN"),
    ):
        assert main(["report", *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "report").exists()


def test_labels_keep_both_ends() -> None:
    assert _shortened("short\nname") == "short name"
    long = _shortened("a" * 40 + "middle" + "z" * 40)
    assert len(long) <= 44 and long.startswith("aaa") and long.endswith("zzz") and "…" in long


def test_a_long_curve_keeps_its_last_point() -> None:
    x, y = _thinned(Line("", range(12345), [None] * 12344 + [7.0], "#000000"))
    assert len(x) <= 1001 and (x[0], x[-1], y[-1]) == (0, 12344, 7.0)
    assert math.isnan(y[0])


def test_markdown_shows_what_was_said() -> None:
    assert _escaped("a_b |*x*|\n_y_ <i>") == r"a_b \|\*x\*\| \_y\_ &lt;i&gt;"


def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    assert main(["report", str(run)]) == 2
    assert f"cannot read {run / 'config.yaml'}: Is a directory" in capsys.readouterr().err


def test_odd_names_of_runs_do_not_break_the_tables(tmp_path: Path) -> None:
    names = ["a <b>|x", "two\nlines", b"not utf-8 \xff".decode("utf-8", "surrogateescape")]
    runs = [made_run(tmp_path / name) for name in names]
    (runs[0] / "config.yaml").write_text("{train: {steps: 7}}\n")  # differences have a column each
    report_runs(runs, tmp_path / "out")
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    headings = [line for line, rule in itertools.pairwise(lines) if "| ---" in rule]
    of_runs = [line for line in headings if "two" in line]
    assert of_runs
    for line in of_runs:
        assert "<b>" not in line and "lines" in line
        assert line.replace("\\|", "").count("|") == 5  # a column of keys, and one for each run
