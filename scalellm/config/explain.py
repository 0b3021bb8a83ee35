"""Turns pydantic's list of errors into the one sentence a user needs first."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from scalellm.errors import did_you_mean

_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "path": "a path"}


def explain(error: ValidationError, model: type[BaseModel], source: str, prefix: str = "") -> str:
    """Returns one sentence for the first error, and how many more there are."""
    details = error.errors()
    # An unknown key explains the rest (a misspelt required key is also "missing"): say it first.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    sentence = _sentence(dict(details[0]), model, prefix)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{source}: {sentence}{more}"


def _sentence(detail: dict[str, Any], model: type[BaseModel], prefix: str) -> str:
    location = tuple(str(part) for part in detail["loc"])
    key = prefix + ".".join(location)
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        siblings = _fields_at(model, location[:-1])
        near = did_you_mean(location[-1], siblings)
        section = f"{prefix}{'.'.join(location[:-1])}".rstrip(".") or "the top level"
        takes = f"{section} takes {', '.join(siblings)}" if siblings else "it takes no options"
        return f"unknown key {key}" + (near or f"; {takes}")
    unit = _unit_at(model, location)
    shown = f"{key}={value!r}" + (f" {unit}" if unit and isinstance(value, int | float) else "")
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{shown} is out of range: it must be {words} {context[name]}"
    if kind == "literal_error":
        words = context["expected"].replace("'", "")
        near = did_you_mean(str(value), words.replace(" or ", ", ").split(", "))
        return f"{shown} is none of {words}{near}"
    if kind == "value_error":
        text = str(context.get("error", detail["msg"]))
        return f"{key}: {text}" if key else text
    wanted = _WANTED.get(kind.removesuffix("_type").removesuffix("_parsing"), "")
    if wanted or kind == "int_from_float":
        return f"{shown} is not {wanted or 'a whole number'}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{shown} is a value, but {key} is a section of keys"
    return f"{shown}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _model_at(model: type[BaseModel], location: tuple[str, ...]) -> type[BaseModel] | None:
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            return None
        choices = (field.annotation, *get_args(field.annotation))
        inner = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _fields_at(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    found = _model_at(model, location)
    return list(found.model_fields) if found else []


def _unit_at(model: type[BaseModel], location: tuple[str, ...]) -> str:
    found = _model_at(model, location[:-1]) if location else None
    field = found.model_fields.get(location[-1]) if found else None
    extra = field.json_schema_extra if field else None
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""
