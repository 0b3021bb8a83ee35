"""How many ids there are and which one ends a document: told, the tokenizer's, or found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from scalellm.data.format import MAX_VOCAB_SIZE
from scalellm.data.tokenizer import Tokenizer
from scalellm.data.tools._foreign import Parts
from scalellm.errors import DataError, UserError


@dataclass(frozen=True)
class Vocabulary:
    """What ids mean.

    Attributes:
        size: every id is below it.
        eos_id: ends every document.
        cut_id: cuts a source without bounds of its own; None if nothing was told of such an id.
        notes: sentences the user should read.
    """

    size: int
    eos_id: int
    cut_id: int | None
    notes: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What one pass over all documents tells."""

    largest: int = -1
    documents: int = 0
    last_id: int = -1
    same_end: bool = True
    occurrences: int = 0

    def add(self, parts: Parts) -> None:
        filled = [part for part in parts if len(part)]
        if not filled:
            return
        end = int(filled[-1][-1])
        self.last_id = end if self.documents == 0 else self.last_id
        self.same_end &= end == self.last_id
        self.documents += 1
        for part in filled:
            self.largest = max(self.largest, int(part.max()))
            if self.same_end:
                self.occurrences += int(np.count_nonzero(part == self.last_id))

    @property
    def eos_id(self) -> int | None:
        """The id that ends every document and is nowhere else, or None."""
        found = self.documents > 1 and self.same_end and self.occurrences == self.documents
        return self.last_id if found and self.last_id >= 0 else None


def choose_vocabulary(
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    eos_id: int | None,
    documents: Callable[[int | None], Iterator[Parts]],
) -> Vocabulary:
    """Decides by what was told, then by the tokenizer, then by a pass over all documents.

    Without a word about it, the end of text is the id that ends every document and occurs nowhere
    else; if there is none, a new id after all others.

    Args:
        documents: starts a pass, cut at the id given.

    Raises:
        UserError: sizes or ids out of range, or smaller than the tokenizer's.
        DataError: there is no document.
    """
    _check(tokenizer, vocab_size, eos_id)
    notes = []
    if eos_id is None and tokenizer is not None:
        eos_id = tokenizer.eos_id
    size = tokenizer.vocab_size if vocab_size is None and tokenizer is not None else vocab_size
    cut_id = eos_id
    if size is None or eos_id is None:
        seen = _Seen()
        for parts in documents(cut_id):
            seen.add(parts)
        if not seen.documents:
            raise DataError("the sources hold no document; give others")
        if eos_id is None and seen.eos_id is not None:
            eos_id = seen.eos_id
            notes.append(f"every document ends with id {eos_id} and no other place has it: its EOS")
        if seen.largest >= MAX_VOCAB_SIZE - 1:
            raise DataError(
                f"the sources hold token id {seen.largest}, the limit is {MAX_VOCAB_SIZE - 2}; "
                "give the --dtype of the file"
            )
        if size is None:
            size = max(seen.largest, -1 if eos_id is None else eos_id) + 1
            notes.append(f"the vocabulary is what occurs: ids up to {size - 1}; see --vocab-size")
        if eos_id is None:
            eos_id, size = size, size + 1
            notes.append(f"no end of text is known: id {eos_id} was added for it; see --eos-id")
    if not 0 <= eos_id < size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--eos-id={eos_id} is not below the vocabulary of {size} ids (at most "
            f"{MAX_VOCAB_SIZE}); give the --vocab-size and --eos-id of what made the ids"
        )
    return Vocabulary(size, eos_id, cut_id, tuple(notes))


def _check(tokenizer: Tokenizer | None, vocab_size: int | None, eos_id: int | None) -> None:
    if vocab_size is not None and not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size={vocab_size} ids is not 1 to {MAX_VOCAB_SIZE}")
    if eos_id is not None and not 0 <= eos_id < MAX_VOCAB_SIZE:
        raise UserError(f"--eos-id={eos_id} is not 0 to {MAX_VOCAB_SIZE - 1}")
    if tokenizer is not None and vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size={vocab_size} ids is below the {tokenizer.vocab_size} of "
            f"{tokenizer.file}; leave it out, or give more"
        )
