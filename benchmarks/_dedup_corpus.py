"""Documents with planted duplicates whose exact Jaccard similarity is known.

The background has each line of the standard library's sources and help topics once, in its order
(real documents), and then lines drawn at random (synthetic ones), so it has no duplicates of its
own. Every plant copies a document of its own block that comes before it and that no other plant
copies.
"""

from __future__ import annotations

import itertools
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NGRAM = 5
BACKGROUND, EXACT = 0.0, 1.0
LEVELS = (0.7, 0.75, 0.8, 0.85, 0.9)
DECOYS = (0.3, 0.4, 0.5, 0.6)
_TOLERANCE = 0.005
# Copies of 100 background documents: 5 exact, 5 at 0.8, 1 at each other level, 1 decoy of each.
_PLANTS = [EXACT] * 5 + [0.8] * 5 + [0.7, 0.75, 0.85, 0.9, *DECOYS]
_BLOCK_DOCUMENTS = 1000
_LEAST_WORDS = 120
_ATTEMPTS = 4
_WORD = re.compile(r"\w+")


class Documents:
    """A corpus on the disk: texts by number, and what is known about each.

    Attributes:
        jaccard_N: with its original; 0 for the background, 1 for an exact copy.
        level_N: the level the plant was made for.
        original_N: the number of its original; its own for the background.
    """

    def __init__(self, folder: Path) -> None:
        self._texts = folder / "texts.bin"
        facts = np.load(folder / "facts.npz")
        self._offsets = facts["offsets"]
        self.jaccard_N, self.level_N = facts["jaccard"], facts["level"]
        self.original_N = facts["original"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def size_bytes(self, start: int, stop: int) -> int:
        return int(self._offsets[stop] - self._offsets[start])

    def batches(self, start: int, stop: int, batch_bytes: int = 1 << 19) -> Iterator[list[str]]:
        """Yields the texts of a range in order, about `batch_bytes` at a time."""
        with self._texts.open("rb") as file:
            while start < stop:
                limit = self._offsets[start] + batch_bytes
                end = min(max(int(np.searchsorted(self._offsets, limit)), start + 1), stop)
                file.seek(int(self._offsets[start]))
                data = file.read(self.size_bytes(start, end))
                bounds = (self._offsets[start : end + 1] - self._offsets[start]).tolist()
                yield [data[a:b].decode() for a, b in itertools.pairwise(bounds)]
                start = end


def build(folder: Path, size_bytes: int, seed: int) -> Documents:
    """Writes a corpus of at least `size_bytes` bytes of text."""
    rng = random.Random(seed)
    background = _background(rng)
    offsets, facts = [0], []
    with (folder / "texts.bin").open("wb") as file:
        while offsets[-1] < size_bytes:
            block = [next(background) for _ in range(_BLOCK_DOCUMENTS)]
            first = len(facts)
            for text, jaccard, level, original in _with_plants(block, rng):
                offsets.append(offsets[-1] + file.write(text.encode()))
                facts.append((jaccard, level, first + original))
    jaccard, level, original = (np.array(column) for column in zip(*facts, strict=True))
    np.savez(
        folder / "facts.npz",
        offsets=np.array(offsets),
        jaccard=jaccard,
        level=level,
        original=original,
    )
    return Documents(folder)


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(words[at:] for at in range(NGRAM)), strict=False))


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _background(rng: random.Random) -> Iterator[str]:
    lines = _lines()
    at = 0
    while at < len(lines):
        count = _num_lines(rng)
        yield "".join(lines[at : at + count])
        at += count
    while True:
        yield "".join(rng.choices(lines, k=_num_lines(rng)))


def _num_lines(rng: random.Random) -> int:
    """Mostly dozens, sometimes hundreds, as documents of the web are."""
    return max(8, min(int(rng.lognormvariate(4.0, 0.8)), 2000))


def _lines() -> list[str]:
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    texts = [path.read_text("utf-8", "ignore") for path in paths]
    texts += [text for _, text in sorted(topics.topics.items())]
    lines = (line.strip() + "\n" for text in texts for line in text.splitlines())
    # Tables of numbers are no sentences: their lines have n-grams in common by the thousand.
    return list(dict.fromkeys(line for line in lines if len(re.findall("[A-Za-z]{3}", line)) > 2))


def _with_plants(block: list[str], rng: random.Random) -> list[tuple[str, float, float, int]]:
    """The block's documents and the plants, each somewhere behind its original.

    Returns (text, Jaccard similarity, level, place of the original in what is returned).
    """
    placed = [(float(at), text, BACKGROUND, BACKGROUND, at) for at, text in enumerate(block)]
    originals = rng.sample(range(len(block)), len(block))
    vocabulary = words_of(" ".join(rng.sample(block, 20)))
    for level in _PLANTS * (len(block) // 100):
        made = None
        while originals and made is None:
            at = originals.pop()
            made = _copy(block[at], level, vocabulary, rng)
        if made is not None:
            placed.append((rng.uniform(at, len(block)), *made, level, at))
    placed.sort()
    place_of = {at: place for place, (_, _, _, level, at) in enumerate(placed) if not level}
    return [(text, jaccard, level, place_of[at]) for _, text, jaccard, level, at in placed]


def _copy(
    text: str, level: float, vocabulary: list[str], rng: random.Random
) -> tuple[str, float] | None:
    """A copy at the level's exact Jaccard similarity and that; None if there is no way to it."""
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) < _LEAST_WORDS:
        return None
    if level == EXACT:
        return text.replace("\n", "  \n", 3) + "\n", EXACT
    words = words_of(text)
    original = shingles(words)
    for _ in range(_ATTEMPTS if len(words) == len(spans) else 0):
        order = rng.sample(range(len(spans)), len(spans))
        # A quarter of the edited words go away, the others become others.
        news = ["" if rng.random() < 0.25 else rng.choice(vocabulary) for _ in spans]
        low, high = 0, len(spans)
        while low < high:
            middle = (low + high) // 2
            edited = list(words)
            for place in order[:middle]:
                edited[place] = news[place]
            others = shingles([word for word in edited if word])
            jaccard = len(original & others) / max(len(original | others), 1)
            if abs(jaccard - level) <= _TOLERANCE:
                return _edited(text, spans, order[:middle], news), jaccard
            low, high = (middle + 1, high) if jaccard > level else (low, middle)
    return None


def _edited(text: str, spans: list[tuple[int, int]], places: list[int], news: list[str]) -> str:
    parts, end = [], 0
    for place in sorted(places):
        start, stop = spans[place]
        parts += [text[end:start], news[place]]
        end = stop
    return "".join([*parts, text[end:]])
