"""What of a device's rates training reaches, fitted to the step times of measured runs.

The factors are those of `devices.Efficiency`. They are looked for in logarithms, by least squares,
each held near the assumed value as loosely as such guesses are wrong: what the runs do not tell
stays as it was, and one run more than is needed does not make a factor absurd. What the result is
worth is said by runs that were left out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from scalellm.config import Config
from scalellm.errors import UserError
from scalellm.plan.devices import Device, Efficiency
from scalellm.plan.speed import StepTime, timing
from scalellm.plan.traffic import set_up

MIN_RUNS = 4
# Standard deviations of logarithms: of a step's time beside the model, of a guess beside the truth.
_NOISE = 0.05
_GUESSES = {"matrix": 0.5, "memory": 0.5, "link": 0.5, "host": 0.5, "launch": 1.5, "fused": 0.5}
_MAX_FOLDS = 12
_ROUNDS = 40
_SLOWER_LAUNCHES = (1.0, 5.0, 25.0)
# A factor whose uncertainty has hardly shrunk was not told by the runs.
_TOLD = 0.8


@dataclass(frozen=True)
class Measured:
    """A run: what was trained, how long a step took, and what each of its ranks had.

    `device` is the one of a rank, as `find_device` returns it. `optimizer_s`, where it is known, is
    what of the step the update took.
    """

    label: str
    config: Config
    world_size: int
    step_s: float
    device: Device
    optimizer_s: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """A run and what was predicted for it from others only."""

    run: Measured
    predicted_s: float

    @property
    def ratio(self) -> float:
        """Predicted over measured step time."""
        return self.predicted_s / self.run.step_s


@dataclass(frozen=True)
class Calibration:
    """`told` are the factors that the runs have moved or confirmed; the others are as before."""

    efficiency: Efficiency
    told: frozenset[str]
    held_out: list[HeldOut]

    @property
    def median_error(self) -> float:
        return median(abs(one.ratio - 1) for one in self.held_out)

    @property
    def worst_error(self) -> float:
        return max(abs(one.ratio - 1) for one in self.held_out)


def calibrate(runs: Sequence[Measured], prior: Efficiency | None = None) -> Calibration:
    """Fits the factors to all runs; each run is also predicted by a fit without it.

    Up to twelve runs are left out one by one, more of them in twelve parts.

    Args:
        prior: what to begin from; None: the first run's device's own.

    Raises:
        UserError: fewer than four different runs.
    """
    if len(runs) < MIN_RUNS:
        raise UserError(
            f"--calibrate has {len(runs)} different runs and needs {MIN_RUNS} or more: fitted to "
            "fewer, the factors would be the noise of them"
        )
    known = prior or runs[0].device.efficiency
    points = [_point(run) for run in runs]
    efficiency, told = _fit(points, known)
    folds = min(len(points), _MAX_FOLDS)
    held_out: list[HeldOut | None] = [None] * len(points)
    for fold in range(folds):
        others = [point for index, point in enumerate(points) if index % folds != fold]
        fitted, _ = _fit(others, known)
        for index in range(fold, len(points), folds):
            held_out[index] = HeldOut(runs[index], points[index].time(fitted).total_s)
    return Calibration(efficiency, told, [one for one in held_out if one])


def fit(runs: Sequence[Measured], prior: Efficiency) -> Efficiency:
    """The factors alone, from any number of runs."""
    return _fit([_point(run) for run in runs], prior)[0]


@dataclass(frozen=True)
class _Point:
    """A run as the fit sees it: its time as a function of the factors, and which matter."""

    step_s: float
    optimizer_s: float | None
    time: Callable[[Efficiency], StepTime]
    factors: frozenset[str]

    def errors(self, efficiency: Efficiency) -> Iterator[tuple[float, float]]:
        """Yields logarithms of predicted over measured, of the step or its two parts, and weights.

        A part weighs what it has of the step.
        """
        time = self.time(efficiency)
        if not self.optimizer_s or self.optimizer_s >= self.step_s:
            yield math.log(time.total_s / self.step_s), 1.0
            return
        share = self.optimizer_s / self.step_s
        passes_s = time.total_s - time.optimizer_s
        yield math.log(time.optimizer_s / self.optimizer_s), share
        yield math.log(passes_s / (self.step_s - self.optimizer_s)), 1 - share


def _point(run: Measured) -> _Point:
    setup, train = set_up(run.config, run.world_size), run.config.train
    factors = {"matrix", "memory", "launch"}
    if run.world_size > 1:
        factors.add("link")
    if train.compile:
        factors.add("fused")
    if setup.sharding.offloaded and not run.device.is_cpu:
        factors.add("host")

    time = timing(run.config, run.world_size, run.device)
    return _Point(run.step_s, run.optimizer_s, time, frozenset(factors))


def _fit(points: Sequence[_Point], prior: Efficiency) -> tuple[Efficiency, frozenset[str]]:
    """Gauss-Newton from several starts: what launching costs is seen only where it costs most.

    Errors count linearly where they are large, so that one disturbed run does not bend all others.
    """
    names = sorted({name for point in points for name in point.factors})
    start = np.log([getattr(prior, name) for name in names])
    guesses = np.array([_GUESSES[name] for name in names])

    def efficiency(logs: np.ndarray) -> Efficiency:
        values = dict(zip(names, map(float, np.exp(logs)), strict=True))
        return prior.model_copy(update=values)

    def residuals(logs: np.ndarray) -> np.ndarray:
        shares = efficiency(logs)
        pairs = np.array([pair for point in points for pair in point.errors(shares)])
        errors = pairs[:, 0] / _NOISE
        soft = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1) * pairs[:, 1])
        return np.array([*soft, *((logs - start) / guesses)])

    found = [_descend(residuals, first) for first in _starts(names, start)]
    logs, errors = min(found, key=lambda one: float(one[1] @ one[1]))
    slopes = _slopes(residuals, logs, errors)
    widths = np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    told = {
        name for name, width in zip(names, widths, strict=True) if width < _TOLD * _GUESSES[name]
    }
    # A factor that no run tells is better left alone than moved by what ties it to another one.
    kept = [log if name in told else old for name, log, old in zip(names, logs, start, strict=True)]
    return efficiency(np.array(kept)), frozenset(told)


def _starts(names: Sequence[str], start: np.ndarray) -> Iterator[np.ndarray]:
    for slower in _SLOWER_LAUNCHES:
        moved = start.copy()
        moved[names.index("launch")] -= math.log(slower)
        yield moved


def _descend(
    residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    logs, errors = start, residuals(start)
    for _ in range(_ROUNDS):
        slopes = _slopes(residuals, logs, errors)
        change = -np.linalg.lstsq(slopes, errors, rcond=None)[0]
        improved = _improved(residuals, logs, change, errors)
        if improved is None:
            break
        moved = float(np.abs(improved[0] - logs).max(initial=0.0))
        logs, errors = improved
        if moved < 1e-5:
            break
    return logs, errors


def _slopes(
    residuals: Callable[[np.ndarray], np.ndarray], logs: np.ndarray, errors: np.ndarray
) -> np.ndarray:
    """One column a factor, by small differences."""
    width = 1e-4
    columns = [(residuals(logs + width * unit) - errors) / width for unit in np.identity(len(logs))]
    return np.stack(columns, axis=1)


def _improved(
    residuals: Callable[[np.ndarray], np.ndarray],
    logs: np.ndarray,
    change: np.ndarray,
    errors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The first of ever shorter steps that lowers the sum of squares; None: there is none."""
    before = float(errors @ errors)
    for _ in range(12):
        found = residuals(logs + change)
        if float(found @ found) < before:
            return logs + change, found
        change = change / 2
    return None


def merged_repeats(runs: Iterable[Measured]) -> list[Measured]:
    """Repeats of a run are one, of the median step: else a run would be told by its own repeat."""
    by_kind: dict[str, list[Measured]] = {}
    for run in runs:
        kind = f"{run.config.model!r} {run.config.strategy!r} {_lasting(run.config)}"
        by_kind.setdefault(f"{kind} {run.world_size} {run.device!r}", []).append(run)
    found = []
    for same in by_kind.values():
        updates = [run.optimizer_s for run in same if run.optimizer_s is not None]
        merged = replace(same[0], step_s=median(run.step_s for run in same))
        found.append(replace(merged, optimizer_s=median(updates)) if updates else merged)
    return found


def _lasting(config: Config) -> str:
    """What of the training options a step's time depends on."""
    train = config.train
    return (
        f"{train.global_batch_size} {train.micro_batch_size} {train.precision} {train.compile} "
        f"{train.activation_checkpointing} {train.grad_clip}"
    )
