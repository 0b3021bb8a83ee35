"""Meters, one definition each. Units are in the names."""

from __future__ import annotations

import resource
import sys
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
