"""`--profile`: a few steps of rank 0 recorded, and what they say, in the run's `profile/` folder.

trace-rank-0.json   every operator and collective; open it at https://ui.perfetto.dev
operators.txt       the ten costliest operators
summary.json        the same as numbers, with the communication per step
memory.json         on a GPU: allocated bytes over time

The other ranks record nothing and only wait longer for rank 0. Off, it costs a step one call.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from scalellm.config import Config, ProfileConfig
from scalellm.dist import World
from scalellm.metrics.trace import STEP_SPAN, memory_timeline, summarize

FOLDER = "profile"
TRACE = "trace-rank-0.json"
OPERATORS = "operators.txt"
SUMMARY = "summary.json"
MEMORY = "memory.json"
NOTHING = (0, -1)  # a window without a step
_QUIET = "6"  # above kineto's two lines about its own start and end


class Profiler:
    """Records the steps of `window` on rank 0, counted from the first it is told of."""

    def __init__(self, config: Config, world: World) -> None:
        self._config = config.profile
        self._steps = config.train.steps
        self._is_on = config.profile.enabled and world.is_main
        self._folder = config.run.dir / FOLDER
        self._on_gpu = world.device.type == "cuda"
        self._window: tuple[int, int] | None = None
        self._profile: profile | None = None
        self._is_recording = False
        self._recorded = 0

    def step(self, number: int) -> AbstractContextManager[object]:
        """Returns the context of training step `number`."""
        if not self._is_on:
            return nullcontext()
        if self._window is None:
            self._window = window(self._config, number - 1, self._steps)
            if self._window == NOTHING:
                _say("the only step left is the one that compiles; nothing is recorded")
        first, last = self._window
        # The step before the first warms up what records, which takes a second on a GPU.
        return self._near(number, first, last) if first - 1 <= number <= last else nullcontext()

    def close(self) -> None:
        """Writes what there is if the run ends early."""
        if self._profile is None or not self._is_recording:
            return
        self._is_recording = False
        self._profile.stop_trace()
        if self._recorded:
            self._try_to_write(self._profile)

    @contextmanager
    def _near(self, number: int, first: int, last: int) -> Iterator[None]:
        if self._profile is None:
            self._profile = self._make()
            self._profile.prepare_trace()
        if number < first:
            yield
            return
        if number == first:
            self._profile.start_trace()
            self._is_recording = True
        with record_function(f"{STEP_SPAN}{number}"):
            yield
        self._recorded += 1
        if number == last:
            self.close()

    def _make(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu]
        return profile(activities=activities, record_shapes=True, profile_memory=self._on_gpu)

    def _try_to_write(self, recorder: profile) -> None:
        """A full disk costs the profile, not the training."""
        try:
            write_profile(self._folder, recorder, self._recorded)
        except (OSError, ValueError) as error:  # ValueError: a trace that was cut off
            _say(f"{self._folder} cannot be written: {getattr(error, 'strerror', error)}")
            return
        steps = "1 step" if self._recorded == 1 else f"{self._recorded} steps"
        _say(f"{steps} of rank 0 in {self._folder}; open {TRACE} at https://ui.perfetto.dev")


def window(config: ProfileConfig, step: int, steps: int) -> tuple[int, int]:
    """Returns the first and the last step to record, or NOTHING.

    A run that is too short for all that was asked for skips less, but always its first step, which
    compiles; then it records less.
    """
    skipped = max(1, min(config.skip_steps, steps - step - config.steps))
    first, last = step + skipped + 1, min(step + skipped + config.steps, steps)
    return (first, last) if first <= last else NOTHING


def write_profile(folder: Path, recorder: profile, complete_steps: int) -> None:
    """Writes all files of a stopped recorder. Raises OSError or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / f".{TRACE}.raw.json"
    try:
        recorder.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text(encoding="utf-8"))
    finally:
        raw.unlink(missing_ok=True)
    trace["traceName"] = TRACE
    summary = summarize(trace, complete_steps)
    memory = memory_timeline(trace)
    if memory:
        trace["traceEvents"] += _counters(memory)
        _write(folder / MEMORY, json.dumps(_memory_values(memory)))
    _write(folder / TRACE, json.dumps(trace))
    _write(folder / OPERATORS, operators_text(summary))
    _write(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def operators_text(summary: dict[str, Any]) -> str:
    """The ten costliest operators as a table for people."""
    lines = [
        f"{summary['steps']} steps of {summary['step_s'] * 1e3:.1f} ms on rank 0; self time is "
        "without the operators that an operator calls",
        "",
        f"{'self ms/step':>12} {'share':>7} {'calls/step':>11}  operator",
    ]
    for row in summary["operators"]:
        self_ms = row["self_s"] * 1e3 / summary["steps"]
        calls = row["calls"] / summary["steps"]
        lines.append(f"{self_ms:12.3f} {row['share']:7.1%} {calls:11.1f}  {row['name']}")
    return "\n".join(lines) + "\n"


def _memory_values(memory: list[list[float]]) -> dict[str, Any]:
    start_us = memory[0][0]
    return {
        "peak_allocated_bytes": max(allocated for _, allocated, _ in memory),
        "columns": ["time_s", "allocated_bytes", "reserved_bytes"],
        "timeline": [[(ts - start_us) / 1e6, *sizes] for ts, *sizes in memory],
    }


def _counters(memory: list[list[float]]) -> list[dict[str, Any]]:
    """Makes Perfetto draw the memory as a curve above the operators."""
    return [
        {
            "ph": "C",
            "name": "device memory",
            "pid": os.getpid(),
            "ts": ts,
            "args": {"allocated_bytes": allocated, "reserved_bytes": reserved},
        }
        for ts, allocated, reserved in memory
    ]


def _say(text: str) -> None:
    tqdm.write(f"profile: {text}", file=sys.stderr)  # above the progress bar, if there is one


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
