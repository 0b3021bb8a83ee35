"""What one rank sends in one optimizer step, by strategy: kinds, counts, bytes and what hides them.

The units, buckets and shapes are those of the real model, built without memory, and DDP's buckets
are cut by torch's own function; what each strategy does with them is written here and compared with
dry runs by the tests. Bytes are those on the wire, padding included. Left out: the few numbers that
the norm, the loss and DDP's map of used parameters cost.

Of DeepSpeed 0.19.8: stages 1 and 2 all-reduce gradients (`use_multi_rank_bucket_allreduce`, its
default) and gather the updated weights; stage 3's counts of gathers are one a block, which its
prefetching may join, and its reuse of gathered weights in small models is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as tdist
from torch import Tensor

from scalellm.config import BatchPlan, Config, ModelConfig
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.model import Decoder
from scalellm.plan._mesh_traffic import mesh_traffic
from scalellm.plan._ranks import ranks_of
from scalellm.plan._transfers import FLOAT_BYTES, Shape, Shards, Transfer, Widths, elements, sharded
from scalellm.plan.types import Collective, CollectiveKind
from scalellm.strategies import Options, Sharding, Strategy
from scalellm.strategies._mesh import ParallelOptions
from scalellm.strategies._row_shares import RowShares
from scalellm.strategies.accelerate import AccelerateOptions
from scalellm.strategies.ddp import DDPOptions
from scalellm.strategies.fsdp import FSDPOptions

_MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """A config's strategy as it would be built, and what it divides."""

    strategy: type[Strategy]
    options: Options
    sharding: Sharding
    batches: BatchPlan
    backend: dict[str, Any] | None

    @property
    def computes_in_half(self) -> bool:
        """Whether weights are of half precision when the model meets them."""
        gathered = getattr(self.options, "param_dtype", None)
        return gathered in ("bf16", "fp16") or self.sharding.working_bytes == 2


def set_up(config: Config, world_size: int) -> Setup:
    """Returns how `world_size` ranks would train. Raises ConfigError as training would."""
    here = ranks_of(config, world_size)
    strategy, options, world = here.strategy, here.options, here.world
    return Setup(
        strategy,
        options,
        strategy.sharding(options, world, config.train),
        here.batches,
        strategy.backend_config(options, config.train, here.batches, world),
    )


def traffic(config: Config, world_size: int) -> list[Transfer]:
    """Returns one rank's transfers in one optimizer step.

    Raises:
        ConfigError: a strategy of the user's own, of which nothing is known here, or a config that
            training would refuse.
    """
    setup = set_up(config, world_size)
    options = setup.options
    if config.strategy.name == "single":
        return []
    if isinstance(options, FSDPOptions):
        return _fsdp(config, options, setup.batches.grad_accumulation, world_size)
    if isinstance(options, ParallelOptions):
        return mesh_traffic(config, options, setup.batches, world_size)
    if setup.backend is not None:
        return _deepspeed(config, setup, world_size)
    if isinstance(options, AccelerateOptions):
        options = DDPOptions()
    if isinstance(options, DDPOptions):
        return _ddp(config, options, world_size)
    raise ConfigError(
        f"strategy.name={config.strategy.name} is a strategy of your own: its traffic is not "
        "known; plan with ddp, fsdp, deepspeed or parallel"
    )


def collectives(transfers: Iterable[Transfer]) -> list[Collective]:
    """Adds transfers up by kind, as a dry run counts them; a group of one rank sends nothing."""
    totals: dict[CollectiveKind, list[int]] = {}
    for transfer in transfers:
        if transfer.ranks > 1:
            total = totals.setdefault(transfer.kind, [0, 0])
            total[0] += transfer.count
            total[1] += transfer.payload_bytes
    return [Collective(kind, count, size) for kind, (count, size) in sorted(totals.items())]


# -- the model's parts --------------------------------------------------------------------------


@lru_cache(maxsize=64)
def unit_shapes(model: ModelConfig) -> tuple[tuple[Shape, ...], ...]:
    """Shapes of the parameters of each block in order, and last of what is outside of blocks."""
    decoder = _decoder(model)
    blocks = [block.parameters() for block in decoder.layers]
    in_blocks = {id(p) for block in decoder.layers for p in block.parameters()}
    root = (p for p in decoder.parameters() if id(p) not in in_blocks)
    return tuple(tuple(tuple(p.shape) for p in unit) for unit in [*blocks, root])


