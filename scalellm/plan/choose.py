"""Which strategy, micro-batch and checkpointing: all combinations, what fits, the fastest of those.

What the config says of model, precision and global batch stays. A config that fits nowhere is told
by how much, and what would help, with the peak that each change is predicted to have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from scalellm import strategies
from scalellm.config import BatchPlan, Config, parse_config
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.plan._ranks import batches_of, data_world_size
from scalellm.plan.candidates import Candidate, Values, merged, meshes, variants
from scalellm.plan.devices import Device, Efficiency
from scalellm.plan.speed import step_time
from scalellm.plan.traffic import set_up
from scalellm.plan.types import Memory
from scalellm.plan.ways_out import ways_out

Estimate = Callable[[Config, int], Memory]

# Of a device's usable memory, left for the allocator's fragments and the estimate's own error.
MARGIN = 0.05
AS_GIVEN = "as given"
_CHECKPOINTING = ("none", "selective", "alternate", "full")
_MAX_MICRO_BATCH = 128  # rows; what is larger gains nothing more
# Rooflines do not tell closer rivals apart: the simplest of them is taken.
_AS_FAST = 0.03
# Micro-batches for each stage of a pipeline: its bubble is a fifth then.
_FULL_PIPELINE = 4


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
        # By half precision of weights, mesh and checkpointing: the fewest rows that are too many.
        self._hopeless: dict[tuple[bool, str, str], int] = {}

    def plan(self, world_size: int) -> Plan:
        """Returns the comparison.

        Raises:
            ConfigError: the device lacks the precision, the global batch cannot be divided, or an
                option of the config's strategy is no option.
        """
        strategy = self.config.strategy
        strategies.read_options(strategy, strategies.resolve(strategy.name))
        precision = self.config.train.precision
        self.device.matrix_rate(precision)
        count_parameters(self.config.model)  # refuses a vocabulary that is not known
        own = {"name": strategy.name, **strategy.options}
        self._micro_batch_sizes(own, world_size)  # refuses a batch that no micro-batch divides
        given = self._try(AS_GIVEN, world_size, {})
        found = variants(world_size, self.device, precision)
        if strategy.name == "parallel":
            found["parallel"] = own
        rows = [self._best_of(label, options, world_size) for label, options in found.items()]
        if world_size > 1 and not any(_fits_on_devices(row) for row in [given, *rows]):
            # Only here, since each of them takes seconds to look at.
            shared = meshes(world_size, self.device, self.config.model.seq_len, precision)
            rows += [self._best_of(label, options, world_size) for label, options in shared.items()]
        fitting = [row for row in [given, *rows] if row.fits]
        fastest_s = min(map(_seconds, fitting), default=0.0)
        rivals = [row for row in fitting if _seconds(row) <= fastest_s * (1 + _AS_FAST)]
        best = rivals[0] if rivals else None
        ways = [] if best else ways_out(rows, world_size, self._try, self.device)
        return Plan(self.device, world_size, self.limit_bytes, given, rows, best, ways)

    def ways_out(self, world_size: int) -> tuple[Candidate, list[Candidate]]:
        """The config as it is, and up to three changes of it that need less.

        Raises:
            ConfigError: as `plan`.
        """
        count_parameters(self.config.model)
        given = self._try(AS_GIVEN, world_size, {})
        return given, ways_out([given], world_size, self._try, self.device)

    def _micro_batch_sizes(self, options: Values, world_size: int) -> list[int]:
        """Powers of two that divide a rank's share of the global batch, and the config's own.

        Raises:
            ConfigError: no micro-batch divides it among ranks with these options.
        """
        train = self.config.train
        ranks = data_world_size(
            parse_config(merged(self.values, {"strategy": dict(options)})), world_size
        )
        BatchPlan.of(train.global_batch_size, 1, ranks)
        share = train.global_batch_size // ranks
        own = train.micro_batch_size or share
        sizes = {1 << k for k in range(_MAX_MICRO_BATCH.bit_length())} | {own}
        fitting = sorted(size for size in sizes if share % size == 0)
        # A pipeline has a small bubble only if many micro-batches go through it.
        stages = dict(options.get("mesh") or {}).get("pp", 1)
        for times in (_FULL_PIPELINE, 1) if stages > 1 else ():
            fewer = [size for size in fitting if share // size >= stages * times]
            if fewer:
                return fewer
        return fitting

    def _best_of(self, label: str, options: Values, world_size: int) -> Candidate:
        """The fastest combination of a variant that fits, else the one that is least too large."""
        given = self.config.strategy
        if given.name == options["name"] and "mesh" not in options:
            options = {**given.options, **options}
        try:
            sizes = self._micro_batch_sizes(options, world_size)
        except ConfigError as error:
            return Candidate(label, world_size, {"strategy": options}, refused=str(error))
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
        key = (self._computes_in_half(options), str(options.get("mesh")), mode)
        limit = self._hopeless.get(key, sizes[-1] + 1)
        return [size for size in sizes if size < limit] or sizes[:1]

    def _learn(self, candidate: Candidate) -> None:
        assert candidate.config is not None and candidate.memory is not None
        config = candidate.config
        if candidate.memory.activations_bytes > self.limit_bytes:
            options = {"name": config.strategy.name, **config.strategy.options}
            mode, mesh = config.train.activation_checkpointing, str(options.get("mesh"))
            key = (self._computes_in_half(options), mesh, mode)
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
        return batches_of(candidate.config, candidate.world_size).micro_batch_size

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


def _fits_on_devices(candidate: Candidate) -> bool:
    return candidate.fits and candidate.memory is not None and not candidate.memory.host_bytes


def _seconds(candidate: Candidate) -> float:
    return candidate.time.total_s if candidate.time else float("inf")
