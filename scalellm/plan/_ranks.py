"""Who a planned run's ranks are, and how they split the global batch, as training would have it."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm import strategies
from scalellm.config import BatchPlan, Config
from scalellm.dist import World
from scalellm.strategies import Options, Strategy
from scalellm.train import check_config


@dataclass(frozen=True)
class Ranks:
    """One rank of a planned run, with its strategy and how it splits the batch."""

    world: World
    strategy: type[Strategy]
    options: Options
    batches: BatchPlan


def ranks_of(config: Config, world_size: int, rank: int = 0) -> Ranks:
    """Returns rank `rank` of `world_size`, all on one host.

    Raises:
        ConfigError: as training would, before it allocates anything.
    """
    strategy = strategies.resolve(config.strategy.name)
    world = World(
        rank=rank, world_size=world_size, local_world_size=world_size, launcher="the planner"
    )
    options, batches = check_config(config, world)
    return Ranks(world, strategy, options, batches)


def batches_of(config: Config, world_size: int) -> BatchPlan:
    """How `world_size` ranks split a step's samples; ranks that share a model share its rows.

    Raises:
        ConfigError: they do not divide, or the strategy's options do not go with so many ranks.
    """
    return config.batches(data_world_size(config, world_size))


def data_world_size(config: Config, world_size: int) -> int:
    """Among how many groups of ranks, each with one model, the global batch is divided.

    Raises:
        ConfigError: the strategy's options do not go with so many ranks.
    """
    strategy = strategies.resolve(config.strategy.name)
    options = strategies.read_options(config.strategy, strategy)
    return strategy.data_rank(options, World(world_size=world_size)).world_size
