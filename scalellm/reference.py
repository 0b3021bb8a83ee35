"""The configuration described: text for `--help`, a JSON schema for editors.

Both are drawn from the classes that validate, so they cannot say anything else.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scalellm import strategies
from scalellm.config import Config
from scalellm.dist import World
from scalellm.errors import ConfigError


def help_text() -> str:
    """Every key with its type, default, unit and meaning, one to a line."""
    lines = ["every key of the configuration (type = default, unit: meaning):", ""]
    lines += [_line(key, field) for key, field in _fields(Config, "")]
    for name in strategies.names():
        own = list(_fields(strategies.resolve(name).options_class, "strategy."))
        if own:
            lines += ["", f"with strategy.name={name}:"]
            lines += [_line(key, field) for key, field in own]
    return "\n".join(lines)


def json_schema() -> str:
    """JSON schema of a config file; options of every strategy stand under `strategy`."""
    schema = Config.model_json_schema()
    definition = schema["$defs"]["StrategyConfig"]
    definition["additionalProperties"] = False
    definition["properties"]["name"]["examples"] = strategies.names()
    for name in strategies.names():
        options = strategies.resolve(name).options_class.model_json_schema()
        schema["$defs"] |= options.get("$defs", {})
        definition["properties"] |= options.get("properties", {})
    return json.dumps(schema, indent=1) + "\n"


def backend_json(config: Config, world: World) -> str:
    """The JSON that DeepSpeed would be given for this config and world.

    Raises:
        ConfigError: the strategy has no configuration of that kind, or the config cannot run.
    """
    strategy = strategies.resolve(config.strategy.name)
    options = strategies.parse_options(config.strategy, strategy, world, config.train)
    plan = config.batches(world.world_size)
    values = strategy.backend_config(options, config.train, plan, world)
    if values is None:
        raise ConfigError(
            f"strategy.name={config.strategy.name} has no DeepSpeed configuration; use "
            "strategy.name=deepspeed, or strategy.name=accelerate with strategy.backend=deepspeed"
        )
    return json.dumps(values, indent=2) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = _section(field)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _fields(inner, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    for choice in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _line(key: str, field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra or {}
    unit = f", {extra['unit']}" if extra.get("unit") else ""
    default = "null" if field.default is None else str(field.default)
    return f"  {key}\n      {_type_words(field.annotation)} = {default}{unit}: {field.description}"


def _type_words(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    arguments = typing.get_args(annotation)
    if arguments:
        return " | ".join(_type_words(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    return {"str": "text", "bool": "true | false", "Path": "path"}.get(
        annotation.__name__, annotation.__name__
    )
