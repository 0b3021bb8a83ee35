"""A text with its words and lines, split at most once, and what a stage says of it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scalellm.errors import UserError

# Scripts written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
# A word of these scripts has about two characters; the count restarts at every punctuation mark,
# so that a passage that stands twice gives the same words twice.
_WORD = re.compile(rf"[{_UNSPACED}]{{1,2}}|[^\s{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """Words between spaces; two characters each where a script has no spaces."""
    if text.isascii() or not _UNSPACED_RUN.search(text):
        return text.split()
    return _WORD.findall(text)


class Page:
    """One text on its way through the stages."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return split_words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without the space around them."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def is_spaced(self) -> bool:
        """Whether most characters belong to scripts with spaces between the words."""
        if self.text.isascii():
            return True
        unspaced = sum(len(run) for run in _UNSPACED_RUN.findall(self.text))
        return 2 * unspaced < sum(map(len, self.words))


@dataclass(frozen=True)
class Verdict:
    """What a stage makes of a page.

    Attributes:
        text: the new text; None: it stays as it is.
        kind: why the document goes, in words without numbers; "": it stays.
        reason: the same with the value, the unit and the limit.
        changes: what was changed, by its kind.
    """

    text: str | None = None
    kind: str = ""
    reason: str = ""
    changes: Mapping[str, int] = field(default_factory=dict)


KEEP = Verdict()
Stage = Callable[[Page], Verdict]


def percent(share: float) -> str:
    """0.2 -> "20%", 0.1234 -> "12.3%"."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def library(module: str, package: str, setting: str) -> Any:
    """Imports an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{setting} needs the package {package}; install it with: "
            f"pip install 'scalellm[clean]', or set {setting}=false"
        ) from None
