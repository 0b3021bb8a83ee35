"""A foreign document made whole: one array that ends with the end of text; and its size as text."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scalellm.data.format import dtype_for
from scalellm.data.staging import disk_errors
from scalellm.data.tokenizer import Tokenizer
from scalellm.data.tools._foreign import Parts
from scalellm.data.tools._vocabulary import Vocabulary

# 64 MiB of ids; a longer document is written to a file without a name, and mapped.
_IN_MEMORY_TOKENS = 1 << 24
_CHUNK_TOKENS = 1 << 20


@contextmanager
def whole_document(parts: Parts, vocabulary: Vocabulary, scratch: Path) -> Iterator[np.ndarray]:
    """Gives the ids (n,) of a document, its end of text added if it is missing.

    Args:
        parts: of the document, not empty, all ids within the vocabulary.
        scratch: a folder on a disk with room for a long document.
    """
    filled = [part for part in parts if len(part)]
    closed = int(filled[-1][-1]) == vocabulary.eos_id
    if closed and len(filled) == 1:
        yield filled[0]
        return
    dtype = dtype_for(vocabulary.size)
    if not closed:
        filled.append(np.array([vocabulary.eos_id], dtype))
    size = sum(map(len, filled))
    if size <= _IN_MEMORY_TOKENS:
        yield np.concatenate([part.astype(dtype) for part in filled])
        return
    with disk_errors(scratch, size * dtype.itemsize), tempfile.TemporaryFile(dir=scratch) as file:
        for part in filled:
            for chunk in _chunks(part):
                file.write(chunk.astype(dtype).tobytes())
        file.flush()
        mapped = np.memmap(file, dtype, mode="r", shape=(size,))
    yield np.asarray(mapped)


def position_of(tokens: np.ndarray) -> float:
    """A number in [0, 1) from the ids of a document alone."""
    digest = hashlib.blake2b(digest_size=8)
    for chunk in _chunks(tokens):
        digest.update(chunk.astype("<u4").tobytes())
    return (int.from_bytes(digest.digest(), "little") >> 11) / (1 << 53)


def text_size(tokenizer: Tokenizer | None, tokens: np.ndarray) -> tuple[int, int]:
    """UTF-8 bytes and words of a document's text, (0, 0) if no tokenizer tells.

    Exact up to a million ids; in longer ones a word or character may be cut at each million.
    """
    text_bytes = text_words = 0
    if tokenizer is not None:
        for chunk in _chunks(tokens):
            text = tokenizer.decode(chunk.tolist())
            text_bytes += len(text.encode("utf-8", "replace"))
            text_words += len(text.split())
    return text_bytes, text_words


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]
