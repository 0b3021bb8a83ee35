"""The fastest matrix product here and now: what a run's model FLOPs are compared with.

    python benchmarks/_gemm.py PRECISION THREADS SECONDS DEVICE RANK

is one process of a measurement: it warms up, says "ready", and after a line on stdin multiplies for
so many seconds and prints its best FLOP/s. `measure` starts several at once and adds them up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from _processes import end_tree, start

if TYPE_CHECKING:
    import torch

SIZE = {"cpu": 2048, "cuda": 8192}
TIMEOUT_S = 300.0
_LEAST_PRODUCTS = 3
_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
Way = Callable[[], AbstractContextManager[None]]


def measure(precision: str, threads: int, processes: int, seconds: float, device: str) -> float:
    """Returns FLOP/s of `processes` that multiply at once, `threads` each, added up.

    Raises:
        RuntimeError: one of them failed, with the last line it wrote.
    """
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [precision, str(threads), str(seconds), device]
    started = [
        start(
            [sys.executable, __file__, *words, str(rank)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # "ready", or nothing from one that failed
        return sum(_answers(started))
    finally:
        for process in started:
            end_tree(process)


def _answers(started: list[subprocess.Popen[str]]) -> Iterator[float]:
    for process in started:
        assert process.stdin is not None
        if process.poll() is None:
            process.stdin.write("go\n")
            process.stdin.flush()
    for process in started:
        try:
            out, error = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer within {TIMEOUT_S:g} s") from None
        if process.returncode:
            raise RuntimeError(([*error.splitlines()] or ["it said nothing"])[-1])
        yield float(out)


def main(argv: list[str]) -> int:
    import torch

    precision, threads, seconds, device, rank = argv
    torch.set_num_threads(int(threads))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, _DTYPES[precision])
    place = torch.device(device, int(rank)) if device == "cuda" else torch.device(device)
    a, b = (torch.randn(SIZE[device], SIZE[device], device=place).to(dtype) for _ in range(2))
    ways = list(_ways(precision, a, b))
    for way in ways:
        with way():
            a @ b
    print("ready", flush=True)
    sys.stdin.readline()
    best_s = min(_best_s(way, a, b, float(seconds) / len(ways)) for way in ways)
    print(2 * SIZE[device] ** 3 / best_s, flush=True)
    return 0


def _ways(precision: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[Way]:
    """The ways to multiply in this precision; the best of them is the peak."""
    yield nullcontext
    if precision != "fp32" or a.device.type != "cpu":
        return
    from scalellm.products import onednn_keeps_fp32, through_onednn

    if onednn_keeps_fp32():
        yield through_onednn


def _best_s(way: Way, a: torch.Tensor, b: torch.Tensor, seconds: float) -> float:
    import torch

    def finish() -> None:
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)

    best_s, count, deadline_s = float("inf"), 0, time.perf_counter() + seconds
    with way():
        while count < _LEAST_PRODUCTS or time.perf_counter() < deadline_s:
            finish()
            started_s = time.perf_counter()
            a @ b
            finish()
            best_s, count = min(best_s, time.perf_counter() - started_s), count + 1
    return best_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
