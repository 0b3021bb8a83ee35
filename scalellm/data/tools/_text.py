"""Ids and text as a terminal can show them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scalellm.data.reader import TokenDataset
from scalellm.data.tokenizer import Tokenizer, load_tokenizer

_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_MAX_LISTED = 5
_MAX_VALUE_CHARS = 120


def visible(text: str, limit_chars: int) -> str:
    """The text on one line, control characters as escapes, cut at `limit_chars` characters."""
    shown = "".join(_shown(char) for char in text[:limit_chars])
    return shown + ("…" if len(text) > limit_chars else "")


def _shown(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    # Other, format and private characters, and separators that would break the line.
    if unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


def tokenizer_of(dataset: TokenDataset) -> Tokenizer | None:
    """The dataset's own tokenizer, or None if its ids came without one."""
    path = dataset.tokenizer_path
    return None if path is None else load_tokenizer(path)


def text_of_ids(tokenizer: Tokenizer | None, ids: Sequence[int], limit_chars: int) -> str:
    """Ids as text on one line; as numbers where no tokenizer tells more."""
    if tokenizer is None:
        text = " ".join(map(str, ids))
        return text if len(text) <= limit_chars else text[:limit_chars] + "…"
    return visible(
        tokenizer.decode([one for one in ids if one < tokenizer.vocab_size]), limit_chars
    )


def piece(tokenizer: Tokenizer | None, one: int) -> str:
    """An id with the text it stands for."""
    if tokenizer is None or one >= tokenizer.vocab_size:
        return f"id {one}"
    if one == tokenizer.eos_id:
        return "end of text"
    if one == tokenizer.unk_id:
        return "unknown"
    return f"'{visible(tokenizer.decode([one]), 24)}'"


def nested_lines(fields: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """What a manifest says in words of its own: any JSON, empty values left out, long ones cut."""
    for name, value in fields.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from nested_lines(value, indent + "  ")
        elif isinstance(value, list) and isinstance(value[0], Mapping):
            for number, one in enumerate(value[:_MAX_LISTED], start=1):
                yield f"{indent}{name} {number} of {len(value)}:"
                yield from nested_lines(one, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name}: {_listed(value)}"
        else:
            yield f"{indent}{name}: {_value(value)}"


def _listed(values: Iterable[Any]) -> str:
    values = list(values)
    rest = f", … ({len(values)} in all)" if len(values) > _MAX_LISTED else ""
    return ", ".join(_value(value) for value in values[:_MAX_LISTED]) + rest


def _value(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return visible(str(value), _MAX_VALUE_CHARS)
