"""A page as data: what it says, in order, whatever it is written as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

DASH = "—"


@dataclass(frozen=True)
class Link:
    text: str
    target: str


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Words and links, in the order they are read."""

    parts: Sequence[str | Link]


@dataclass(frozen=True)
class Listing:
    """Terms and what they mean."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """Args: name: of its file and its ids: lower-case letters, digits and hyphens."""

    name: str
    title: str
    caption: str
    figure: Any


@dataclass(frozen=True)
class Cell:
    """Args: value: what a column of numbers is sorted by. tone: "", "bad" or "muted"."""

    text: str
    value: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Details:
    """Text as it stands, folded away until it is asked for."""

    title: str
    text: str


Block: TypeAlias = Heading | Paragraph | Listing | Chart | Table | Details


@dataclass
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        self.blocks += blocks


def number(value: Any, form: Callable[[float], str]) -> Cell:
    """A cell of a column of numbers; a dash for what was not measured."""
    if not is_number(value):
        return Cell(DASH, tone="muted")
    return Cell(form(float(value)), float(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """A table of a name and a value a row."""
    return Table(("", ""), [(Cell(name), Cell(value)) for name, value in pairs])
