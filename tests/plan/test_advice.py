"""What a run without memory is told: the parts add up, the ways out are real and need less."""

from __future__ import annotations

import re
from typing import Any

import pytest

from scalellm.config import parse_config
from scalellm.dist import World
from scalellm.plan.advice import advice, explain
from scalellm.plan.forecast import predicted_peak_bytes

GIB = 1 << 30
VALUES: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_heads": 4,
        "vocab_size": 8000,
        "seq_len": 256,
    },
    "train": {"global_batch_size": 64},
}


def ways_of(text: str) -> dict[str, float]:
    return {label: float(size) for label, size in re.findall(r"^  (.+): ([\d.]+) GiB$", text, re.M)}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_parts_add_up_and_each_way_out_is_what_the_planner_says(device_type: str) -> None:
    made = parse_config(VALUES)
    text = advice(made, 1, device_type, GIB)
    peak = float(re.findall(r"peak of a rank: ([\d.]+) GiB", text)[0])
    assert peak == pytest.approx(predicted_peak_bytes(made, 1, device_type) / GIB, abs=0.01)
    parts = [float(size) for size in re.findall(r"[a-z] ([\d.]+)[,)]", text)]
    assert sum(parts) == pytest.approx(peak, abs=0.05)
    assert ("process and heap" in text) is (device_type == "cpu")
    ways = ways_of(text)
    assert len(ways) == 3 and all(size < peak for size in ways.values())
    [size] = [int(label.partition("=")[2]) for label in ways if "micro_batch_size" in label]
    predicted = {}
    for rows in (size, 2 * size):
        train = {"global_batch_size": 64, "micro_batch_size": rows}
        changed = parse_config({**VALUES, "train": train})
        predicted[rows] = predicted_peak_bytes(changed, 1, device_type) / GIB
    assert ways[f"train.micro_batch_size={size}"] == pytest.approx(predicted[size], abs=0.01)
    # The largest that fits into 1 GiB, whose tensors may take 0.95 of 0.95 of it.
    assert 1 <= size < 64 and predicted[2 * size] > 0.9


def test_a_failure_of_the_advice_is_no_second_failure() -> None:
    missing = parse_config({**VALUES, "data": {"path": "/nowhere/at/all"}})
    assert explain(missing, World()) == ""
