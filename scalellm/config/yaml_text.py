"""Reading configuration text: bounded, safe YAML and dotted overrides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scalellm.errors import ConfigError

MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (a 1 KB file of nested aliases unfolds to gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a config")
        return super().compose_node(parent, index)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, dict | list):
            raise yaml.YAMLError(f"the key on line {line} is not a word")
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} stands twice, on lines {seen[key]} and {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML without tags, aliases or duplicate keys; ConfigError names the line."""
    try:
        # YAML 1.1 reads "3e-3" as a string (it wants "3.0e-3"); pydantic turns it into a float.
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise ConfigError(f"{source}{where}: not valid YAML: {problem}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a config file as nested dicts. Raises ConfigError with the reason and the fix."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_YAML_BYTES:
            raise ConfigError(
                f"{path} has {size_bytes:,} bytes; a config has at most {MAX_YAML_BYTES:,}: "
                "is it the right file?"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(values).__name__}")
    if _depth(values) > MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {MAX_DEPTH} levels")
    return values


def _nearby(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; {path.parent} has {', '.join(names[:8])}" if names else ""


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((_depth(v) for v in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(v) for v in value), default=0)
    return 0


def merge_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `key.sub=value` texts, the last one winning; values are parsed as YAML."""
    merged = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {override!r} is not of the form key.sub=value")
        node = merged
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
            node = child
        node[parts[-1]] = parse_yaml(text, f"override {key}")
    return merged
