"""Removes texts of too few or too many characters or words (Gopher)."""

from __future__ import annotations

from scalellm.data.clean.options import LengthOptions
from scalellm.data.clean.page import KEEP, Page, Verdict


class LengthStage:
    def __init__(self, options: LengthOptions) -> None:
        self._options = options

    def __call__(self, page: Page) -> Verdict:
        options = self._options
        return (
            _outside(len(page.text), "characters", options.min_characters, options.max_characters)
            or _outside(len(page.words), "words", options.min_words, options.max_words)
            or self._mean_word(page)
            or KEEP
        )

    def _mean_word(self, page: Page) -> Verdict | None:
        """Words cut by two characters say nothing of their length."""
        if not page.words or not page.is_spaced:
            return None
        mean = sum(map(len, page.words)) / len(page.words)
        least, most = self._options.min_mean_word_characters, self._options.max_mean_word_characters
        found = f"its words have {mean:.1f} characters on average"
        if mean < least:
            return Verdict(kind="words too short", reason=f"{found}, the least is {least:g}")
        if most is not None and mean > most:
            return Verdict(kind="words too long", reason=f"{found}, the limit is {most:g}")
        return None


def _outside(count: int, unit: str, least: int, most: int | None) -> Verdict | None:
    if count < least:
        reason = f"has {count:,} {unit}, the least is {least:,}"
        return Verdict(kind=f"too few {unit}", reason=reason)
    if most is not None and count > most:
        reason = f"has {count:,} {unit}, the limit is {most:,}"
        return Verdict(kind=f"too many {unit}", reason=reason)
    return None
