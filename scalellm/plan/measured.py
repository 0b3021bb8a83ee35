"""Measured runs, read from their folders, for the calibration; a calibrated device, written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from scalellm.config import parse_config
from scalellm.errors import UserError
from scalellm.metrics import JSONL_NAME
from scalellm.plan.calibrate import Calibration, Measured, merged_repeats
from scalellm.plan.devices import Device
from scalellm.report.runs import Run, read_runs

# The first steps allocate, compile and find their buckets.
_WARMUP_STEPS = 2


def find_runs(folders: Sequence[Path], device: Device) -> list[Measured]:
    """Returns the runs in folders of runs, in folders of such folders, or of a sweep.

    Runs that have not ended, or took fewer than three steps, tell no speed and are left out.
    Repeats of one run count as one.

    Args:
        device: of a whole machine if it is a CPU; each run's ranks have their parts of it.

    Raises:
        UserError: a folder holds no run at all, or a damaged one; a run was not trained on such a
            device.
    """
    found = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"**/{JSONL_NAME}"))
        if not inside:
            raise UserError(f"--calibrate: there is no run in {folder}: no {JSONL_NAME}")
        found += [one for one in inside if "profile" not in one.relative_to(folder).parts]
    runs = [_measured(run, device) for run in read_runs(found)]
    return merged_repeats(run for run in runs if run is not None)


def _measured(run: Run, device: Device) -> Measured | None:
    rows = [row for row in run.train if row["step"] > run.train[0]["step"] + _WARMUP_STEPS - 1]
    times = [row["step_time_s"] - row.get("data_wait_s", 0.0) for row in rows]
    if not run.end or not times:
        return None
    ran_on_gpu = bool(run.environment.get("gpu")) and run.setting("run", "device") != "cpu"
    if ran_on_gpu == device.is_cpu:
        there = run.environment.get("gpu") if ran_on_gpu else "a CPU"
        raise UserError(
            f"--calibrate: {run.label} ran on {there}, which is not --device {device.name}; leave "
            "it out, or name the device it ran on"
        )
    world_size = int(run.end["world_size"])
    config = parse_config(run.config, source=run.label)
    mine = device.divided(world_size, _core_share(run, world_size)) if device.is_cpu else device
    return Measured(run.label, config, world_size, median(times), mine)


def _core_share(run: Run, world_size: int) -> float:
    """Threads of a rank over its part of the cores; more threads than cores gain nothing."""
    threads, cores = run.environment.get("threads_per_rank"), run.environment.get("cores")
    if not threads or not cores:
        return 1.0
    return min(1.0, float(threads) * world_size / float(cores))


def device_text(device: Device, found: Calibration) -> str:
    """The device as a file for `--device FILE.yaml`, with the fitted factors."""
    values: dict[str, Any] = device.model_dump(exclude={"name"}, exclude_none=True)
    values["efficiency"] = {
        name: round(value, 4) for name, value in found.efficiency.model_dump().items()
    }
    told = ", ".join(sorted(found.told)) or "none"
    head = (
        f"# {device.name}, calibrated on {len(found.held_out)} runs; on runs left out of the fit "
        f"the step time is\n# off by {found.median_error:.1%} in the median and "
        f"{found.worst_error:.1%} at worst. Fitted: {told}; the rest is assumed.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def show_calibration(device: Device, found: Calibration) -> str:
    """The factors before and after, and each run beside what others predict for it."""
    lines = ["factor   assumed   fitted"]
    for name, value in found.efficiency.model_dump().items():
        before = getattr(device.efficiency, name)
        after = f"{value:.3f}" if name in found.told else "not told by these runs"
        lines.append(f"{name:<8} {before:7.3f}   {after}")
    width = max(len(one.run.label) for one in found.held_out)
    lines += ["", f"{'left out of the fit':<{width}}   measured  predicted  ratio"]
    for one in found.held_out:
        times = f"{one.run.step_s:9.4f}s {one.predicted_s:9.4f}s  {one.ratio:.3f}"
        lines.append(f"{one.run.label:<{width}} {times}")
    lines.append(
        f"error on runs left out: {found.median_error:.1%} in the median, {found.worst_error:.1%} "
        f"at worst, of {len(found.held_out)} runs"
    )
    return "\n".join(lines)
