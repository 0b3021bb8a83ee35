"""Removes texts that are no prose: symbols, bullets, few letters or stop words (Gopher)."""

from __future__ import annotations

import re

from scalellm.data.clean.options import SymbolsOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, percent
from scalellm.data.clean.stop_words import STOP_WORDS

_LETTER = re.compile(r"[^\W\d_]")
_BULLETS = ("•", "‣", "◦", "▪", "●", "○", "■", "·", "*", "-", "–")  # noqa: RUF001
_ELLIPSES = ("...", "…")
_FIRST_WORDS = 400


class SymbolsStage:
    def __init__(self, options: SymbolsOptions) -> None:
        self._options = options

    def __call__(self, page: Page) -> Verdict:
        if not page.words:
            return KEEP
        return (
            self._per_word(page, "#", ("#",), self._options.max_hash_share)
            or self._per_word(page, "ellipses", _ELLIPSES, self._options.max_ellipsis_share)
            or self._of_lines(page)
            or self._alphabetic(page)
            or self._stop_words(page)
            or KEEP
        )

    @staticmethod
    def _per_word(page: Page, name: str, symbols: tuple[str, ...], limit: float) -> Verdict | None:
        found = sum(page.text.count(symbol) for symbol in symbols) / len(page.words)
        if found <= limit:
            return None
        reason = f"has {found:.2f} {name} for each word, the limit is {limit:g}"
        return Verdict(kind=f"too many {name}", reason=reason)

    def _of_lines(self, page: Page) -> Verdict | None:
        bullets = sum(line.startswith(_BULLETS) for line in page.lines) / len(page.lines)
        ellipses = sum(line.endswith(_ELLIPSES) for line in page.lines) / len(page.lines)
        for words, share, limit in (
            ("begin with a bullet", bullets, self._options.max_bullet_line_share),
            ("end with an ellipsis", ellipses, self._options.max_ellipsis_line_share),
        ):
            if share > limit:
                reason = f"{percent(share)} of the lines {words}, the limit is {percent(limit)}"
                return Verdict(kind=f"lines {words}", reason=reason)
        return None

    def _alphabetic(self, page: Page) -> Verdict | None:
        limit = self._options.min_alphabetic_word_share
        with_letter = sum(word.isalpha() or bool(_LETTER.search(word)) for word in page.words)
        share = with_letter / len(page.words)
        if share >= limit:
            return None
        reason = f"{percent(share)} of the words have a letter, the least is {percent(limit)}"
        return Verdict(kind="too few words with letters", reason=reason)

    def _stop_words(self, page: Page) -> Verdict | None:
        limit = self._options.min_stop_words
        if not limit or not page.is_spaced:
            return None
        # Prose has them soon; only a text without them is read to its end.
        for words in (page.words[:_FIRST_WORDS], page.words):
            found = len(STOP_WORDS.intersection(word.lower() for word in words))
            if found >= limit:
                return None
        reason = f"has {found} different stop words of any known language, the least is {limit}"
        return Verdict(kind="too few stop words", reason=reason)
