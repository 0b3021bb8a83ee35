"""Runs a text through the stages and tells what each did."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scalellm.data.clean.encoding import EncodingStage
from scalellm.data.clean.html import HtmlStage
from scalellm.data.clean.language import LanguageStage
from scalellm.data.clean.length import LengthStage
from scalellm.data.clean.lines import LinesStage
from scalellm.data.clean.options import STAGES, CleanOptions
from scalellm.data.clean.page import Page, Stage
from scalellm.data.clean.pii import PiiStage
from scalellm.data.clean.repetition import RepetitionStage
from scalellm.data.clean.symbols import SymbolsStage

EXAMPLE_CHARACTERS = 160
_MAKERS: dict[str, Callable[..., Stage]] = {
    "encoding": EncodingStage,
    "html": HtmlStage,
    "lines": LinesStage,
    "length": LengthStage,
    "repetition": RepetitionStage,
    "symbols": SymbolsStage,
    "language": LanguageStage,
    "pii": PiiStage,
}
_WINDOW = 400
# Looser than the `pii` stage, which may be off: a report must not spread an address.
_ADDRESS = re.compile(r"[^\s<>]{1,64}@[^\s<>]{0,255}")
_NUMBER = re.compile(
    r"[A-Z]{0,2}[0-9](?:[ .:/()\-]{0,2}[0-9]){5,}|[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){3,}"
)


@dataclass(frozen=True)
class Cleaned:
    """What became of one text.

    Attributes:
        text: the cleaned text; None: a stage removed it.
        removed_by: the stage that removed it; "": none.
        reason: why, with the value, the unit and the limit.
        changes: counts of what was changed, as {"pii.email": 2, "lines.dropped": 5}.
        kind: the reason without numbers, for counting.
        characters: by stage, how many characters it took away (all that were left where it removed
            the text; negative where it made the text longer).
        examples: by stage, a line of at most 160 characters that shows what it took away, with
            addresses and long numbers hidden.
    """

    text: str | None
    removed_by: str = ""
    reason: str = ""
    changes: Mapping[str, int] = field(default_factory=dict)
    kind: str = ""
    characters: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)


class Cleaner:
    """Cleans texts one by one; the same text gives the same result in every process.

    Raises:
        UserError: a package that an enabled stage needs is not installed, or an unknown language.
    """

    def __init__(self, options: CleanOptions) -> None:
        self.options = options
        chosen = [(name, getattr(options, name)) for name in STAGES]
        self._stages = [(name, _MAKERS[name](its)) for name, its in chosen if its.enabled]

    def __reduce__(self) -> tuple[type[Cleaner], tuple[CleanOptions]]:
        return Cleaner, (self.options,)

    def clean(self, text: str) -> Cleaned:
        """Never raises, whatever the text."""
        page = Page(text)
        changes: dict[str, int] = {}
        characters: dict[str, int] = {}
        examples: dict[str, str] = {}
        for name, stage in self._stages:
            verdict = stage(page)
            if verdict.kind:
                characters[name] = len(page.text)
                examples[name] = _example(page.text, 0)
            elif verdict.text is not None:
                characters[name] = len(page.text) - len(verdict.text)
                at = _first_difference(page.text, verdict.text)
                examples[name] = _example(verdict.text if name == "pii" else page.text, at)
            changes.update({f"{name}.{what}": n for what, n in verdict.changes.items()})
            if verdict.kind:
                return Cleaned(
                    None, name, verdict.reason, changes, verdict.kind, characters, examples
                )
            if verdict.text is not None:
                page = Page(verdict.text)
        return Cleaned(page.text, changes=changes, characters=characters, examples=examples)


def _first_difference(one: str, other: str) -> int:
    """Index of the first character that differs."""
    size, start = 4096, 0
    end = min(len(one), len(other))
    while start < end and one[start : start + size] == other[start : start + size]:
        start += size
    return next((i for i in range(start, end) if one[i] != other[i]), end)


def _example(text: str, at: int) -> str:
    """One line from around `at`, cut at spaces so that nothing hidden is cut in half."""
    start = max(0, at - 20)
    while start and not text[start - 1].isspace() and at - start < _WINDOW:
        start -= 1
    window = text[start : start + 2 * _WINDOW]
    if start + 2 * _WINDOW < len(text):
        window = window[: max(window.rfind(" "), window.rfind("\n")) + 1] or window
    window = _NUMBER.sub("###", _ADDRESS.sub("<EMAIL>", window))
    line = " ".join(window.split()).encode("utf-8", errors="replace").decode("utf-8")
    line = "".join(char if char.isprintable() else "\ufffd" for char in line)
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"
