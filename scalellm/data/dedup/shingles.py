"""Word n-grams of texts in any language as numbers, by numpy over code points.

A word is a run of letters, digits, marks and underscores, lower-cased; a character of a script that
is written without spaces (Chinese, Japanese, Thai, ...) is a word of its own. Everything else only
parts words. A word's hash is a polynomial in its characters modulo 2^64: sums over the whole array,
shifted to the word's start by powers of the inverse of an odd base.

Suffixes of shapes: C code points, W words, S shingles, N documents.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

# Arrays of this many code points stay in a core's cache. A longer text is cut at spaces, and only
# if there is none so far, in a word; never where its neighbours in the batch would have a say.
_BLOCK_CHARS = 1 << 16
_BASE = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
_NGRAM_BASE = np.uint64(0xD6E8FEB86659FD93)
# Letters beyond this code point do not exist in Unicode 17.
_LETTERS_END = 0x33480
_NO_SPACES = (
    *((0x0E00, 0x0F00), (0x0F00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x2E80, 0x3100)),
    *((0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0xFF66, 0xFFA0)),
    (0x1B000, 0x1B170),
    (0x20000, _LETTERS_END),
)


def mix64(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64 numbers in place (murmur3's finaliser) and returns them."""
    values ^= values >> _SHIFT
    values *= _MIX_1
    values ^= values >> _SHIFT
    values *= _MIX_2
    values ^= values >> _SHIFT
    return values


def shingle_hashes(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all word n-grams, repeats included.

    Returns:
        hashes_S: uint64, document after document.
        counts_N: int64, how many are of each document; 0 for one of less than `ngram` words.
    """
    words_W, word_counts_N = _word_hashes(texts)
    counts_N = np.maximum(word_counts_N - (ngram - 1), 0)
    num_starts = len(words_W) - (ngram - 1)
    if num_starts <= 0:
        return np.zeros(0, np.uint64), counts_N
    hashes = words_W[:num_starts].copy()
    for at in range(1, ngram):
        hashes *= _NGRAM_BASE
        hashes += words_W[at : at + num_starts]
    # An n-gram that reaches into the next document is none: of W words the last n - 1 start none.
    is_start_W = np.ones(len(words_W), bool)
    ends_N = np.cumsum(word_counts_N)
    for back in range(1, ngram):
        is_start_W[ends_N[word_counts_N >= back] - back] = False
    return mix64(hashes[is_start_W[:num_starts]]), counts_N


def _word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
    counts_N = np.zeros(len(texts), np.int64)
    for owners, pieces in _blocks(texts):
        starts_W, hashes_W = _block_words("\n".join(pieces))
        hashes.append(hashes_W)
        ends = np.cumsum([len(piece) + 1 for piece in pieces])
        words_before = np.searchsorted(starts_W, ends)
        np.add.at(counts_N, owners, np.diff(words_before, prepend=0))
    return np.concatenate(hashes), counts_N


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yields (number of the text, piece of it) lists of at most `_BLOCK_CHARS` characters."""
    owners: list[int] = []
    pieces: list[str] = []
    room = _BLOCK_CHARS
    for owner, text in enumerate(texts):
        for piece in _pieces(text):
            if room < len(piece):
                yield owners, pieces
                owners, pieces, room = [], [], _BLOCK_CHARS
            owners.append(owner)
            pieces.append(piece)
            room -= len(piece) + 1
    if pieces:
        yield owners, pieces


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _BLOCK_CHARS:
        stop = start + _BLOCK_CHARS
        stop = text.rfind(" ", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _block_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where words start (code points) and their hashes (uint64)."""
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    values_of, stands_alone = _tables()
    values_C = values_of[codes_C]
    in_word_C = values_C != 0
    starts_word_C = in_word_C.copy()
    starts_word_C[1:] &= ~in_word_C[:-1]
    if not text.isascii():
        alone_C = stands_alone[codes_C]
        starts_word_C |= alone_C
        starts_word_C[1:] |= in_word_C[1:] & alone_C[:-1]
    starts_W = np.flatnonzero(starts_word_C)
    if not len(starts_W):
        return starts_W, np.zeros(0, np.uint64)
    powers, inverse_powers = _powers()
    terms_C = values_C * powers[: len(codes_C)]
    hashes_W = np.add.reduceat(terms_C, starts_W)
    hashes_W *= inverse_powers[starts_W]
    return starts_W, mix64(hashes_W)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Per code point: a number, the same for both cases, 0 outside words; and "a word by itself".

    Letters that Unicode gained since this Python was built count as gaps between words.
    """
    lower = np.zeros(_LETTERS_END, np.uint64)
    for code in range(_LETTERS_END):
        if unicodedata.category(chr(code))[0] in "LNM" or code == ord("_"):
            lower[code] = ord(chr(code).lower()[0])
    numbers = mix64(lower.copy()) >> np.uint64(32) | np.uint64(1)
    values = np.zeros(0x110000, np.uint32)
    values[:_LETTERS_END] = np.where(lower > 0, numbers, 0)
    alone = np.zeros(0x110000, bool)
    for start, stop in _NO_SPACES:
        alone[start:stop] = values[start:stop] != 0
    return values, alone


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """`_BASE**i` and `_BASE**-i` modulo 2^64 for every place in a block."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        factors = np.full(_BLOCK_CHARS + 1, base, np.uint64)
        factors[0] = 1
        tables.append(np.multiply.accumulate(factors))
    return tables[0], tables[1]
