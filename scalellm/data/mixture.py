"""Several datasets by weight, in stages: which row of the run is which sample of which dataset.

Every `PERIOD` rows hold exactly as many rows of each dataset as its share says, spread evenly, so
a row's dataset and its number there are two look-ups: no counting, no state, no random numbers.

Legend: n rows, U rows of a dataset in a period.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scalellm.data.order import SampleOrder
from scalellm.data.reader import TokenDataset
from scalellm.errors import ConfigError, DataError

PERIOD = 4096
MAX_WEIGHT = 1e9


def shares(weights: Mapping[str, float], where: str = "the mixture") -> dict[str, int]:
    """Returns how many of `PERIOD` rows each name gets: largest remainders, the sum is exact.

    Args:
        weights: by name, from 0 to `MAX_WEIGHT`.
        where: they come from, for the errors.

    Raises:
        ConfigError: a weight out of range, none above 0, or one too small to get a row.
    """
    for name, weight in weights.items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"{where}: the weight of {name!r} is {weight}; it must be from 0 to {MAX_WEIGHT:g}"
            )
    total = math.fsum(weights.values())
    if not total > 0:
        raise ConfigError(
            f"{where}: no weight of {', '.join(weights)} is above 0; give one to a dataset"
        )
    exact = {name: weight / total * PERIOD for name, weight in weights.items()}
    units = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: units[name] - exact[name])
    for name in by_remainder[: PERIOD - sum(units.values())]:
        units[name] += 1
    for name, weight in weights.items():
        if weight and not units[name]:
            raise ConfigError(
                f"{where}: the weight of {name!r} is {weight / total:.2g} of all, less than one "
                f"row in {PERIOD}; raise it or leave the dataset out"
            )
    return units


class Pattern:
    """Who has which row of a period: at every row each dataset is less than one row off its share.

    Tijdeman 1980, "The chairman assignment problem": of those that are behind by 1 / (2 S - 2) rows
    or more, the one that would be a whole row behind soonest. Sums are whole numbers, so every
    machine gives the same pattern.

    Attributes:
        source_of: (PERIOD,) the dataset's number of each row.
        slots: per dataset its rows, rising: (U,).
    """

    def __init__(self, units: Sequence[int]) -> None:
        self.source_of = _spread(np.asarray(units, np.int64))
        self.slots = [np.flatnonzero(self.source_of == number) for number in range(len(units))]

    def count(self, source: int, num_rows: int) -> int:
        """Returns how many of the first `num_rows` rows are of a dataset."""
        periods, rest = divmod(num_rows, PERIOD)
        slots = self.slots[source]
        return periods * len(slots) + int(np.searchsorted(slots, rest))


def _spread(units_S: np.ndarray) -> np.ndarray:
    """Returns which dataset has each row: (PERIOD,) int64."""
    used = np.flatnonzero(units_S)
    units = units_S[used]
    scale = max(2 * len(units) - 2, 1)
    # How far each is behind its share, in rows / (scale * PERIOD).
    behind = np.zeros(len(units), np.int64)
    source_of = np.empty(PERIOD, np.int64)
    for row in range(PERIOD):
        behind += units * scale
        # Rows until it is a whole row behind, if it gets none: the fewest first.
        left = ((scale - 1) * PERIOD - behind) / units
        left[behind < PERIOD] = np.inf
        chosen = int(np.argmin(left))
        behind[chosen] -= scale * PERIOD
        source_of[row] = used[chosen]
    return source_of


@dataclass(frozen=True)
class Stage:
    """From `start_row` on, `units[i]` of every `PERIOD` rows are of dataset i, `seq_len` long."""

    start_row: int
    seq_len: int
    units: tuple[int, ...]

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern(self.units)


@dataclass(frozen=True)
class Mixture:
    """Open datasets by name and the stages in which they are mixed.

    Raises:
        DataError: the datasets do not speak of the same tokens.
    """

    datasets: dict[str, TokenDataset]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        (first_name, first), *others = self.datasets.items()
        for name, dataset in others:
            for what, here, there in (
                ("vocabulary size", dataset.vocab_size, first.vocab_size),
                ("end-of-text id", dataset.eos_id, first.eos_id),
                ("tokenizer", _tokenizer(dataset), _tokenizer(first)),
            ):
                if here != there:
                    raise DataError(
                        f"{name!r} has the {what} {here}, {first_name!r} has {there}: their ids do "
                        f"not mean the same; prepare {dataset.path} again with --tokenizer "
                        f"{first.path}"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.datasets)

    @property
    def is_plain(self) -> bool:
        """Whether this is one dataset from beginning to end."""
        return len(self.datasets) == 1 and len(self.stages) == 1

    @property
    def num_tokens(self) -> int:
        return sum(dataset.num_tokens for dataset in self.datasets.values())

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits of all that decides which row is which sample; one dataset's is its own."""
        fingerprints = [dataset.fingerprint for dataset in self.datasets.values()]
        if self.is_plain:
            return fingerprints[0]
        stages = [(stage.start_row, stage.seq_len, stage.units) for stage in self.stages]
        text = json.dumps(["mixture", fingerprints, stages])
        return hashlib.sha256(text.encode()).hexdigest()

    def stage_at(self, row: int) -> int:
        """Returns the number of the stage that a row is in."""
        return sum(stage.start_row <= row for stage in self.stages) - 1

    def orders(self, stage: Stage, seed: int, lanes: int) -> list[SampleOrder]:
        """Returns the order of each dataset in a stage; each shuffles in its own way."""
        return [
            SampleOrder(
                dataset.num_tokens, stage.seq_len, seed + number, lanes, dataset.frame_tokens
            )
            for number, dataset in enumerate(self.datasets.values())
        ]

    def starts(self, number: int, seed: int, lanes: int) -> list[int]:
        """Returns the position of each dataset where a stage begins: it goes on in its passes."""
        positions = [0] * len(self.datasets)
        orders = self.orders(self.stages[0], seed, lanes)
        for stage, following in zip(self.stages[:number], self.stages[1:], strict=False):
            num_rows = following.start_row - stage.start_row
            new_orders = self.orders(following, seed, lanes)
            for source, (old, new) in enumerate(zip(orders, new_orders, strict=True)):
                end = positions[source] + stage.pattern.count(source, num_rows)
                positions[source] = continued(end, old, new)
            orders = new_orders
        return positions


def continued(position: int, old: SampleOrder, new: SampleOrder) -> int:
    """Returns where in `new` to go on after `position` in `old`, reading no token again in a pass.

    Where both lengths divide a frame, a pass goes through the same groups of frames for both: the
    rest of a group that was begun is left out. Else a new pass begins.
    """
    if old == new:
        return position
    epoch, within = divmod(position, old.num_samples)
    if within == 0:
        return epoch * new.num_samples
    same_blocks = (
        old.block_samples * old.seq_len == new.block_samples * new.seq_len
        and old.num_blocks == new.num_blocks
    )
    group = old.group_of(within, epoch)
    group += within > old.group_start(group, epoch)
    if not same_blocks or group >= new.num_groups:
        return (epoch + 1) * new.num_samples
    return epoch * new.num_samples + new.group_start(group, epoch)


def _tokenizer(dataset: TokenDataset) -> str:
    entry = dataset.manifest.tokenizer
    return "none" if entry is None else f"{entry.kind} {entry.sha256[:12]}"
