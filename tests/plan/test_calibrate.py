"""Factors that are known are found again from step times; runs left out are really left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scalellm.config import parse_config
from scalellm.errors import UserError
from scalellm.plan.calibrate import Measured, calibrate, fit, merged_repeats
from scalellm.plan.devices import Device, Efficiency, find_device
from scalellm.plan.speed import step_time

TRUE = Efficiency(matrix=0.52, memory=0.63, link=0.31, host=0.8, launch=0.4, fused=0.33)
# (hidden, seq_len, rows of a rank, ranks, strategy, compile): some of each kind of time.
SHAPES: list[tuple[int, int, int, int, str, bool]] = [
    (4096, 4096, 4, 1, "single", False),
    (2048, 2048, 8, 1, "single", False),
    (256, 128, 4, 1, "single", False),
    (128, 256, 2, 1, "single", False),
    (1024, 1024, 8, 1, "single", True),
    (2048, 512, 16, 1, "single", True),
    (256, 2048, 8, 1, "single", True),
    (128, 128, 4, 1, "single", True),
    (4096, 1024, 1, 8, "fsdp", False),
    (4096, 512, 1, 16, "fsdp", False),
    (2048, 256, 2, 8, "ddp", False),
    (4096, 256, 1, 8, "ddp", True),
]


def a100() -> Device:
    """With the assumed efficiencies, to begin from."""
    return find_device("a100-80g").model_copy(update={"efficiency": Efficiency()})


def run(shape: tuple[int, int, int, int, str, bool], device: Device, error: float = 0) -> Measured:
    hidden, seq_len, rows, ranks, strategy, compiles = shape
    values: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": hidden,
            "num_heads": hidden // 64,
            "vocab_size": 8192,
            "seq_len": seq_len,
        },
        "strategy": {"name": strategy},
        "train": {"global_batch_size": rows * ranks, "precision": "bf16", "compile": compiles},
    }
    config = parse_config(values)
    step_s = step_time(config, ranks, device, TRUE).total_s * np.exp(error)
    return Measured("/".join(map(str, shape)), config, ranks, step_s, device)


@pytest.fixture(scope="module")
def runs() -> list[Measured]:
    noise = np.random.default_rng(0).normal(0, 0.01, len(SHAPES))
    device = a100()
    return [run(shape, device, error) for shape, error in zip(SHAPES, noise, strict=True)]


def test_known_factors_are_found_again(runs: list[Measured]) -> None:
    found = calibrate(runs)
    for name in ("matrix", "memory", "link", "launch", "fused"):
        assert name in found.told
        assert getattr(found.efficiency, name) == pytest.approx(getattr(TRUE, name), rel=0.06)
    assert found.median_error < 0.03
    assert found.worst_error < 0.1
    assert "host" not in found.told and found.efficiency.host == Efficiency().host


def test_the_error_on_runs_left_out_is_not_that_of_the_fit(runs: list[Measured]) -> None:
    """A run that disagrees with all others is predicted by them, not by itself."""
    odd = replace(runs[0], step_s=3 * runs[0].step_s)
    found = calibrate([odd, *runs[1:]])
    assert found.held_out[0].run is odd
    assert found.held_out[0].ratio == pytest.approx(1 / 3, rel=0.15)
    assert found.worst_error > 0.5


def test_many_runs_are_left_out_in_parts(runs: list[Measured]) -> None:
    device = a100()
    more = [run((512, 64 * n, 4, 1, "single", False), device) for n in range(2, 8)]
    found = calibrate([*runs, *more])
    assert [one.run for one in found.held_out] == [*runs, *more]


def test_what_runs_do_not_tell_stays(runs: list[Measured]) -> None:
    """Large products only: how fast operators are launched cannot be seen in them."""
    device = a100()
    large = [run((8192, 4096, rows, 1, "single", False), device) for rows in (1, 2, 4, 8)]
    found = calibrate(large)
    assert found.told == {"matrix"} or found.told == {"matrix", "memory"}
    assert found.efficiency.launch == 1.0 and found.efficiency.link == Efficiency().link
    assert found.worst_error < 0.05


def test_too_few_runs_are_refused(runs: list[Measured]) -> None:
    with pytest.raises(UserError, match="3 different runs and needs 4"):
        calibrate(runs[:3])


def test_repeats_are_one_run(runs: list[Measured]) -> None:
    twice = [runs[0], replace(runs[0], step_s=runs[0].step_s * 1.2), runs[1]]
    merged = merged_repeats(twice)
    assert [one.label for one in merged] == [runs[0].label, runs[1].label]
    assert merged[0].step_s == pytest.approx(1.1 * runs[0].step_s)


def test_the_update_s_own_time_tells_more_than_the_step(runs: list[Measured]) -> None:
    """One run: how fast products and the update are, told apart only by the parts of its step."""
    one = runs[0]
    time = step_time(one.config, one.world_size, one.device, TRUE)
    slow = replace(time, optimizer_s=20 * time.optimizer_s)
    whole = replace(one, step_s=slow.total_s)
    parts = replace(whole, optimizer_s=slow.optimizer_s)
    memory = [fit([run], Efficiency()).memory for run in (whole, parts)]
    assert memory[1] < memory[0]  # the update is known to be what is slow
    same = [replace(run, optimizer_s=update_s) for run, update_s in ((one, 1.0), (one, 3.0))]
    assert merged_repeats(same)[0].optimizer_s == 2.0
