"""Which strategy, micro-batch and checkpointing: all combinations, what fits, the fastest of those.

What the config says of model, precision and global batch stays. A config that fits nowhere is told
by how much, and what would help, with the peak that each change is predicted to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scalellm.config import BatchPlan, Config, parse_config
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.plan.devices import Device, Efficiency
from scalellm.plan.speed import StepTime, step_time
from scalellm.plan.traffic import set_up
from scalellm.plan.types import Memory

Estimate = Callable[[Config, int], Memory]
Values = Mapping[str, Any]

# Of a device's usable memory, left for the allocator's fragments and the estimate's own error.
MARGIN = 0.05
AS_GIVEN = "as given"
_CHECKPOINTING = ("none", "selective", "alternate", "full")
_MAX_MICRO_BATCH = 128  # rows; what is larger gains nothing more
_MAX_RANKS = 1 << 12
_WAYS_OUT = 3
# Rooflines do not tell closer rivals apart: the simplest of them is taken.
_AS_FAST = 0.03


@dataclass(frozen=True)
class Candidate:
    """One way to train: what it changes in the config, what it needs and how long a step takes.

    `refused` says why it cannot be, in the place of memory and time; `time` is None where it does
    not fit.
    """

    label: str
    world_size: int
    changes: Values
    config: Config | None = None
    memory: Memory | None = None
    time: StepTime | None = None
    over_bytes: int = 0
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.over_bytes <= 0


@dataclass(frozen=True)
class Plan:
    """`given` is the config itself; `rows` the best of each variant, the simplest first.

    `best` is the fastest that fits, or the first of those that are about as fast. `ways_out`, where
    nothing fits, are changes of the row that is nearest.
    """

    device: Device
    world_size: int
    limit_bytes: int
    given: Candidate
    rows: list[Candidate]
    best: Candidate | None
    ways_out: list[Candidate] = field(default_factory=list)


def variants(world_size: int, device: Device, precision: str) -> dict[str, dict[str, Any]]:
    """Strategies worth comparing on so many ranks, with their options."""
    if world_size == 1:
        return {"single": {"name": "single"}, **_offloading()}
    found: dict[str, dict[str, Any]] = {
        "ddp": {"name": "ddp"},
        "fsdp": {"name": "fsdp"},
        "fsdp no reshard": {"name": "fsdp", "reshard_after_forward": False},
    }
    half = {"param_dtype": precision, "reduce_dtype": "fp32"}
    if precision in ("bf16", "fp16"):
        found[f"fsdp {precision}"] = {"name": "fsdp", **half}
    else:
        half = {}
    if world_size > device.devices_per_node and world_size % device.devices_per_node == 0:
        one_node = {"shard_ranks": device.devices_per_node}
        found["fsdp hybrid"] = {"name": "fsdp", **one_node, **half}
    for stage in (1, 2, 3):
        found[f"zero-{stage}"] = {"name": "deepspeed", "stage": stage}
    return {**found, **_offloading()}


def _offloading() -> dict[str, dict[str, Any]]:
    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    return {
        "fsdp offload": {"name": "fsdp", "cpu_offload": True},
        "zero-2 offload": {"name": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
        "zero-3 offload": {"name": "deepspeed", "stage": 3, **both},
    }


class Chooser:
    """Compares ways to train one config on one kind of device.

    Args:
        values: the config as plain values, as written by the user.
        estimate: memory of a config on so many ranks.
    """

    def __init__(
        self,
        values: Values,
        device: Device,
        estimate: Estimate,
        efficiency: Efficiency | None = None,
    ) -> None:
        self.values, self.device = values, device
        self.estimate, self.efficiency = estimate, efficiency
        self.config = parse_config(dict(values))
        self.limit_bytes = int(device.usable_bytes * (1 - MARGIN))
        # By half precision of weights and checkpointing: the fewest rows that are too many.
        self._hopeless: dict[tuple[bool, str], int] = {}

    def plan(self, world_size: int) -> Plan:
        """Returns the comparison.

        Raises:
            ConfigError: the device lacks the precision, or the global batch cannot be divided.
        """
        self.device.matrix_rate(self.config.train.precision)
        count_parameters(self.config.model)  # refuses a vocabulary that is not known
        sizes = self._micro_batch_sizes(world_size)
        given = self._try(AS_GIVEN, world_size, {})
        found = variants(world_size, self.device, self.config.train.precision)
        rows = [
            self._best_of(label, options, sizes, world_size) for label, options in found.items()
        ]
        fitting = [row for row in [given, *rows] if row.fits]
        fastest_s = min(map(_seconds, fitting), default=0.0)
        rivals = [row for row in fitting if _seconds(row) <= fastest_s * (1 + _AS_FAST)]
        best = rivals[0] if rivals else None
        ways_out = [] if best else self._ways_out(rows, world_size)
        return Plan(self.device, world_size, self.limit_bytes, given, rows, best, ways_out)

    def _micro_batch_sizes(self, world_size: int) -> list[int]:
        """Powers of two that divide a rank's share of the global batch, and the config's own."""
        train = self.config.train
        # Refuses a batch that no micro-batch divides.
        BatchPlan.of(train.global_batch_size, 1, world_size)
        share = train.global_batch_size // world_size
        own = train.micro_batch_size or share
        sizes = {1 << k for k in range(_MAX_MICRO_BATCH.bit_length())} | {own}
        return sorted(size for size in sizes if share % size == 0)

    def _best_of(self, label: str, options: Values, sizes: list[int], world_size: int) -> Candidate:
        """The fastest combination of a variant that fits, else the one that is least too large."""
        given = self.config.strategy
        if given.name == options["name"]:
            options = {**given.options, **options}
        found: list[Candidate] = []
        for mode in _CHECKPOINTING:
            fastest_s = min(map(_seconds, found), default=float("inf"))
            if fastest_s <= self._least_s(options, mode, sizes[-1], world_size):
                continue
            found.append(self._largest_fitting(label, options, mode, sizes, world_size))
            if found[-1].refused or (found[-1].fits and self._rows(found[-1]) == sizes[-1]):
                break  # to compute again only to save memory would be slower
        fitting = [one for one in found if one.fits]
        if fitting:
            return min(fitting, key=_seconds)
        return min(found, key=lambda one: (bool(one.refused), one.over_bytes))

    def _least_s(self, options: Values, mode: str, size: int, world_size: int) -> float:
        """Seconds of the largest micro-batch, fits or not: no smaller one is faster; 0: unknown."""
        train = {"micro_batch_size": size, "activation_checkpointing": mode}
        try:
            config = parse_config(merged(self.values, {"strategy": dict(options), "train": train}))
            return step_time(config, world_size, self.device, self.efficiency).total_s
        except ConfigError:
            return 0.0

    def _largest_fitting(
        self, label: str, options: Values, mode: str, sizes: list[int], world_size: int
    ) -> Candidate:
        """By halving, since memory grows and time does not fall with smaller micro-batches."""

        def trial(size: int) -> Candidate:
            train = {"micro_batch_size": size, "activation_checkpointing": mode}
            return self._try(label, world_size, {"strategy": dict(options), "train": train})

        sizes = self._not_hopeless(options, mode, sizes)
        best, low, high = trial(sizes[-1]), 0, len(sizes) - 1
        if best.refused or best.fits or high == 0:
            return best
        best = trial(sizes[0])
        if not best.fits:
            return best
        while high - low > 1:
            middle = (low + high) // 2
            found = trial(sizes[middle])
            low, high = (middle, high) if found.fits else (low, middle)
            best = found if found.fits else best
        return best

    def _not_hopeless(self, options: Values, mode: str, sizes: list[int]) -> list[int]:
        """Leaves out micro-batches whose activations alone were too much in another strategy."""
        key = (self._computes_in_half(options), mode)
        limit = self._hopeless.get(key, sizes[-1] + 1)
        return [size for size in sizes if size < limit] or sizes[:1]

    def _learn(self, candidate: Candidate) -> None:
        assert candidate.config is not None and candidate.memory is not None
        config = candidate.config
        if candidate.memory.activations_bytes > self.limit_bytes:
            options = {"name": config.strategy.name, **config.strategy.options}
            key = (self._computes_in_half(options), config.train.activation_checkpointing)
            rows = self._rows(candidate)
            self._hopeless[key] = min(rows, self._hopeless.get(key, rows))

    def _computes_in_half(self, options: Values) -> bool:
        """Half-precision weights make smaller activations: such strategies learn apart."""
        is_zero = options["name"] == "deepspeed" or options.get("backend") == "deepspeed"
        return bool(options.get("param_dtype")) or (
            is_zero and self.config.train.precision == "bf16"
        )

    @staticmethod
    def _rows(candidate: Candidate) -> int:
        assert candidate.config is not None
        return candidate.config.batches(candidate.world_size).micro_batch_size

    def _try(self, label: str, world_size: int, changes: Values) -> Candidate:
        blank = Candidate(label, world_size, changes)
        try:
            config = parse_config(merged(self.values, changes))
            set_up(config, world_size)
            memory = self.estimate(config, world_size)
            over_bytes = memory.peak_bytes - self.limit_bytes
            time = None
            if over_bytes <= 0:
                time = step_time(config, world_size, self.device, self.efficiency)
        except ConfigError as error:
            return replace(blank, refused=str(error))
        found = replace(blank, config=config, memory=memory, time=time, over_bytes=over_bytes)
        if not changes.get("model"):
            self._learn(found)
        return found

    # -- when nothing fits ----------------------------------------------------------------------

    def _ways_out(self, rows: list[Candidate], world_size: int) -> list[Candidate]:
        """Single changes to the least too large row: first those that fit, then the smallest."""
        possible = [row for row in rows if row.memory is not None]
        if not possible:
            return []
        nearest = min(possible, key=lambda row: row.over_bytes)
        tried = [self._try(label, world_size, changes) for label, changes in self._steps(nearest)]
        more = self._more_ranks(nearest)
        tried = [one for one in [*tried, *([more] if more else [])] if one.memory is not None]
        helping = [one for one in tried if one.over_bytes < nearest.over_bytes]
        helping.sort(key=lambda one: (not one.fits, one.over_bytes))
        return helping[:_WAYS_OUT]

    def _steps(self, nearest: Candidate) -> Iterator[tuple[str, Values]]:
        assert nearest.config is not None
        before, train, model = nearest.changes, nearest.config.train, nearest.config.model
        if nearest.config.batches(nearest.world_size).micro_batch_size > 1:
            yield "train.micro_batch_size=1", merged(before, {"train": {"micro_batch_size": 1}})
        if train.activation_checkpointing != "full":
            full = {"train": {"activation_checkpointing": "full"}}
            yield "train.activation_checkpointing=full", merged(before, full)
        if not model.loss_chunk_tokens:
            chunked = {"model": {"loss_chunk_tokens": 1024}}
            yield "model.loss_chunk_tokens=1024", merged(before, chunked)
        known = nearest.config.strategy
        for label, options in _offloading().items():
            if not self.device.is_cpu and options != {"name": known.name, **known.options}:
                yield f"offload to the host ({label})", {**before, "strategy": options}
        if model.seq_len > 1:
            half = {"model": {"seq_len": model.seq_len // 2}}
            yield f"model.seq_len={model.seq_len // 2}", merged(before, half)

    def _more_ranks(self, nearest: Candidate) -> Candidate | None:
        """The fewest ranks, by doubling, on which it fits; None if they do not help."""
        ranks, changes = nearest.world_size * 2, nearest.changes
        if nearest.config is not None and nearest.config.strategy.name == "single":
            changes = {**changes, "strategy": {"name": "fsdp"}}
        while ranks <= _MAX_RANKS:
            found = self._try(f"{ranks:,} devices", ranks, changes)
            if found.refused or found.fits:
                return found if found.fits else None
            ranks *= 2
        return None


def _seconds(candidate: Candidate) -> float:
    return candidate.time.total_s if candidate.time else float("inf")


def merged(values: Values, changes: Values) -> dict[str, Any]:
    """The values with the changes in them; a new strategy replaces the old one with its options."""
    result = dict(values)
    for section, fields in changes.items():
        old = {} if section == "strategy" else dict(result.get(section) or {})
        result[section] = {**old, **fields}
    return result
