"""What gloo takes for a collective, by the resident set of a real rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as tdist

from scalellm.config import parse_config
from scalellm.model import count_parameters
from scalellm.plan._record import record_events
from scalellm.plan.allocator import GLOO, MIB, Event

SENT_BYTES = 80 * MIB


def test_a_gather_takes_its_size_again_and_a_reduced_part_a_copy_of_the_whole(
    ranks: Callable[..., list[Any]],
) -> None:
    [grown] = ranks(grown_by_collectives, 1)
    assert grown["all_gather"] == pytest.approx(SENT_BYTES, rel=0.1)
    assert grown["reduce_scatter"] == pytest.approx(SENT_BYTES, rel=0.1)
    assert grown["all_reduce"] < 0.1 * SENT_BYTES


def test_the_gathers_of_a_step_are_in_its_events_on_a_cpu() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 16}
    train = {"global_batch_size": 2, "micro_batch_size": 1}
    made = parse_config({"model": shape, "strategy": {"name": "fsdp"}, "train": train})
    gathered = {
        kind: sum(e.size_bytes for e in record_events(made, 2, kind)[1] if is_gather(e))
        for kind in ("cpu", "cuda")
    }
    assert gathered["cuda"] == 0
    # Three steps, each unit for its forward and for its backward.
    assert gathered["cpu"] == 3 * 2 * 4 * count_parameters(made.model)


def is_gather(event: Event) -> bool:
    return event.stream == GLOO and event.size_bytes > 0


def grown_by_collectives() -> dict[str, int]:
    """Bytes that the highest resident set rises by in one collective."""
    whole, out = torch.ones(2, SENT_BYTES // 4)
    grown = {}
    for name, send in {
        "all_reduce": lambda: tdist.all_reduce(whole),
        "all_gather": lambda: tdist.all_gather_into_tensor(out, whole),
        "reduce_scatter": lambda: tdist.reduce_scatter_tensor(out, whole),
    }.items():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before_bytes = status_bytes("VmHWM")
        send()
        grown[name] = status_bytes("VmHWM") - before_bytes
    return grown


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) << 10
