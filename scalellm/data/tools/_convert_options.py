"""What `convert` is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scalellm.data.format import SPLIT_NAME
from scalellm.data.tools._foreign import ReadForeign
from scalellm.data.tools._vocabulary import Vocabulary
from scalellm.errors import UserError, did_you_mean

AUTO = "auto"
KINDS = (AUTO, "megatron", "mds", "hf", "nanogpt")


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how.

    Attributes:
        sources: files, folders or prefixes of another tool's datasets.
        out: the dataset directory to make.
        kind: what the sources are, or "auto".
        split_names: the split of each source, or nothing to take what the sources say.
        tokenizer: the tokenizer that made the ids, or None.
        vocab_size: number of ids; None: the tokenizer's, or one above the largest id.
        eos_id: the id that ends a document; None: the tokenizer's, or see `choose_vocabulary`.
        val_fraction: share of the train documents for validation, by the hash of their ids.
        read: how the sources are read.
        overwrite: replace a dataset at `out`.
    """

    sources: tuple[Path, ...]
    out: Path
    kind: str = AUTO
    split_names: tuple[str, ...] = ()
    tokenizer: Path | None = None
    vocab_size: int | None = None
    eos_id: int | None = None
    val_fraction: float = 0.0
    read: ReadForeign = field(default_factory=ReadForeign)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(self.kind, KINDS)
            raise UserError(f"--from={self.kind} is not one of {', '.join(KINDS)}{near}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction={self.val_fraction} is not a share in [0, 1)")
        if self.split_names and len(self.split_names) != len(self.sources):
            raise UserError(
                f"--split-name gives {len(self.split_names)} names for {len(self.sources)} "
                "sources; give one for each"
            )
        for name in self.split_names:
            if not SPLIT_NAME.fullmatch(name):
                raise UserError(f"--split-name={name!r} is not a lower-case word, such as train")


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`; `str()` gives its closing lines."""

    out: Path
    kinds: tuple[str, ...]
    vocabulary: Vocabulary
    documents: dict[str, int]
    tokens: dict[str, int]
    eos_added: int
    empty: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"converted {' + '.join(self.kinds)} to {self.out} in {self.seconds:.1f} s "
            f"(vocabulary of {self.vocabulary.size:,} ids, documents end with "
            f"{self.vocabulary.eos_id})"
        ]
        for name, documents in self.documents.items():
            lines.append(
                f"  {name:<10} documents {documents:>11,}   tokens {self.tokens[name]:>14,}"
            )
        lines.append(f"  the end of text was added to {self.eos_added:,} documents")
        if self.empty:
            lines.append(f"  left out: empty {self.empty:,}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.vocabulary.notes)])
