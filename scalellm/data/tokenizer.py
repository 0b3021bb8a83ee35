"""Tokenizers behind one interface: sentencepiece `.model` files and Hugging Face `tokenizer.json`.

Models trained here (see `tokenizer_training`) give back every text exactly, `decode(encode(x)) ==
x`: bpe and unigram always, char where all characters are known. A foreign model does what it does.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scalellm.errors import DataError, UserError, did_you_mean

TRAINED_KINDS = ("bpe", "unigram", "char")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# What the end of a text is called in the tokenizers people use.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
# Sentencepiece writes a space as this character, so a real one needs care.
SPACE_MARK = "\u2581"
# No piece reaches over a line end, a tab, or from a word into the space after it (see `_is_plain`).
_SEGMENT = re.compile(rf"[\n\t{SPACE_MARK}]| *[^ \n\t{SPACE_MARK}]+| +")
_MAX_CACHED_SEGMENTS = 200_000
_CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        kind: "bpe", "unigram", "char", "word" or "hf".
        vocab_size: number of ids; every id is in [0, vocab_size).
        eos_id: the id that ends a document; `encode` never adds it.
        unk_id: the id of what the vocabulary lacks, or None if it lacks nothing.
        file: the `.model` or `.json` file.
    """

    kind: str
    vocab_size: int
    eos_id: int
    unk_id: int | None
    file: Path

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (n,) uint16 or, for vocabularies above 65,536, uint32."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; ids of no text, such as `eos_id`, give nothing."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a `.model` or `.json` file, or the one in a dataset's or run's directory.

    Raises:
        UserError: no such file, an unknown suffix, or a tokenizer without an end-of-text token.
        DataError: the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no {' or '.join(TOKENIZER_FILES)}")
        path = found[0]
    if not path.is_file():
        names = [*TRAINED_KINDS, *_siblings(path)]
        raise UserError(
            f"there is no tokenizer file {path}; use {', '.join(TRAINED_KINDS)}, or a .model or "
            f"tokenizer.json file{did_you_mean(path.name, names)}"
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise UserError(f"{path} is neither a .model (sentencepiece) nor a .json (Hugging Face) file")


class SentencePieceTokenizer:
    """A sentencepiece model.

    Sentencepiece searches a whole text at once. Where no piece can reach over the end of a word,
    the same ids come out word by word, and words repeat: they are encoded once and remembered,
    which measured 1.3 (program text) to 4 times (prose) as fast. For bpe the ids are those of
    sentencepiece; for unigram too, except where two segmentations are equally likely within float
    rounding.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.file = path
        data = path.read_bytes()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            spec = _ModelSpec(data)
            if not spec.has_pieces:
                raise ValueError("it has no pieces")
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{path} is damaged or no sentencepiece model: {error}") from None
        self.kind = spec.kind
        self.vocab_size = int(self._processor.vocab_size())
        self.eos_id = int(self._processor.eos_id())
        self.unk_id: int | None = int(self._processor.unk_id())
        if self.eos_id < 0:
            raise UserError(
                f"{path} has no end-of-text piece; train it with --eos_id, or use another tokenizer"
            )
        self._dtype = _ids_dtype(self.vocab_size)
        plain = spec.is_plain and self._has_plain_pieces()
        self._cache = _SegmentIds(self._processor, self._dtype) if plain else None
        self._ids_of_chars = self._char_table() if plain and self.kind == "char" else None

    def encode(self, text: str) -> list[int]:
        return list(map(int, self.encode_batch([text])[0]))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._ids_of_chars is not None:
            codes = (np.frombuffer(text.encode("utf-32-le"), "<u4") for text in texts)
            return [self._ids_of_chars[code] for code in codes]
        if self._cache is None:
            ids = self._processor.encode(texts, num_threads=1)
            return [np.array(one, self._dtype) for one in ids]
        return self._cache.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(one) for one in ids]))

    def _pieces(self) -> Iterator[tuple[int, str]]:
        """(id, text) of every piece that stands for text."""
        sp = self._processor
        for one in range(self.vocab_size):
            if not (sp.is_control(one) or sp.is_unknown(one) or sp.is_byte(one)):
                yield one, str(sp.id_to_piece(one)).replace(SPACE_MARK, " ")

    def _has_plain_pieces(self) -> bool:
        return all(
            _SEGMENT.fullmatch(text) and (len(text) == 1 or self.kind != "char")
            for _, text in self._pieces()
        )

    def _char_table(self) -> np.ndarray:
        """(1,114,112,) id of every code point."""
        ids = np.full(_CODE_POINTS, self.unk_id, self._dtype)
        for one, text in self._pieces():
            ids[ord(text)] = one
        return ids


class _SegmentIds:
    """The ids of words, remembered; as bytes, so that a text is one join and one view."""

    def __init__(self, processor: Any, dtype: np.dtype[Any]) -> None:
        self._processor, self._dtype = processor, dtype
        self._known: dict[str, bytes] = {}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        segments = [_SEGMENT.findall(text) for text in texts]
        new = list(set().union(*segments).difference(self._known))
        # One call for all: a call costs as much as a few words.
        for segment, ids in zip(new, self._processor.encode(new, num_threads=1), strict=True):
            self._known[segment] = array(self._dtype.char, ids).tobytes()
        if SPACE_MARK in self._known:
            self._known[SPACE_MARK] = self._space_mark_ids()
        out = [
            np.frombuffer(b"".join(map(self._known.__getitem__, one)), self._dtype)
            for one in segments
        ]
        if len(self._known) > _MAX_CACHED_SEGMENTS:
            self._known.clear()
        return out

    def _space_mark_ids(self) -> bytes:
        # As a piece it would come back as a space; as bytes it comes back as itself.
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        return np.array(ids, self._dtype).tobytes()


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the package `tokenizers` (extra `hf`); padding and truncation off."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{path} needs the package tokenizers; install it with: pip install 'scalellm[hf]'"
            ) from None
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            # The package raises bare Exception for any file it cannot read.
            raise DataError(f"{path} is damaged or no tokenizer.json: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.file, self.kind = path, "hf"
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the number of words is not the bound.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._dtype = _ids_dtype(self.vocab_size)
        ends = [token for token in _END_OF_TEXT if token in vocabulary]
        if not ends:
            raise UserError(
                f"{path} has no end-of-text token; add one of {', '.join(_END_OF_TEXT)} to it"
            )
        self.eos_id = int(vocabulary[ends[0]])
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unk_id: int | None = vocabulary.get(unknown) if isinstance(unknown, str) else None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(one.ids, self._dtype) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=True))


class _ModelSpec:
    """What a sentencepiece model file says of itself (sentencepiece_model.proto).

    Read from the wire format, because the package's own reader of it needs protobuf.
    """

    _KINDS = ("", "unigram", "bpe", "word", "char")

    def __init__(self, data: bytes) -> None:
        top = dict(_proto_fields(data))
        self.has_pieces = 1 in top
        trainer = dict(_proto_fields(_as_bytes(top.get(2))))
        normalizer = dict(_proto_fields(_as_bytes(top.get(3))))
        self.kind = self._KINDS[int(trainer.get(3, 1))]
        # Text goes in as it is: no rewriting, no space put before it, spaces kept and marked.
        self.is_plain = (
            not normalizer.get(2)
            and not normalizer.get(3, 1)
            and not normalizer.get(4, 1)
            and bool(normalizer.get(5, 1))
            and not trainer.get(24, 0)
            and self.kind != "word"
        )


def _as_bytes(value: int | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else b""


def _proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; of repeated fields every one."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
            case 2:
                size, at = _varint(data, at)
                yield key >> 3, data[at : at + size]
                at += size
            case 1 | 5 as width:
                at += 8 if width == 1 else 4
            case other:
                raise ValueError(f"wire type {other} at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _ids_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _siblings(path: Path) -> list[str]:
    try:
        return [one.name for one in path.parent.iterdir() if one.suffix in (".model", ".json")]
    except OSError:
        return []
