"""What every part of the configuration is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


def setting(default: Any, description: str, *, unit: str = "", **limits: Any) -> Any:
    """A documented field: its meaning and unit, shown by `--help` and in error messages."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, given: Any) -> Any:
        """YAML's `true` (and `yes`, `on`) would pass for 1."""
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation is not bool:
                raise ValueError(f"{name} takes no true or false, but a value: {field.description}")
        return given
