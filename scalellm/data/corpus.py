"""The texts of a corpus: from its sources, filtered, each with its split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm.data.clean import CleanOptions
from scalellm.data.dedup import DedupOptions
from scalellm.data.documents import Document, ReadOptions, Tally
from scalellm.data.encoding import AUTO, check_encoding_name
from scalellm.data.format import MAX_FRAME_TOKENS
from scalellm.data.refine_options import RefineOptions, check_deduplicable
from scalellm.data.sources import Source, open_sources
from scalellm.data.split import TRAIN, VALIDATION, assign_splits
from scalellm.data.tokenizer import TRAINED_KINDS, load_tokenizer
from scalellm.data.tokenizer_training import check_vocab_size
from scalellm.errors import UserError, did_you_mean

# Raised when the same options begin to mean another dataset.
_PIPELINE_VERSION = 1
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how.

    Attributes:
        sources: `stdlib`, paths, `hf:NAME[:CONFIG][@SPLIT]`.
        out: the dataset directory to make.
        tokenizer: "bpe", "unigram" or "char" to train one, or a `.model` or `tokenizer.json` file
            (or a dataset's directory, for its tokenizer).
        vocab_size: pieces of a trained tokenizer; for char the most characters to keep.
        val_fraction: share of documents for validation, by the hash of their text, in [0, 1).
        validation_sources: sources of the validation split; `sources` then go to train whole.
        min_chars: documents with fewer characters, white space at the ends aside, are left out.
        encoding: of text files; "auto" detects it.
        text_field: the JSON key or the column that holds the text.
        num_workers: processes that encode; 0 is one per core. It never changes the result.
        overwrite: replace a dataset made from other sources or with other options.
        seed: another seed draws other validation documents and another tokenizer sample.
        limit_bytes: at most about so many bytes of text of each source, or None.
        engine: "local" encodes in processes of this machine, "ray" on a Ray cluster; never
            changes the result.
        ray_address: HOST:PORT of the cluster, "auto" or "local"; None: one that runs, else local.
        clean: stages of cleaning, or None. With `dedup` it runs on this machine, on any engine.
        dedup: what duplicates are and how they are sought, or None: they stay.
        pack: tokens of a row into which the train split's documents are packed, or None.
    """

    sources: tuple[str, ...]
    out: Path
    tokenizer: str = "bpe"
    vocab_size: int = 8192
    val_fraction: float = 0.01
    validation_sources: tuple[str, ...] = ()
    min_chars: int = 1
    encoding: str = AUTO
    text_field: str = "text"
    num_workers: int = 0
    overwrite: bool = False
    seed: int = 0
    limit_bytes: int | None = None
    engine: str = ENGINES[0]
    ray_address: str | None = None
    clean: CleanOptions | None = None
    dedup: DedupOptions | None = None
    pack: int | None = None

    def __post_init__(self) -> None:
        limits = (
            ("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "in [0, 1)"),
            ("min_chars", self.min_chars, self.min_chars >= 0, "0 or more characters"),
            ("num_workers", self.num_workers, self.num_workers >= 0, "0 (all cores) or more"),
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "in [0, 2^63)"),
            (
                "limit_bytes",
                self.limit_bytes,
                self.limit_bytes is None or self.limit_bytes > 0,
                "1 byte or more",
            ),
            (
                "pack",
                self.pack,
                self.pack is None or 2 <= self.pack <= MAX_FRAME_TOKENS,
                f"2 to {MAX_FRAME_TOKENS} tokens",
            ),
        )
        for name, value, fits, limit in limits:
            if not fits:
                raise UserError(f"{name}={value} is out of range; it must be {limit}")
        if self.engine not in ENGINES:
            near = did_you_mean(self.engine, ENGINES)
            raise UserError(f"engine={self.engine!r} is not one of {', '.join(ENGINES)}{near}")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError(
                f"ray_address={self.ray_address!r} has no use with engine={self.engine!r}; set "
                "engine=ray"
            )
        if "://" in self.tokenizer:
            raise UserError(
                f"tokenizer={self.tokenizer!r} is a URL: copy the file, or the dataset's folder"
            )
        check_deduplicable(self.refine)
        check_encoding_name(self.encoding)
        if self.trains_tokenizer:
            check_vocab_size(self.tokenizer, self.vocab_size)

    @property
    def refine(self) -> RefineOptions:
        """What happens to the documents before they become tokens."""
        return RefineOptions(self.clean, self.dedup, self.min_chars)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether `tokenizer` is a kind to train and not a file."""
        looks_like_a_file = os.sep in self.tokenizer or "." in self.tokenizer
        return self.tokenizer in TRAINED_KINDS or not (
            looks_like_a_file or Path(self.tokenizer).exists()
        )


class Corpus:
    """The filtered texts of the sources with their splits, in the same order every time.

    Attributes:
        made_from: sources, options and fingerprints, as JSON; where it is equal the dataset is.
    """

    def __init__(self, options: PrepareOptions) -> None:
        self._options = options
        read = ReadOptions(check_encoding_name(options.encoding), options.text_field)
        self._sources = open_sources(options.sources, read, options.limit_bytes)
        self._validation: list[Source] = []
        if options.validation_sources:
            self._validation = open_sources(options.validation_sources, read, options.limit_bytes)
        self.made_from = self._made_from()

    def documents(self, tally: Tally) -> Iterator[tuple[str, Document]]:
        """Yields every document with its split, or "" where that is drawn by `split_texts`.

        Those to validate on come first. Counts in `tally` what is left out.
        """
        yield from ((VALIDATION, one) for one in self._read(self._validation, tally))
        split = TRAIN if self._validation else ""
        yield from ((split, one) for one in self._read(self._sources, tally))

    def split_texts(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yields (split, text) of what `documents` gave, as it is or refined."""
        if self._validation:
            return iter(texts)
        options = self._options
        return assign_splits((text for _, text in texts), options.val_fraction, options.seed)

    def _made_from(self) -> dict[str, Any]:
        options = self._options
        fields = (
            "sources validation_sources val_fraction min_chars encoding text_field seed limit_bytes"
        )
        fingerprints = [source.fingerprint() for source in (*self._sources, *self._validation)]
        made_from = {name: getattr(options, name) for name in fields.split()}
        made_from |= {"pipeline": _PIPELINE_VERSION, "fingerprints": fingerprints}
        made_from |= options.refine.to_dict()
        if options.pack is not None:
            made_from["pack"] = options.pack
        if options.trains_tokenizer:
            made_from |= {"tokenizer": options.tokenizer, "vocab_size": options.vocab_size}
        else:
            file = load_tokenizer(Path(options.tokenizer)).file
            made_from["tokenizer"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in made_from.items()
        }

    def _read(self, sources: list[Source], tally: Tally) -> Iterator[Document]:
        min_chars = self._options.min_chars
        too_short = f"shorter than {min_chars} characters" if min_chars > 1 else "empty"
        for source in sources:
            for document in source.documents(tally):
                if len(document.text.strip()) < min_chars:
                    tally.dropped[too_short] += 1
                elif not _is_unicode(document.text):
                    tally.dropped["not valid Unicode"] += 1
                else:
                    yield document


def _is_unicode(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which no encoding can write.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
