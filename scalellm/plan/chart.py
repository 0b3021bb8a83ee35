"""Memory as stacked bars: by strategy and world size, and beside what runs have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.config import Config, parse_config
from scalellm.errors import ConfigError, UserError
from scalellm.plan._ranks import batches_of, data_world_size
from scalellm.plan.candidates import Values, merged, variants
from scalellm.plan.choose import Estimate
from scalellm.plan.devices import Device
from scalellm.plan.forecast import beside_bytes
from scalellm.plan.memory import estimate
from scalellm.plan.types import Memory
from scalellm.report import charts
from scalellm.report.charts import Stack
from scalellm.report.document import Chart
from scalellm.report.runs import Run

_GB = 1e9
_KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary")
_BESIDE = "process and heap"
# Of the ranks asked for: how memory falls with the world shows in so few.
_SHARES = (16, 4, 1)


@dataclass(frozen=True)
class Planned:
    """A row: what is predicted for a rank, and what was measured, if anything was.

    `beside_bytes` is what its process has beside tensors, where that is the same memory.
    """

    label: str
    memory: Memory
    beside_bytes: int = 0
    measured_bytes: float | None = None

    @property
    def total_bytes(self) -> int:
        return self.memory.peak_bytes + self.beside_bytes


def memory_figure(rows: Sequence[Planned], limit_bytes: int | None = None) -> Any:
    """Draws a bar a row; a dashed line where the device is full, a tick where it was measured."""
    has_beside = any(row.beside_bytes for row in rows)
    has_mark = any(row.measured_bytes is not None for row in rows)
    stacks = []
    for row in rows:
        parts = [getattr(row.memory, f"{kind}_bytes") / _GB for kind in _KINDS]
        parts += [row.beside_bytes / _GB] if has_beside else []
        mark = None if row.measured_bytes is None else row.measured_bytes / _GB
        stacks.append(Stack(row.label, parts, _text(row), mark=mark))
    names = (*_KINDS, _BESIDE) if has_beside else _KINDS
    return charts.stacks(
        stacks,
        names,
        "GB a rank",
        mark="measured" if has_mark else "",
        reference=None if limit_bytes is None else limit_bytes / _GB,
        reference_name="" if limit_bytes is None else "usable",
    )


def _text(row: Planned) -> str:
    if row.measured_bytes is None:
        return f"{row.total_bytes / _GB:.2f}"
    ratio = row.total_bytes / row.measured_bytes
    return f"{row.total_bytes / _GB:.2f} ({ratio:.2f})"


def by_strategy_and_world(
    values: Values, world_size: int, device: Device, estimator: Estimate
) -> list[Planned]:
    """Returns a row for each strategy on so many ranks and on fewer, all else as the config says.

    The micro-batch and its accumulation stay what they are for a rank of `world_size`. What cannot
    be is left out.
    """
    batches = batches_of(parse_config(dict(values)), world_size)
    worlds = sorted({max(1, world_size // share) for share in _SHARES})
    precision = parse_config(dict(values)).train.precision
    labels: dict[str, dict[int, Any]] = {}
    for world in worlds:
        for label, options in variants(world, device, precision).items():
            labels.setdefault(label, {})[world] = options
    rows = []
    for label, by_world in labels.items():
        for world, options in by_world.items():
            changes = {"strategy": options}
            try:
                ranks = data_world_size(parse_config(merged(values, changes)), world)
                samples = batches.micro_batch_size * batches.grad_accumulation * ranks
                train = {"global_batch_size": samples, "micro_batch_size": batches.micro_batch_size}
                memory = estimator(parse_config(merged(values, {**changes, "train": train})), world)
            except ConfigError:
                continue
            rows.append(Planned(f"{label}, {world:,} ranks" if world > 1 else label, memory))
    return rows


def run_rows(runs: Sequence[Run]) -> list[Planned]:
    """Returns the rows of finished runs; those that the planner does not know are left out."""
    rows = []
    for run in runs:
        on_gpu = any(run.per_rank("peak_device_bytes"))
        key = "peak_device_bytes" if on_gpu else "peak_rss_bytes"
        # Of the steps: the last row's own peak has the save at the end in it.
        peaks = run.pairs(key)[1]
        if not run.end or not peaks:
            continue
        baseline = 0.0 if on_gpu else run.per_rank("baseline_rss_bytes")[0]
        world_size = int(run.end["world_size"])
        try:
            config = parse_config(run.config, source=run.label)
            rows.append(
                planned(run.label, config, world_size, max(peaks) - baseline, on_gpu=on_gpu)
            )
        except UserError:
            continue
    return rows


def planned(
    label: str, config: Config, world_size: int, measured_bytes: float, *, on_gpu: bool
) -> Planned:
    """Returns the row of what was measured in a run. Raises UserError as `estimate` does."""
    device_type = "cuda" if on_gpu else "cpu"
    memory = estimate(config, world_size, device_type)
    beside = beside_bytes(config, world_size, memory, device_type)
    return Planned(label, memory, beside, measured_bytes)


def measured_chart(rows: Sequence[Planned], name: str = "planned-memory") -> list[Chart]:
    """Returns the chart for a report; none without rows."""
    if not rows:
        return []
    caption = (
        "Bar: what the planner predicts for a rank at the worst moment of a step, from the config "
        "alone; in brackets over what was measured. Tick: the most that rank 0 had in the training "
        "steps; resident memory counts from before the model was built."
    )
    return [Chart(name, "Memory, predicted and measured", caption, memory_figure(rows))]
