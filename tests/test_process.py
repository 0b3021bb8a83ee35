"""What a process says to its libraries: seen from outside, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scalellm.process import ENVIRONMENT, set_environment

_FREED = """
import resource
import torch
from scalellm.process import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(12)][-1])  # the heap has found its shape
"""


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    set_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_unless_the_user_says_otherwise() -> None:
    """64 MiB are 16,384 pages of 4 KiB."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}

    def faults(**settings: str) -> int:
        command = [sys.executable, "-c", _FREED]
        done = subprocess.run(
            command, env={**plain, **settings}, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults() < 100
    # 32 MiB: above it glibc maps, and gives back at once.
    limits = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
    assert faults(**limits) > 10_000
