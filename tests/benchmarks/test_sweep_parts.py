"""The parts of `bench sweep`: its cells and their order, figures, reasons of failure, the peak."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def cells(**given: Any) -> list[Any]:
    from _sweep_cells import make_cells

    asked = {
        "sizes": ["tiny"],
        "precisions": ["fp32"],
        "compile": ["off"],
        "activation_checkpointing": ["none"],
        "scaling": "strong",
        "variants": ["ddp"],
        "worlds": [1, 2],
        "batch": 8,
        "seq_len": None,
        "threads": 4,
        "device": "cpu",
        **given,
    }
    return make_cells(argparse.Namespace(**asked))


# -- cells ------------------------------------------------------------------------------------


def test_the_product_of_all_axes() -> None:
    found = cells(
        sizes=["tiny", "13m"],
        precisions=["fp32", "bf16"],
        compile=["off", "on"],
        activation_checkpointing=["none", "full"],
        variants=["ddp", "fsdp"],
    )
    assert len({cell.id for cell in found}) == len(found) == 2**6
    assert "13m/fsdp@2/bf16/compile/full" in {cell.id for cell in found}
    assert {(cell.world_size, cell.threads_per_rank) for cell in found} == {(1, 4), (2, 2)}


def test_strong_and_weak() -> None:
    found = {cell.id: cell.global_batch_size for cell in cells(scaling="both")}
    assert found == {
        "tiny/ddp@1/fp32/eager/none": 8,
        "tiny/ddp@2/fp32/eager/none": 8,
        "tiny/ddp@2/fp32/eager/none/weak": 16,
    }


def test_repeats_go_back_and_forth_and_profiles_come_last() -> None:
    from _sweep_cells import schedule

    words = [str(task) for task in schedule(cells(), repeats=2, profile=True)]
    first = words[: len(words) // 2]
    assert first[:2] == ["GEMM fp32, 1 x 4 threads repeat 1", "GEMM fp32, 2 x 2 threads repeat 1"]
    assert first[2:] == [f"tiny/ddp@{world}/fp32/eager/none repeat 1" for world in (1, 2)]
    back = [word.replace("repeat 2", "repeat 1") for word in words[4:8]]
    assert back == first[::-1]
    assert words[8:] == ["tiny/ddp@2/fp32/eager/none profile"]


@pytest.mark.parametrize(
    ("variant", "precision", "bytes_per_parameter"),
    [
        ("ddp", "fp32", 16),
        ("ddp", "fp64", 32),
        ("fsdp", "fp32", 8),
        ("deepspeed-1", "fp32", 4 + 4 + 12 / 2),
        ("deepspeed-3", "fp32", 8),
        ("deepspeed-2", "bf16", 2 + 2 / 2 + 12 / 2),
    ],
)
def test_theory(variant: str, precision: str, bytes_per_parameter: float) -> None:
    [cell] = cells(variants=[variant], precisions=[precision], worlds=[2])
    assert cell.theory_bytes() == pytest.approx(bytes_per_parameter * cell.parameters, abs=1)


# -- figures ----------------------------------------------------------------------------------


def rows(steps: int) -> Iterator[dict[str, Any]]:
    for step in range(1, steps + 1):
        parts = {"data_wait_s": 0.1, "forward_s": 0.2, "backward_s": 0.4, "optimizer_s": 0.2}
        speed = {"tokens_per_s": 100.0 * step, "step_time_s": 1.0}
        yield {"kind": "train", "step": step, "loss": 5.0 - step, **speed, **parts}
    memory = {"baseline_rss_bytes": [10, 20], "peak_rss_bytes": [110, 220]}
    more = {"peak_device_bytes": [0, 0], "startup_s": 3.0, "first_step_s": 2.0}
    yield {"kind": "end", "step": steps, "goodput_tokens_per_s": 50.0, **memory, **more}


def write_rows(path: Path, found: Iterator[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_warm_up_is_left_out_and_each_repeat_has_its_own_peak(tmp_path: Path) -> None:
    from _sweep_figures import make_report, to_markdown
    from _sweep_run import read_figures

    figures = read_figures(write_rows(tmp_path / "metrics.jsonl", rows(5)), warmup=2)
    [cell] = cells(worlds=[2])
    entries: list[dict[str, Any]] = []
    for repeat, peak in ((1, 1e9), (2, 2e9)):
        entries.append(
            {"kind": "gemm", "repeat": repeat, "gemm": list(cell.gemm), "flops_per_s": peak}
        )
        run = {"kind": "run", "cell": cell.id, "repeat": repeat, "status": "ok", "reason": None}
        entries.append({**run, "figures": figures})
    environment = {"processor": "P", "cores": 2, "versions": {"torch": "2"}}
    config = {"repeats": 2, "steps": 5, "warmup": 2}
    head = {"config": config, "environment": environment, "started": "now"}
    report = make_report(head, entries, [cell], {}, None)
    [found] = report["cells"]
    assert found["tokens_per_s"] == {
        "median": 400.0, "low": 325.0, "high": 475.0, "runs": [400.0, 400.0]
    }  # fmt: skip
    assert found["rss_above_baseline_bytes"] == [100, 200]
    assert found["step"]["other_s"] == pytest.approx(0.1)
    assert found["losses"] == [4.0, 3.0, 2.0, 1.0, 0.0]
    # 300, 400, 500 tokens/s against one peak and against twice as much: 150, 200, 250, 300, ...
    assert found["mfu"]["median"] == pytest.approx(275 * cell.flops_per_token / 1e9)
    assert "| 400 | 325 to 475 | 1.00 | 0/0 |" in to_markdown(report)


def test_a_run_without_its_last_row_has_no_figures(tmp_path: Path) -> None:
    from _sweep_run import read_figures

    from scalellm.errors import UserError

    unfinished = write_rows(tmp_path / "metrics.jsonl", iter(list(rows(5))[:-1]))
    with pytest.raises(UserError, match="5 steps and no last row"):
        read_figures(unfinished, warmup=2)


@pytest.mark.parametrize(
    ("code", "log", "status", "reason"),
    [
        (2, "x\nscalellm: train.steps=0 is wrong\nnoise\n", "failed", "train.steps=0 is wrong"),
        (1, "Traceback\n  File\nValueError: seven\nwarning\n", "failed", "ValueError: seven"),
        (1, "first\nlast\n", "failed", "last"),
        (1, "", "failed", "it said nothing"),
        (2, "scalellm: out of memory; lower x\nscalellm: y\n", "out of memory", "lower x"),
        (1, "scalellm: rank 1 was ended by SIGKILL (out of memory?); go on with --resume auto\n"
            "RuntimeError: peer\n", "out of memory", "rank 1 was ended by SIGKILL"),
        (-9, "step 3\n", "out of memory", "SIGKILL"),
        (137, "", "out of memory", "SIGKILL"),
    ],
)  # fmt: skip
def test_why_a_run_failed(code: int, log: str, status: str, reason: str) -> None:
    from _sweep_run import explain_failure

    found, why = explain_failure(code, log)
    assert found == status
    assert reason in why
    assert "--resume auto" not in why


def test_the_peak_of_processes_adds_up() -> None:
    from _gemm import measure

    one = measure("fp32", threads=1, processes=1, seconds=0.1, device="cpu")
    assert 1e8 < one < 1e14
    with pytest.raises(RuntimeError, match="KeyError: 'fp31'"):
        measure("fp31", threads=1, processes=1, seconds=0.1, device="cpu")
