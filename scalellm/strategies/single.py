"""`single`: one process. The reference that every other strategy must match."""

from __future__ import annotations

from scalellm.config import TrainConfig
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.strategies.base import Options, Strategy


class Single(Strategy):
    """The base behaviour, which refuses more than one rank: each would train alone."""

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        if world.world_size > 1:
            raise ConfigError(
                f"strategy.name=single trains in one process, but {world.launcher} started "
                f"{world.world_size}; use strategy.name=ddp or start one process, as "
                "`python launch/train.py` does"
            )
