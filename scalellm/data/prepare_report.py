"""What `prepare` did, for people and for the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalellm.data.format import Manifest, Split

_MB = 1_000_000


@dataclass(frozen=True)
class SplitReport:
    """Documents, UTF-8 bytes, words and tokens of one split."""

    documents: int
    text_bytes: int
    text_words: int
    tokens: int


@dataclass(frozen=True)
class PrepareReport:
    """The result of `prepare`; `str()` gives its closing lines.

    Attributes:
        out: the dataset's directory.
        splits: numbers of each split, "train" and, if there is one, "validation".
        tokenizer_kind: "bpe", "unigram", "char", "word" or "hf".
        vocab_size: ids of the tokenizer.
        dropped: documents and files left out, by reason.
        encodings: text files read, by encoding.
        unknown_tokens: ids that stand for something the vocabulary lacks.
        notes: sentences the user should read.
        seconds: wall time of everything.
        training_s: wall time of reading the sample and training the tokenizer.
        documents_per_s: documents of the encoding pass by its wall time.
        mb_per_s: megabytes (10^6 bytes) of UTF-8 text of the encoding pass by its wall time.
        cleaning: what each stage of cleaning did; None: there was none.
        cleaning_lines: the same as a table.
        deduplication: what was removed as duplicate; None: nothing was sought.
        packing: how full the rows of the train split are; None: it is not packed.
        reused: the dataset was there already, made from the same sources with the same options.
    """

    out: Path
    splits: Mapping[str, SplitReport]
    tokenizer_kind: str
    vocab_size: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    encodings: Mapping[str, int] = field(default_factory=dict)
    unknown_tokens: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    training_s: float = 0.0
    documents_per_s: float = 0.0
    mb_per_s: float = 0.0
    cleaning: Mapping[str, Any] | None = None
    cleaning_lines: tuple[str, ...] = ()
    deduplication: Mapping[str, Any] | None = None
    packing: Mapping[str, Any] | None = None
    reused: bool = False

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(split.documents for split in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all splits' texts."""
        return sum(split.text_bytes for split in self.splits.values())

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each split."""
        return {name: split.tokens for name, split in self.splits.items()}

    def __str__(self) -> str:
        lines = [self._headline()]
        for name, split in self.splits.items():
            lines.append(
                f"  {name:<10} documents {split.documents:>11,}"
                f"   MB {split.text_bytes / _MB:>11,.2f}   tokens {split.tokens:>14,}"
            )
        for title, counts in (("left out", self.dropped), ("encodings", self.encodings)):
            if any(counts.values()):
                listed = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
                lines.append(f"  {title}: {listed}")
        lines += [f"  {line}" for line in self._refined_lines()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _refined_lines(self) -> Iterator[str]:
        yield from self.cleaning_lines
        found = self.deduplication
        if found is not None:
            yield (
                f"duplicates removed: {found['exact']:,} exact and {found['near']:,} near, of "
                f"{found['documents']:,} documents"
            )
            if found["stay_to_validate"]:
                yield (
                    f"  but {found['stay_to_validate']:,} that earlier runs have stay, to be "
                    "validated on"
                )
            for example in found["examples"]:
                yield f"  {example['removed']} (stays: {example['kept']})"
        packed = self.packing
        if packed is not None:
            yield (
                f"packed: {packed['documents']:,} documents in {packed['rows']:,} rows of "
                f"{packed['seq_len']:,} tokens, padding {packed['padding_share']:.2%}, "
                f"{packed['cut_documents']:,} documents cut"
            )

    def _headline(self) -> str:
        tokenizer = f"{self.tokenizer_kind} tokenizer, {self.vocab_size:,} pieces"
        if self.reused:
            return f"{self.out} is already prepared ({tokenizer}); nothing to do"
        return (
            f"prepared {self.out} in {self.seconds:.1f} s ({tokenizer}): "
            f"{self.documents_per_s:,.0f} documents/s, {self.mb_per_s:,.1f} MB/s"
        )

    def to_extra(self) -> dict[str, Any]:
        """What the manifest keeps besides the splits' numbers."""
        extra = {
            "dropped": dict(self.dropped),
            "encodings": dict(self.encodings),
            "unknown_tokens": self.unknown_tokens,
            "notes": list(self.notes),
        }
        for name in ("cleaning", "deduplication", "packing"):
            if (value := getattr(self, name)) is not None:
                extra[name] = dict(value)
        return extra

    @classmethod
    def of_dataset(cls, out: Path, manifest: Manifest) -> PrepareReport:
        """The report of a dataset that was there already."""
        extra = manifest.extra
        return cls(
            out=out,
            splits={name: _report_of(split, extra) for name, split in manifest.splits.items()},
            tokenizer_kind=manifest.tokenizer.kind if manifest.tokenizer else "none",
            vocab_size=manifest.vocab_size,
            dropped=extra.get("dropped", {}),
            encodings=extra.get("encodings", {}),
            unknown_tokens=extra.get("unknown_tokens", 0),
            notes=tuple(extra.get("notes", ())),
            deduplication=extra.get("deduplication"),
            packing=extra.get("packing"),
            reused=True,
        )


def _report_of(split: Split, extra: Mapping[str, Any]) -> SplitReport:
    documents, tokens = split.num_documents, split.num_tokens
    if split.packed_seq_len is not None:  # which counts pieces, and padding
        packing = extra.get("packing", {})
        documents = packing.get("documents", documents)
        tokens -= packing.get("padding_tokens", 0)
    return SplitReport(documents, split.num_bytes_text, split.num_words_text, tokens)
