"""Train or validation, by the hash of a document's text; and the sample a tokenizer learns from.

A document's split depends on its text alone: not on its place, name, or the other documents, so
adding text moves none and equal documents are never in both. Only where that would leave a split
empty, one document is chosen by its hash, or cut (see `assign_splits`).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator

TRAIN, VALIDATION = "train", "validation"
# Of one long document a tokenizer learns no more than this.
_MAX_SAMPLED_CHARS = 1 << 20


def text_hash(text: str, seed: int = 0) -> tuple[float, int]:
    """Two independent numbers from a text: a split position in [0, 1) and a 64-bit sample order."""
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=16, salt=salt).digest()
    # 53 bits are what a float holds exactly.
    position = int.from_bytes(digest[:8], "little") >> 11
    return position / (1 << 53), int.from_bytes(digest[8:], "little")


def assign_splits(
    texts: Iterable[str], fraction: float, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) for every text, in one pass and the memory of one text.

    A text goes to validation if its position is below `fraction`. If that leaves validation empty,
    the text of the lowest position gives its end: about `fraction` of all characters, from the
    start of a paragraph, line or word; a text shorter than twice that goes whole. If it leaves
    train empty, the text of the highest position goes to train. A single text is always cut.
    `fraction` 0 puts everything into train.

    Args:
        texts: the documents, in any order.
        fraction: share of documents for validation, in [0, 1).
        seed: another seed draws other documents.
    """
    if fraction == 0:
        yield from ((TRAIN, text) for text in texts)
        return
    # The candidate for the other split is held back until that split has a text of its own.
    held: tuple[float, str] | None = None
    side, total_chars, count = "", 0, 0
    for text in texts:
        position = text_hash(text, seed)[0]
        split = VALIDATION if position < fraction else TRAIN
        total_chars += len(text)
        count += 1
        if count == 1:
            held, side = (position, text), split
        elif held is None:
            yield split, text
        elif split != side:
            yield side, held[1]
            yield split, text
            held = None
        elif (position < held[0]) == (side == TRAIN):
            yield side, held[1]
            held = (position, text)
        else:
            yield side, text
    if held is None:
        return
    if count > 1 and side == VALIDATION:
        yield TRAIN, held[1]
    else:
        yield from _cut_end(held[1], fraction * total_chars, alone=count == 1)


def _cut_end(text: str, wanted_chars: float, *, alone: bool) -> Iterator[tuple[str, str]]:
    if not alone and len(text) <= 2 * wanted_chars:
        yield VALIDATION, text
        return
    cut = _cut_near(text, len(text) - max(1, round(wanted_chars)))
    if text[:cut].strip() and text[cut:].strip():
        yield TRAIN, text[:cut]
        yield VALIDATION, text[cut:]
    else:
        yield (TRAIN if alone else VALIDATION), text


def _cut_near(text: str, at: int) -> int:
    """The start of a paragraph near `at`, else of a line, else of a word, else `at`."""
    near = max(len(text) - at, 1)
    for mark, reach in (("\n\n", near), ("\n", near), (" ", near)):
        before = text.rfind(mark, max(0, at - reach), at)
        if before >= 0 and text[:before].strip():
            return before + len(mark)
        after = text.find(mark, at, at + reach)
        if after >= 0 and text[after:].strip():
            return after + len(mark)
    return at


class TextSample:
    """The texts of the lowest sample order until they hold `limit_bytes`: of any input order alike.

    Memory is `limit_bytes` and one text.
    """

    def __init__(self, limit_bytes: int, seed: int = 0) -> None:
        self._limit_bytes, self._seed = limit_bytes, seed
        self._size_bytes = 0
        # The highest order on top; equal texts have equal order, so the text itself breaks ties.
        self._heap: list[tuple[int, int, str]] = []

    def add(self, text: str) -> None:
        text = text[:_MAX_SAMPLED_CHARS]
        size_bytes = len(text.encode())
        heapq.heappush(self._heap, (-text_hash(text, self._seed)[1], size_bytes, text))
        self._size_bytes += size_bytes
        while self._size_bytes - self._heap[0][1] >= self._limit_bytes:
            self._size_bytes -= heapq.heappop(self._heap)[1]

    def texts(self) -> list[str]:
        """The sample in its own order, which is that of no source."""
        return [text for _, _, text in sorted(self._heap, reverse=True)]
