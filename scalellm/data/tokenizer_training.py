"""Trains bpe, unigram and char tokenizers with sentencepiece: exact round trips, same bytes always.

Nothing is normalised: no Unicode rewriting, no space put before a text, runs of spaces kept, so
that program text survives. Line ends and tabs are pieces of their own. What is not in the
vocabulary of bpe and unigram is written as UTF-8 bytes (byte fallback).
Sources: https://arxiv.org/abs/1808.06226 (sentencepiece), https://arxiv.org/abs/1804.10959
(unigram), https://arxiv.org/abs/1508.07909 (bpe).
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from scalellm.data.tokenizer import SPACE_MARK, TRAINED_KINDS, Tokenizer, load_tokenizer
from scalellm.errors import DataError, UserError, did_you_mean

EOS_PIECE = "<|endoftext|>"
# What each kind learns from. More text hardly changes the pieces; unigram needs 3 s per MB.
SAMPLE_BYTES = {"bpe": 50_000_000, "unigram": 10_000_000, "char": 50_000_000}
_OWN_PIECES = ("\n", "\t")
_SPECIAL_PIECES = 2 + len(_OWN_PIECES)
_MIN_VOCAB_SIZE = {"bpe": 320, "unigram": 320, "char": 8}
_CHARACTER_COVERAGE = 0.9995
# Sentencepiece splits its sums over threads, so their number is part of the result: a constant.
_NUM_THREADS = 4
_MAX_SENTENCE_CHARS = 8192
# Line ends and tabs are their own pieces; NUL and the space mark are written as bytes.
_NEVER_LEARNED = f"\n\t\0{SPACE_MARK}"
_SENTENCE_ENDS = re.compile(f"[{_NEVER_LEARNED}]+")


def check_vocab_size(kind: str, vocab_size: int) -> None:
    """Refuses a vocabulary that cannot hold what every text needs.

    Raises:
        UserError: an unknown kind, or too few pieces.
    """
    if kind not in TRAINED_KINDS:
        raise UserError(
            f"unknown tokenizer {kind!r}; use {', '.join(TRAINED_KINDS)}, or a .model or "
            f"tokenizer.json file{did_you_mean(kind, TRAINED_KINDS)}"
        )
    if vocab_size < _MIN_VOCAB_SIZE[kind]:
        reason = "256 bytes, special pieces and characters" if kind != "char" else "special pieces"
        raise UserError(
            f"vocab_size={vocab_size} is too small for {kind}: {reason} need at least "
            f"{_MIN_VOCAB_SIZE[kind]} pieces"
        )


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Trains a tokenizer and writes it to `out`; the same texts give the same bytes.

    A text too small for `vocab_size` pieces gives fewer: see the result's `vocab_size`.

    Args:
        kind: "bpe", "unigram" or "char".
        texts: what to learn from, held in memory; see `SAMPLE_BYTES`.
        vocab_size: pieces; for char the most frequent characters up to so many.
        out: the `.model` file to write.

    Raises:
        UserError: see `check_vocab_size`.
        DataError: there is no text to learn from.
    """
    check_vocab_size(kind, vocab_size)
    texts = list(texts)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    for char in _NEVER_LEARNED:
        del counts[char]
    if not counts:
        raise DataError("there is no text to train a tokenizer on; give more text")
    counts[" "] += 1
    if kind == "char":
        # The alphabet is all there is to learn.
        room = vocab_size - _SPECIAL_PIECES
        alphabet = sorted(counts, key=lambda char: (-counts[char], char))[:room]
        sentences, coverage = list(_chunks("".join(alphabet))), 1.0
    else:
        sentences = [sentence for text in texts for sentence in _sentences(text)]
        coverage = _coverage(counts, (vocab_size - 256 - _SPECIAL_PIECES) // 2)
    out.write_bytes(_train(kind, sentences, vocab_size, coverage))
    return load_tokenizer(out)


def _sentences(text: str) -> Iterator[str]:
    for line in _SENTENCE_ENDS.split(text):
        if line:
            yield from _chunks(line)


def _chunks(line: str) -> Iterator[str]:
    for start in range(0, len(line), _MAX_SENTENCE_CHARS):
        yield line[start : start + _MAX_SENTENCE_CHARS]


def _coverage(counts: Counter[str], max_chars: int) -> float:
    """Share of the text whose characters get pieces: the usual, or what half the pieces hold.

    Chinese has thousands of characters; a small vocabulary must leave room for longer pieces.
    """
    total = counts.total()
    covered = list(accumulate(count for _, count in counts.most_common(max_chars)))
    return min(_CHARACTER_COVERAGE, covered[-1] / total)


def _train(kind: str, sentences: list[str], vocab_size: int, coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=coverage,
            # Without a piece a space would come back as the mark that stands for it.
            required_chars=SPACE_MARK,
            byte_fallback=kind != "char",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Indentation as one piece: a third fewer tokens on program text.
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(_OWN_PIECES),
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOS_PIECE,
            unk_surface="\ufffd",
            max_sentence_length=4 * _MAX_SENTENCE_CHARS,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot train a {kind} tokenizer of {vocab_size} pieces on this text: "
            f"{error}"
        ) from None
    return model.getvalue()
