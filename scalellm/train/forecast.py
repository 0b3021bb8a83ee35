"""What the planner predicted of a run's memory, said beside what the run really took.

The planner knows the trainer and not the other way round: a `Forecast` is handed in by whoever
starts the run. It works beside the run, is asked and never waited for.
"""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm import tqdm

from scalellm.dist import World
from scalellm.metrics import Row

# The first step makes the optimizer's state: the second is the first that has all there will be.
_STEPS_TO_PEAK = 2


class Forecast(Protocol):
    """Predicts the peak of rank 0 in the background; whatever fails in it, the run goes on."""

    def peak_bytes(self) -> int | None:
        """The peak, as `MemoryWatch` measures it; None while, or because, it is not known."""


class MemoryWatch:
    """Says on rank 0 what is predicted, and after the first steps by how much it was off.

    Measured are bytes of the device, or on a CPU resident ones above those before the model.
    """

    def __init__(self, forecast: Forecast | None, world: World) -> None:
        self._forecast = forecast
        self._on_cpu = world.device.type == "cpu"
        self._steps = 0
        self._said = self._compared = False
        self.predicted_bytes: int | None = None
        self.baseline_rss_bytes = 0

    def before_step(self) -> None:
        """Says what is predicted, once it is known."""
        if self._forecast is None or self._said:
            return
        self.predicted_bytes = self._forecast.peak_bytes()
        if self.predicted_bytes is not None:
            self._said = True
            _say(f"predicted peak: {_gib(self.predicted_bytes)} on rank 0")

    def after_step(self, row: Row) -> None:
        """Says how far off it was, once the run has all it will hold."""
        self._steps += 1
        if self.predicted_bytes is None or self._compared or self._steps < _STEPS_TO_PEAK:
            return
        self._compared = True
        measured_bytes = row["peak_device_bytes"]
        if self._on_cpu:
            measured_bytes = row["peak_rss_bytes"] - self.baseline_rss_bytes
        error = self.predicted_bytes / max(1, measured_bytes) - 1
        _say(
            f"peak so far: {_gib(measured_bytes)}, predicted {_gib(self.predicted_bytes)} "
            f"({error:+.1%})"
        )


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
