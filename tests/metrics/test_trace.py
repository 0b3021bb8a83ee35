"""What is read from a trace: self times, transfers, memory; on made traces, where it is exact."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm.metrics.trace import STEP_SPAN, memory_timeline, summarize

Values = dict[str, Any]


def _span(name: str, ts: float, dur: float, cat: str = "cpu_op", **arguments: Any) -> Values:
    tid = arguments.pop("tid", 1)
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": arguments
    }  # fmt: skip


STEP = _span(f"{STEP_SPAN}4", 0, 1000, "user_annotation")


def test_self_time_leaves_out_what_is_called() -> None:
    events = [
        STEP,
        _span("outer", 10, 100),
        _span("inner", 20, 30),
        _span("inner", 60, 20),
        _span("innermost", 62, 5),
        _span("inner", 10, 100, tid=2),  # at the same time in another thread
        _span("late", 2000, 500),
    ]
    operators = {row["name"]: row for row in summarize({"traceEvents": events})["operators"]}
    assert set(operators) == {"outer", "inner", "innermost"}
    assert operators["outer"]["self_s"] == pytest.approx(50e-6)
    assert operators["inner"]["self_s"] == pytest.approx(145e-6)
    assert operators["inner"]["calls"] == 3
    assert sum(row["share"] for row in operators.values()) == pytest.approx(1)


def test_on_a_gpu_operators_are_charged_for_their_kernels_and_nccl_for_communication() -> None:
    """As torch writes them with CUDA and NCCL; a recorded trace needs two GPUs."""
    events = [
        STEP,
        _span("aten::mm", 10, 50, **{"External id": 7}),
        _span("gemm", 100, 300, "kernel", tid=9, **{"External id": 7}),
        _span("split_k", 400, 100, "kernel", tid=9, **{"External id": 7}),
        _span("fill", 500, 10, "kernel", tid=9, **{"External id": 99}),
        _span("c10d::allreduce_", 60, 20, **{
            "External id": 8, "Input Dims": [[[100], [28]], []], "Input type": ["TensorList", ""]
        }),
        _span("record_param_comms", 65, 5, dtype="BFloat16", **{"External id": 9}),
        _span("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 450, 200, "kernel", tid=8, **{
            "External id": 9, "Collective name": "allreduce", "In msg nelems": 128,
            "Out msg nelems": 128, "dtype": "BFloat16",
        }),
    ]  # fmt: skip
    summary = summarize({"traceEvents": events})
    assert [(row["name"], row["calls"]) for row in summary["operators"]] == [
        ("aten::mm", 1),
        ("fill", 1),
    ]
    assert summary["operators"][0]["self_s"] == pytest.approx(400e-6)
    [moved] = summary["communication"]["by_operation"]
    assert (moved["name"], moved["bytes_per_step"]) == ("all_reduce", 256)
    assert moved["time_s_per_step"] == pytest.approx(200e-6)
    # Alone in its world NCCL starts no kernel: the type is in its note.
    alone = summarize({"traceEvents": events[:-1]})["communication"]
    assert (alone["bytes_per_step"], alone["time_s_per_step"]) == (256, 0)


def test_overlapping_transfers_count_once() -> None:
    def asked(ts: float, size: int) -> Values:
        return _span(
            "c10d::_allgather_base_", ts, 1, **{
                "Input Dims": [[2 * size], [size], []], "Input type": ["float", "float", ""]
            },
        )  # fmt: skip

    def carried(ts: float, size: int) -> Values:
        dims = {"Input Dims": [[size]], "Input type": ["float"]}
        return _span("gloo:all_gather", ts, 100, "user_annotation", tid=2, **dims)

    events = [STEP, asked(1, 8), asked(3, 16), carried(20, 16), carried(70, 8)]
    moved = summarize({"traceEvents": events})["communication"]
    assert moved["bytes_per_step"] == 4 * 2 * (8 + 16)
    assert moved["time_s_per_step"] == pytest.approx(150e-6)


def test_memory_over_time_is_read_from_the_trace(tmp_path: Path) -> None:
    with torch.profiler.profile(profile_memory=True) as recorder:
        kept = torch.ones(1000)
        torch.ones(500)
    recorder.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    before, *_ = sizes = [size for _, size, _ in memory_timeline(trace, device_type=0)]
    changes = [after - size for size, after in itertools.pairwise(sizes)]
    assert changes == [2000, -2000] and before >= kept.nbytes
    assert memory_timeline(trace) == []  # no GPU


def test_a_transfer_is_paired_with_the_request_of_its_size() -> None:
    """Gloo has two threads: the second request may be the first to start."""
    floats = {"Input type": ["float", "float"]}
    events = [
        STEP,
        _span("c10d::_reduce_scatter_base_", 1, 1, **floats, **{"Input Dims": [[8], [16]]}),
        _span("c10d::allreduce_", 3, 1, **{"Input Dims": [[[5]]], "Input type": ["TensorList"]}),
        _span("gloo:all_reduce", 20, 10, tid=2, **floats, **{"Input Dims": [[5]]}),
        _span("gloo:all_reduce", 40, 300, tid=3, **floats, **{"Input Dims": [[16]]}),
    ]
    moved = summarize({"traceEvents": events})["communication"]["by_operation"]
    assert [(row["name"], row["bytes_per_step"]) for row in moved] == [
        ("reduce_scatter", 64),
        ("all_reduce", 20),
    ]
    assert [row["time_s_per_step"] for row in moved] == pytest.approx([300e-6, 10e-6])
