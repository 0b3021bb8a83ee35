"""How ranks train together: one file per strategy, whose name is the config word.

`strategy.name: ddp` is `strategies/ddp.py`; a dotted name (`mypkg.mystrategy`) is a module of the
user's own. The file defines one subclass of `Strategy`, and its `Options` if it takes any.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from types import ModuleType

from pydantic import ValidationError

from scalellm.config import StrategyConfig, TrainConfig
from scalellm.config.explain import explain
from scalellm.dist import World
from scalellm.errors import ConfigError, did_you_mean
from scalellm.strategies._state import Piece, StateSource, check_names
from scalellm.strategies.base import DataRank, Options, Sharding, StepResult, Strategy

__all__ = [
    "DataRank",
    "Options",
    "Piece",
    "Sharding",
    "StateSource",
    "StepResult",
    "Strategy",
    "check_names",
    "names",
    "parse_options",
    "read_options",
    "resolve",
]


def names() -> list[str]:
    """The words `strategy.name` takes: the files of this folder."""
    found = pkgutil.iter_modules(__path__)
    return sorted(
        module.name for module in found if module.name != "base" and module.name[0] != "_"
    )


def resolve(name: str) -> type[Strategy]:
    """Returns the strategy class of a config word. Raises ConfigError listing the right words."""
    is_own = "." in name and all(part.isidentifier() for part in name.split("."))
    if not is_own and name not in names():
        near = did_you_mean(name, names())
        raise ConfigError(
            f"strategy.name={name!r} is unknown{near}; strategies: {', '.join(names())}, "
            "or the dotted path of a module of your own"
        )
    path = name if is_own else f"{__name__}.{name}"
    if is_own and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not look where it is called from
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if f"{path}.".startswith(f"{missing}."):
            raise ConfigError(f"strategy.name={name!r}: there is no module {missing!r}") from None
        raise ConfigError(
            f"strategy.name={name!r} needs the package {missing!r}: pip install {missing}"
        ) from None
    return _class_in(module, name)


def _class_in(module: ModuleType, name: str) -> type[Strategy]:
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Strategy)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ConfigError(
            f"strategy.name={name!r}: {module.__name__} defines {len(own)} subclasses of "
            "Strategy; it must define one"
        )
    return own[0]


def parse_options(
    config: StrategyConfig, strategy: type[Strategy], world: World, train: TrainConfig
) -> Options:
    """Validates the options beside `strategy.name`, the world and the training they meet."""
    options = read_options(config, strategy)
    strategy.check(options, world, train)
    return options


def read_options(config: StrategyConfig, strategy: type[Strategy]) -> Options:
    """Validates the options beside `strategy.name`, wherever they will be used."""
    try:
        return strategy.options_class.model_validate(config.options)
    except ValidationError as error:
        source = f"strategy {config.name!r}"
        raise ConfigError(explain(error, strategy.options_class, source, "strategy.")) from None
