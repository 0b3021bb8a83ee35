"""Removes texts in other languages; a long text is asked piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from scalellm.data.clean.options import LanguageOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, library, percent
from scalellm.errors import ConfigError, did_you_mean


class LanguageStage:
    def __init__(self, options: LanguageOptions) -> None:
        self._options = options
        for code in options.languages:
            known = _identifier().labels
            if code not in known:
                raise ConfigError(
                    f"language.languages={code!r} is no ISO 639 code that is known"
                    f"{did_you_mean(code, known)}: write for example [en, de, zh]"
                )

    def __call__(self, page: Page) -> Verdict:
        wanted = self._options.languages
        if not wanted:
            return KEEP
        votes = self._votes(page.text)
        decided = sum(votes.values())
        if not decided:  # digits, names, two words: no evidence against it
            return KEEP
        share = sum(votes.get(code, 0) for code in wanted) / decided
        if share >= self._options.min_share:
            return KEEP
        most = max(sorted(votes), key=lambda code: votes[code])
        reason = (
            f"{percent(share)} of the text is in {', '.join(wanted)} (most is {most}), the least "
            f"is {percent(self._options.min_share)}"
        )
        return Verdict(kind=f"language {most}", reason=reason)

    def _votes(self, text: str) -> dict[str, int]:
        """Characters by language, of the pieces whose language is clear."""
        votes: dict[str, int] = {}
        for chunk in self._chunks(text):
            code, confidence = _identifier().classify(chunk)
            # "zxx" is py3langid's word for what is no language.
            if confidence >= self._options.min_confidence and code != "zxx":
                votes[code] = votes.get(code, 0) + len(chunk)
        return votes

    def _chunks(self, text: str) -> Iterator[str]:
        size = self._options.chunk_characters
        # A short rest joins the last piece: few letters make a poor vote.
        number = max(1, len(text) // size)
        asked = min(number, self._options.max_chunks)
        for index in range(asked):
            start = index * number // asked * size
            end = len(text) if start // size == number - 1 else start + size
            yield text[start:end]


@cache
def _identifier() -> Any:
    """The model with its probabilities, loaded once in each process (about a second)."""
    langid = library("py3langid.langid", "py3langid", "language.enabled")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
