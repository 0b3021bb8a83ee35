"""Meters, one definition each. Units are in the names."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident memory since it started, in bytes.

    `getrusage` counts the parent too, as large as it was when it forked: only where there is no
    other.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes(device: torch.device) -> int:
    """Largest memory the CUDA allocator handed out on `device`, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_age_s() -> float:
    """Seconds since this process was started; since this module was imported where unknown."""
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.monotonic() - _IMPORTED_S
    return up_s - int(stat[19]) / os.sysconf("SC_CLK_TCK")


_IMPORTED_S = time.monotonic()


class StepClock:
    """Divides a step's wall time into its parts: each lap goes to the part that is named.

    Host time: on a GPU, whose work is queued, the wait shows in the part that reads a result.
    """

    PARTS = ("data_wait_s", "forward_s", "backward_s", "optimizer_s")

    def __init__(self) -> None:
        self._started_s = self._last_s = time.perf_counter()
        self.seconds = dict.fromkeys(self.PARTS, 0.0)

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to `part`."""
        now_s = time.perf_counter()
        self.seconds[part] += now_s - self._last_s
        self._last_s = now_s

    def leave_out(self) -> None:
        """Takes the time since the last lap out of the step."""
        now_s = time.perf_counter()
        self._started_s += now_s - self._last_s
        self._last_s = now_s

    def total_s(self) -> float:
        return time.perf_counter() - self._started_s
