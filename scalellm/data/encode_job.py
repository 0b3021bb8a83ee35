"""Documents to ids in a worker process: one batch in, one array and its bounds out."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalellm.data.tokenizer import Tokenizer, load_tokenizer

# Large against the cost of sending, small against memory: two batches a worker are under way.
BATCH_CHARS = 1 << 19

SplitTexts = list[tuple[str, str]]


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch of D documents, one after the other.

    Attributes:
        splits: the split of each document.
        tokens: ids of all, an end-of-text id after each.
        ends_D: where each document ends in `tokens`.
        text_bytes: UTF-8 bytes of each text.
        text_words: words of each text, split at white space.
        unknown_tokens: ids that stand for something the vocabulary lacks.
    """

    splits: list[str]
    tokens: np.ndarray
    ends_D: np.ndarray
    text_bytes: list[int]
    text_words: list[int]
    unknown_tokens: int

    def documents(self) -> Iterator[tuple[str, np.ndarray, int, int]]:
        """Yields (split, ids, text bytes, text words) of each document."""
        starts = [0, *self.ends_D[:-1].tolist()]
        rows = zip(self.splits, starts, self.ends_D, self.text_bytes, self.text_words, strict=True)
        for split, start, end, text_bytes, text_words in rows:
            yield split, self.tokens[start:end], text_bytes, text_words


# Batches and a tokenizer file in, the encoded batches out, in order.
Encode = Callable[[Iterable[SplitTexts], Path], Generator[Encoded, None, None]]


def batches(texts: Iterable[tuple[str, str]]) -> Iterator[SplitTexts]:
    """Groups (split, text) pairs to about `BATCH_CHARS` characters."""
    batch: SplitTexts = []
    chars = 0
    for split, text in texts:
        batch.append((split, text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# One tokenizer a process: it is loaded once and its memory of words grows with use.
_tokenizer: Tokenizer | None = None


def load(path: Path) -> None:
    """Loads the tokenizer of this process."""
    global _tokenizer
    if multiprocessing.parent_process() is not None:
        # One core a worker: the package tokenizers would start a thread per core in each.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(path)


def encode(batch: SplitTexts) -> Encoded:
    """Encodes one batch with the tokenizer of this process."""
    if _tokenizer is None:
        raise RuntimeError("encode() before load()")
    texts = [text for _, text in batch]
    ids = _tokenizer.encode_batch(texts)
    end = np.array([_tokenizer.eos_id], ids[0].dtype)
    unknown = _tokenizer.unk_id
    tokens = np.concatenate([part for one in ids for part in (one, end)])
    return Encoded(
        splits=[split for split, _ in batch],
        tokens=tokens,
        ends_D=np.cumsum([len(one) + 1 for one in ids]),
        text_bytes=[len(text.encode()) for text in texts],
        text_words=[len(text.split()) for text in texts],
        unknown_tokens=0 if unknown is None else int(np.count_nonzero(tokens == unknown)),
    )
