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
from pathlib import Path

from scalellm.data.tokenizer import SPACE_MARK, TRAINED_KINDS, Tokenizer, load_tokenizer
from scalellm.errors import DataError, UserError, did_you_mean

EOS_PIECE = "<|endoftext|>"
# What each kind learns from: bytes of text per piece, at least and at most so many bytes. Five
# times as much gave 0.7% fewer tokens (bpe, 8,192 pieces) in three times the time.
_SAMPLE_BYTES = {
    "bpe": (1200, 5_000_000, 50_000_000),
    "unigram": (500, 2_000_000, 20_000_000),
    "char": (0, 50_000_000, 50_000_000),
}
_OWN_PIECES = ("\n", "\t")
_SPECIAL_PIECES = 2 + len(_OWN_PIECES)
_MIN_VOCAB_SIZE = {"bpe": 320, "unigram": 320, "char": 8}
# Rarer characters are written as bytes.
_COVERAGE = 0.9995
# Sentencepiece splits its sums over threads, so their number is part of the result: a constant.
_NUM_THREADS = 4
_MAX_SENTENCE_CHARS = 8192
# Line ends and tabs are their own pieces; NUL and the space mark are written as bytes.
_NEVER_LEARNED = f"\n\t\0{SPACE_MARK}"


def sample_bytes(kind: str, vocab_size: int) -> int:
    """Bytes of text that are worth learning a tokenizer from."""
    per_piece, least, most = _SAMPLE_BYTES[kind]
    return min(max(per_piece * vocab_size, least), most)


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
        texts: what to learn from, held in memory; see `sample_bytes`.
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
    # The space has its place in every alphabet.
    for char in (" ", *_NEVER_LEARNED):
        del counts[char]
    if not counts:
        raise DataError("there is no text to train a tokenizer on; give more text")
    if kind == "char":
        # The alphabet is all there is to learn.
        alphabet = _most_frequent(counts, vocab_size - _SPECIAL_PIECES)
        sentences = list(_chunks(alphabet))
    else:
        # Chinese has thousands of characters: half of a small vocabulary is kept for longer pieces.
        alphabet = _most_frequent(counts, (vocab_size - 256 - _SPECIAL_PIECES) // 2, _COVERAGE)
        others = re.compile(f"[^{re.escape(alphabet)}]+")
        lines = (line for text in texts for line in others.split(text) if line)
        sentences = [sentence for line in lines for sentence in _chunks(line)]
    out.write_bytes(_train(kind, sentences, vocab_size))
    return load_tokenizer(out)


def _most_frequent(counts: Counter[str], max_chars: int, coverage: float = 1.0) -> str:
    """A space and the most frequent characters that make up `coverage` of the text.

    At most `max_chars` altogether.
    """
    wanted, covered, chosen = coverage * counts.total(), 0, [" "]
    for char in sorted(counts, key=lambda char: (-counts[char], char))[: max_chars - 1]:
        if covered >= wanted:
            break
        chosen.append(char)
        covered += counts[char]
    return "".join(chosen)


def _chunks(line: str) -> Iterator[str]:
    for start in range(0, len(line), _MAX_SENTENCE_CHARS):
        yield line[start : start + _MAX_SENTENCE_CHARS]


def _train(kind: str, sentences: list[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            # Rare characters were left out before: sentencepiece refuses a share below 0.98.
            character_coverage=1.0,
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
