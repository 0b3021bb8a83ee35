"""Removes texts that repeat themselves (Gopher, table A1).

Shares of characters leave white space out of both sides. A duplicate is what stood in the text
before: the first occurrence is none. Duplicate n-grams may overlap; each character counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from scalellm.data.clean.options import RepetitionOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, percent

_Ints = npt.NDArray[np.int64]
_TOP = range(2, 5)
_DUPLICATE = range(5, 11)


class RepetitionStage:
    def __init__(self, options: RepetitionOptions) -> None:
        self._options = options

    def __call__(self, page: Page) -> Verdict:
        for kind, setting, share in self._measured(page):
            limit = getattr(self._options, setting)
            if share > limit:
                reason = f"{_SENTENCES[kind]} {percent(share)} of the {_whole(setting)}, "
                return Verdict(kind=kind, reason=f"{reason}the limit is {percent(limit)}")
        return KEEP

    @staticmethod
    def _measured(page: Page) -> Iterator[tuple[str, str, float]]:
        """Yields (kind, setting, share), the cheap ones first."""
        lines, characters = duplicate_shares(page.lines)
        yield "duplicate lines", "max_duplicate_line_share", lines
        yield "characters in duplicate lines", "max_duplicate_line_character_share", characters
        paragraphs, characters = duplicate_shares(split_paragraphs(page.text))
        yield "duplicate paragraphs", "max_duplicate_paragraph_share", paragraphs
        setting = "max_duplicate_paragraph_character_share"
        yield "characters in duplicate paragraphs", setting, characters
        for size, top, duplicate in ngram_shares(page.words):
            if size in _TOP:
                yield f"top {size}-gram", f"max_top_{size}_gram_share", top
            else:
                setting = f"max_duplicate_{size}_gram_share"
                yield f"duplicate {size}-grams", setting, duplicate


_SENTENCES = {
    "duplicate lines": "duplicate lines are",
    "duplicate paragraphs": "duplicate paragraphs are",
    "characters in duplicate lines": "duplicate lines hold",
    "characters in duplicate paragraphs": "duplicate paragraphs hold",
    **{f"top {size}-gram": f"top {size}-gram is" for size in _TOP},
    **{f"duplicate {size}-grams": f"duplicate {size}-grams hold" for size in _DUPLICATE},
}


def _whole(setting: str) -> str:
    wholes = {"max_duplicate_line_share": "lines", "max_duplicate_paragraph_share": "paragraphs"}
    return wholes.get(setting, "characters")


def split_paragraphs(text: str) -> list[str]:
    """What stands between blank lines."""
    paragraphs: list[str] = []
    current: list[str] = []
    for line in [*text.split("\n"), ""]:
        if bare := line.strip():
            current.append(bare)
        elif current:
            paragraphs.append("\n".join(current))
            current = []
    return paragraphs


def duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Which share of the parts, and of their characters, stood before."""
    seen: set[str] = set()
    count = characters = total = 0
    for part in parts:
        total += len(part)
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return (count / len(parts), characters / total) if parts else (0.0, 0.0)


def ngram_shares(words: Sequence[str]) -> Iterator[tuple[int, float, float]]:
    """Yields (n, share of the most frequent n-gram, share of all duplicate ones) for n = 2..10.

    An n-gram can only stand twice where both its (n-1)-grams do, so the places to look at shrink
    fast; the ids of those two name it exactly, without hashes.
    """
    if not words:
        return
    known: dict[str, int] = {}
    ids: _Ints = np.array([known.setdefault(word, len(known)) for word in words], np.int64)
    lengths: _Ints = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    total = int(ends[-1])
    places: _Ints = np.flatnonzero(np.bincount(ids)[ids] > 1)
    for size in range(2, _DUPLICATE.stop):
        # Neighbours among the places: both (n-1)-grams are duplicates.
        starts = places[np.flatnonzero(np.diff(places) == 1)]
        keys = ids[starts] * len(words) + ids[starts + 1]
        _, gram, count = np.unique(keys, return_inverse=True, return_counts=True)
        twice = count[gram] > 1
        places, gram = starts[twice], gram[twice]
        if not len(places):
            yield from ((rest, 0.0, 0.0) for rest in range(size, _DUPLICATE.stop))
            return
        ids = np.zeros_like(ids)
        ids[places] = gram
        weights = ends[places + size] - ends[places]
        top = duplicate = 0.0
        if size in _TOP:
            top = _top_share(gram, count, weights, total)
        else:
            duplicate = _covered(places, gram, size, lengths) / total
        yield size, top, duplicate


def _top_share(gram: _Ints, count: _Ints, weights: _Ints, total: int) -> float:
    """Characters of the most frequent n-gram (the longest of several) times its count."""
    frequency = count[gram]
    weight = int(weights[frequency == frequency.max()].max())
    return min(1.0, weight * int(frequency.max()) / total)


def _covered(places: _Ints, gram: _Ints, size: int, lengths: _Ints) -> int:
    """Characters of the words in an n-gram that stood before."""
    again = np.ones(len(places), bool)
    again[np.unique(gram, return_index=True)[1]] = False
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(edges, places[again], 1)
    np.add.at(edges, places[again] + size, -1)
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
