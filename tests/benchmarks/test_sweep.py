"""`bench sweep` as a command: what it refuses, cells that fail, going on after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--sizes", "tiny", "--steps", "8", "--warmup", "3", "--gemm-s", "0.1", "--threads", "2"]
# Nothing to run: one process, but two ranks.
NOTHING = [*TINY, "--variants", "single", "--worlds", "2"]


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def sweep(out: Path, *words: str) -> int:
    return main(["bench", "sweep", *words, "--out", str(out)])


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return report


def journal(out: Path) -> list[dict[str, Any]]:
    path = out / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def test_what_cannot_be_is_skipped_with_the_strategys_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, *NOTHING, "--json", str(tmp_path / "copy.json")) == 1
    [cell] = read(tmp_path)["cells"]
    assert cell["status"] == "skipped"
    assert cell["reason"].startswith("strategy.name=single trains in one process, but --nproc 2")
    assert cell["tokens_per_s"] is None
    assert f"skipped: {cell['reason']}" in capsys.readouterr().out
    assert json.loads((tmp_path / "copy.json").read_text()) == read(tmp_path)


def test_a_folder_holds_one_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert sweep(tmp_path, *NOTHING, *words) == 2
        [sentence] = capsys.readouterr().err.splitlines()
        return sentence

    assert "holds no sweep; leave --resume out to begin one" in refused("--resume")
    sweep(tmp_path, *NOTHING)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "run", "ce')  # as a kill leaves it
    assert sweep(tmp_path, *NOTHING, "--resume") == 1
    assert [entry["kind"] for entry in journal(tmp_path)[1:]] == ["end"]
    assert read(tmp_path)["finished"] == journal(tmp_path)[-1]["finished"]
    capsys.readouterr()
    assert "already holds a sweep: add --resume to go on" in refused()
    assert "was begun with steps=8, not 9; give the same" in refused("--resume", "--steps", "9")
    assert "begun with worlds=2, not 2,3" in refused("--resume", "--worlds", "2,3")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sizes", "14m"], "no size '14m'; did you mean '124m'?"),
        (["--variants", "fsdpp"], "no variant 'fsdpp'; did you mean 'fsdp'?"),
        (["--worlds", "0,1"], "'0,1' are no numbers of ranks"),
        (["--warmup", "30"], "--warmup=30 steps must be 0 or more and below --steps=30"),
        (["--batch", "0"], "--batch=0 must be 1 or more"),
        (["--timeout-s", "-1"], "--timeout-s=-1 s must be above 0 s"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_a_wrong_word(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "out", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_failed_is_tried_again_and_what_did_not_fit_is_not(tmp_path: Path) -> None:
    import _sweep_state as state

    head = {"config": {"steps": 3}}
    statuses = ["ok", "failed", "out of memory"]
    first = state.Journal(tmp_path)
    first.begin(head, resume=False)
    for status in statuses:
        first.add({"kind": "run", "cell": status, "repeat": 0, "status": status})
    first.add({"kind": "end", "finished": "now"})
    first.close()
    second = state.Journal(tmp_path)
    second.begin(head, resume=True)
    second.close()
    assert [entry["cell"] for entry in second.entries] == ["ok", "out of memory"]
    assert journal(tmp_path)[1:] == second.entries


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    from _sweep_state import Journal

    from scalellm.errors import UserError

    first = Journal(tmp_path)
    with pytest.raises(UserError, match="in use by another sweep"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_a_run_that_takes_too_long_is_ended_whole(tmp_path: Path) -> None:
    from _sweep_cells import Cell
    from _sweep_run import run_cell

    cell = Cell("tiny", "ddp", 2, "fp32", False, "none", "strong", 8, 64, 1)
    found = run_cell(cell, tmp_path / "run", tmp_path / "data", steps=8, warmup=2, timeout_s=1.0)
    assert found == {"status": "failed", "reason": "not done after 1 s (--timeout-s)"}
    assert not processes_with(f"run.dir={tmp_path}")


def processes_with(text: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


# -- for real ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_with_a_cell_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import _sweep_cells

    huge = {"num_layers": 90, "hidden_size": 1 << 15, "num_heads": 64, "vocab_size": 512}
    monkeypatch.setitem(_sweep_cells.SIZES, "huge", {**huge, "seq_len": 64})
    words = [*TINY[2:], "--sizes", "tiny,huge", "--variants", "single,ddp", "--worlds", "2"]
    assert sweep(tmp_path, *words, "--repeats", "2") == 0
    report = read(tmp_path)
    by_id = {cell["id"]: cell for cell in report["cells"]}
    statuses = {name.partition("/fp32")[0]: cell["status"] for name, cell in by_id.items()}
    assert statuses == {
        "tiny/single@2": "skipped",
        "tiny/ddp@2": "ok",
        "huge/single@2": "skipped",
        "huge/ddp@2": "out of memory",
    }
    done = [
        (entry["kind"], entry.get("cell"), entry["repeat"]) for entry in journal(tmp_path)[1:-1]
    ]
    assert len(done) == len(set(done)) == 2 + 2 + 1 + 1  # peaks, runs, the one that failed, profile
    cell = by_id["tiny/ddp@2/fp32/eager/none"]
    speed = cell["tokens_per_s"]
    assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert len(speed["runs"]) == len(cell["startup_s"]) == len(cell["first_step_s"]) == 2
    assert len(cell["losses"]) == 8
    assert cell["losses"][-1] < cell["losses"][0]
    assert 0 < cell["mfu"]["median"] < 1
    assert 0 < cell["rss_above_baseline_bytes"][1] < cell["peak_rss_bytes"][1]
    # Every fp32 gradient is reduced once a step, and a few numbers of the loop's own.
    bytes_per_step = cell["communication"]["bytes_per_step"]
    assert bytes_per_step == pytest.approx(4 * cell["parameters"], rel=0.02)
    assert report["finished"] is not None
    assert [len(gemm["flops_per_s"]) for gemm in report["gemm"]] == [2]
    assert not list(tmp_path.glob("cells/**/checkpoints"))
    shown = capsys.readouterr().out
    assert "out of memory: 2 rank(s) here need at least" in shown
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_goes_on_after_a_signal_and_after_a_kill(tmp_path: Path) -> None:
    words = [*TINY, "--variants", "ddp", "--worlds", "1", "--repeats", "2"]
    for number, resume in ((signal.SIGTERM, []), (signal.SIGKILL, ["--resume"])):
        before = len(journal(tmp_path))
        process = begin(tmp_path, *words, *resume)
        wait_for(lambda b=before: len(journal(tmp_path)) > max(b, 1))  # something was done
        wait_for(lambda: processes_with(f"run.dir={tmp_path}"))  # and a cell is running
        process.send_signal(number)
        _, error = process.communicate(timeout=180)
        assert process.returncode == (1 if number == signal.SIGTERM else -signal.SIGKILL)
        if number == signal.SIGTERM:
            assert error.splitlines()[-1].startswith("scalellm: stopped; what is done is kept")
            assert error.splitlines()[-1].endswith("--resume")
        wait_for(lambda: not processes_with(f"run.dir={tmp_path}"))
        kept = journal(tmp_path)
    assert sweep(tmp_path, *words, "--resume") == 0
    found = journal(tmp_path)
    assert found[: len(kept)] == kept
    done = [(entry["kind"], entry["repeat"]) for entry in found[1:-1]]
    assert done == [("gemm", 1), ("run", 1), ("run", 2), ("gemm", 2)]
    before = read(tmp_path)
    [cell] = before["cells"]
    assert cell["status"] == "ok"
    assert sweep(tmp_path, *words, "--resume") == 0  # nothing is left to do
    assert read(tmp_path) == before
    assert len(cell["tokens_per_s"]["runs"]) == 2


def begin(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scalellm", "bench", "sweep", *words, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any, timeout_s: float = 300.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "nothing happened"
        time.sleep(0.1)