def _decoder(model: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(model)


# -- strategies ---------------------------------------------------------------------------------


def _ddp(config: Config, options: DDPOptions, world_size: int) -> list[Transfer]:
    if options.compression == "powersgd":
        size = _powersgd_bytes(config, options)
        transfers = [Transfer("all_reduce", "backward", 3, size, world_size)]
    else:  # the last bucket is full when the backward is done
        *hidden, last = _bucket_sizes(config, options)
        transfers = [Transfer("all_reduce", "backward", 1, last, world_size)]
        if hidden:
            sizes = (len(hidden), sum(hidden), world_size)
            transfers.append(Transfer("all_reduce", "backward", *sizes, overlaps=True))
    if options.shard_optimizer:
        gathered = _gathered_bytes(config, options, world_size)
        transfers.append(Transfer("all_gather", "step", len(gathered), sum(gathered), world_size))
    return transfers


def _gathered_bytes(config: Config, options: DDPOptions, world_size: int) -> list[int]:
    """Of the weights, after each rank has updated its share of them."""
    stored = torch.float64 if config.train.precision == "fp64" else torch.float32
    named = list(_decoder(config.model).to(stored).named_parameters())
    world = World(world_size=world_size, launcher="the planner")
    return RowShares(named, world, options.bucket_mb * _MIB).gathered_bytes()


def _bucket_sizes(config: Config, options: DDPOptions) -> list[int]:
    """Bytes on the wire of DDP's buckets in the order in which the backward fills them."""
    stored = torch.float64 if config.train.precision == "fp64" else torch.float32
    parameters: list[Tensor] = list(_decoder(config.model).to(stored).parameters())
    if not options.find_unused_parameters:
        # Rebuilt after the first step by the order in which gradients come: the last first.
        parameters.reverse()
    limit = options.bucket_mb * _MIB
    assign = tdist._compute_bucket_assignment_by_size  # type: ignore[attr-defined]
    buckets = assign(parameters, [limit], [False] * len(parameters))[0]
    if options.find_unused_parameters:
        buckets.reverse()
    wire_bytes = FLOAT_BYTES.get(options.compression, stored.itemsize)
    return [sum(parameters[i].numel() for i in bucket) * wire_bytes for bucket in buckets]


def _powersgd_bytes(config: Config, options: DDPOptions) -> int:
    """Two thin factors of each matrix, and what has too few numbers to be worth it whole."""
    elements = 0
    for shape in (s for unit in unit_shapes(config.model) for s in unit):
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(rows, columns, options.powersgd_rank)
        thin = (rows + columns) * rank
        worth_it = len(shape) > 1 and thin * 2 < rows * columns
        elements += thin if worth_it else rows * columns
    return elements * 4


def _fsdp(
    config: Config, options: FSDPOptions, micro_batches: int, world_size: int
) -> list[Transfer]:
    ranks = options.shard_ranks or world_size
    widths = Widths.of(config.train.precision, options.param_dtype, options.reduce_dtype)
    shards = Shards(
        ranks,
        gathers=micro_batches,
        reductions=micro_batches if options.reduce_every_micro_batch else 1,
        gathered_bytes=widths.gathered_bytes,
        reduced_bytes=widths.reduced_bytes,
        reshards=options.reshard_after_forward,
        replicas=world_size // ranks,
    )
    return sharded(unit_shapes(config.model), shards)


def _deepspeed(config: Config, setup: Setup, world_size: int) -> list[Transfer]:
    backend = cast(dict[str, Any], setup.backend)
    zero, micro_batches = backend["zero_optimization"], setup.batches.grad_accumulation
    units = [elements(shapes) for shapes in unit_shapes(config.model)]
    size = setup.sharding.working_bytes or 4
    model_bytes, overlaps = size * sum(units), bool(zero["overlap_comm"])
    num_buckets = max(1, math.ceil(sum(units) / zero["reduce_bucket_size"]))
    stage, all_ranks = zero["stage"], world_size
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        reduction = Transfer(
            "all_reduce",
            "backward",
            count=num_buckets * times,
            payload_bytes=model_bytes * times,
            ranks=all_ranks,
            overlaps=overlaps and stage == 2,
            micro_batches=times,
        )
        # One for the parameters that decay, one for those that do not.
        update = Transfer("all_gather", "step", 2, model_bytes, all_ranks)
        return [reduction, update] if stage else [reduction]
    shapes = [shape for unit in unit_shapes(config.model) for shape in unit]
    threshold = zero["stage3_param_persistence_threshold"]
    whole_bytes = size * elements(shape for shape in shapes if math.prod(shape) <= threshold)
    gather = Transfer(
        "all_gather",
        "forward",
        count=len(units) * micro_batches,
        payload_bytes=(model_bytes - whole_bytes) * micro_batches,
        ranks=all_ranks,
        overlaps=True,
        micro_batches=micro_batches,
    )
    reduction = replace(
        gather,
        kind="reduce_scatter",
        phase="backward",
        count=num_buckets * micro_batches,
        payload_bytes=model_bytes * micro_batches,
        overlaps=overlaps,
    )
    transfers = [gather, replace(gather, phase="backward"), reduction]
    if whole_bytes:
        transfers.append(Transfer("all_gather", "step", 1, whole_bytes, all_ranks))
    return transfers
