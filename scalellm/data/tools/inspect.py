"""What is in a dataset: numbers, lengths, vocabulary, samples, and what its maker says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scalellm.data.reader import TokenDataset
from scalellm.data.tokenizer import Tokenizer
from scalellm.data.tools._stats import SplitStats, next_end, previous_end, read_stats, runs
from scalellm.data.tools._text import nested_lines, piece, text_of_ids, tokenizer_of, visible
from scalellm.errors import UserError

_MB = 1_000_000
_BAR_CHARS = 40
_TOP = 10
_SAMPLE_CHARS = 400
# A character may take up to four ids, of bytes.
_SAMPLE_TOKENS = 4 * _SAMPLE_CHARS


@dataclass(frozen=True)
class InspectOptions:
    """What to look at.

    Attributes:
        path: the dataset: a folder, or a URL that `TokenDataset` reads.
        split: one split, or None for all.
        samples: documents to show of each split, spread evenly over it.
        max_tokens: read about so many ids of each split, spread evenly, or None for all.
    """

    path: Path | str
    split: str | None = None
    samples: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise UserError(f"--sample={self.samples} documents must be 0 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens={self.max_tokens} tokens must be 1 or more")


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_dataset`; `str()` is for people, `to_json()` for programs."""

    figures: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.figures, indent=1)

    def __str__(self) -> str:
        return "\n".join(_lines(self.figures))


def inspect_dataset(options: InspectOptions, *, progress: bool = True) -> Inspection:
    """Reads a dataset, verifying every frame it reads, and returns its figures.

    Raises:
        DataError: no dataset, no such split, or damage.
    """
    first = TokenDataset.open(options.path, options.split or "train")
    manifest = first.manifest
    tokenizer = tokenizer_of(first)
    names = [options.split] if options.split else sorted(manifest.splits)
    return Inspection(
        {
            "path": str(options.path),
            "tokenizer": manifest.tokenizer.kind if manifest.tokenizer else None,
            "vocab_size": manifest.vocab_size,
            "eos_id": manifest.eos_id,
            "dtype": manifest.dtype,
            "frame_tokens": manifest.frame_tokens,
            "splits": {name: _split(options, name, tokenizer, progress) for name in names},
            "extra": manifest.extra,
        }
    )


def _split(
    options: InspectOptions, name: str, tokenizer: Tokenizer | None, progress: bool
) -> dict[str, Any]:
    dataset = TokenDataset.open(options.path, name)
    total = sum(stop - start for start, stop in runs(dataset, options.max_tokens))
    with tqdm(
        desc=f"reading {name}",
        total=total,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
        leave=False,
    ) as bar:
        stats = read_stats(dataset, options.max_tokens, bar.update)
    samples = list(_samples(dataset, options.samples, tokenizer))
    figures = _counts(dataset) | {"tokens_read": stats.tokens_read}
    return figures | _lengths(stats) | _vocabulary(dataset, stats, tokenizer) | {"samples": samples}


def _counts(dataset: TokenDataset) -> dict[str, Any]:
    shards = dataset.manifest.splits[dataset.split].shards
    ids_bytes = dataset.num_tokens * dataset.dtype.itemsize
    stored_bytes = sum(shard.size_bytes for shard in shards)
    text_bytes = dataset.num_bytes_text
    packing = dataset.manifest.extra.get("packing", {}) if dataset.packed_seq_len else {}
    padding_tokens = int(packing.get("padding_tokens", 0))
    return {
        "documents": packing.get("documents", dataset.num_documents),
        "pieces": dataset.num_documents if dataset.packed_seq_len else None,
        "packed_seq_len": dataset.packed_seq_len,
        "padding_tokens": padding_tokens,
        "tokens": dataset.num_tokens,
        "text_bytes": text_bytes,
        "text_words": dataset.num_words_text,
        "bytes_per_token": text_bytes / (dataset.num_tokens - padding_tokens)
        if text_bytes
        else None,
        "frames": sum(shard.num_frames for shard in shards),
        "shards": len(shards),
        "ids_bytes": ids_bytes,
        "stored_bytes": stored_bytes,
        "ratio_of_ids": ids_bytes / stored_bytes,
        "ratio_of_text": text_bytes / stored_bytes if text_bytes else None,
        "fingerprint": dataset.fingerprint,
    }


def _lengths(stats: SplitStats) -> dict[str, Any]:
    lengths = stats.lengths
    return {
        "lengths": {
            "documents": lengths.count,
            "median": lengths.quantile(0.5),
            "p90": lengths.quantile(0.9),
            "p99": lengths.quantile(0.99),
            "longest": lengths.longest,
            "bins": lengths.bins(),
        }
    }


def _vocabulary(
    dataset: TokenDataset, stats: SplitStats, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    counts_V = stats.counts_V
    if counts_V is None:
        return {"vocabulary": None}
    unused = np.flatnonzero(counts_V == 0)
    order = np.argsort(-counts_V, kind="stable")[:_TOP].tolist()
    unk_id = tokenizer.unk_id if tokenizer else None
    unknown = None if unk_id is None else int(counts_V[unk_id]) / stats.tokens_read
    return {
        "vocabulary": {
            "used": int(dataset.vocab_size - len(unused)),
            "unused": len(unused),
            "unused_first": [[one, piece(tokenizer, one)] for one in unused[:_TOP].tolist()],
            "top": [
                [one, piece(tokenizer, one), int(counts_V[one])] for one in order if counts_V[one]
            ],
            "unknown_share": unknown,
        }
    }


def _samples(
    dataset: TokenDataset, count: int, tokenizer: Tokenizer | None
) -> Iterator[dict[str, Any]]:
    shown = set()
    for number in range(count):
        position = (2 * number + 1) * dataset.num_tokens // (2 * count)
        start = previous_end(dataset, position)
        if start in shown:
            continue
        shown.add(start)
        stop = next_end(dataset, position)
        ids = dataset.read(start, min(stop, start + _SAMPLE_TOKENS)).tolist()
        text = text_of_ids(tokenizer, ids, _SAMPLE_CHARS)
        yield {"first_token": start, "tokens": stop - start, "text": text}


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    kind = f"{figures['tokenizer']} tokenizer" if figures["tokenizer"] else "no tokenizer"
    yield (
        f"{figures['path']}: {kind}, vocabulary of {figures['vocab_size']:,} ids as "
        f"{figures['dtype']}, end of text {figures['eos_id']}, "
        f"frames of {figures['frame_tokens']:,} ids"
    )
    for name, split in figures["splits"].items():
        yield ""
        yield from _split_lines(name, split)
    notes = list(nested_lines(figures["extra"]))
    if notes:
        yield ""
        yield "what its maker says of it"
        yield from notes


def _split_lines(name: str, split: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens; frames "
        f"{split['frames']:,}, shards {split['shards']:,}"
    )
    if split["packed_seq_len"]:
        yield (
            f"  packed into rows of {split['packed_seq_len']:,} tokens: {split['pieces']:,} pieces "
            f"of documents, padding {split['padding_tokens'] / split['tokens']:.2%}"
        )
    if split["bytes_per_token"] is None:
        yield "  text: unknown, the ids came without their text"
    else:
        yield (
            f"  text: {split['text_bytes'] / _MB:,.2f} MB, {split['text_words']:,} words, "
            f"{split['bytes_per_token']:.2f} bytes per token"
        )
    of_text = f", {split['ratio_of_text']:.2f} of the text" if split["ratio_of_text"] else ""
    yield (
        f"  compressed to {split['stored_bytes'] / _MB:,.2f} MB: a ratio of "
        f"{split['ratio_of_ids']:.2f} of the ids{of_text}"
    )
    if split["tokens_read"] < split["tokens"]:
        share = split["tokens_read"] / split["tokens"]
        yield f"  what follows is of {split['tokens_read']:,} tokens, {share:.1%} of the split"
    what = "piece" if split["packed_seq_len"] else "document"
    yield from _length_lines(split["lengths"], what)
    yield from _vocabulary_lines(split["vocabulary"], split["tokens_read"])
    for sample in split["samples"]:
        yield f"  sample at token {sample['first_token']:,}, {sample['tokens']:,} tokens long:"
        yield f"    {sample['text']}"


def _length_lines(lengths: dict[str, Any], what: str) -> Iterator[str]:
    if not lengths["documents"]:
        yield "  no document ends in what was read"
        return
    yield (
        f"  tokens per {what}: median {lengths['median']:,}, p90 {lengths['p90']:,}, "
        f"p99 {lengths['p99']:,}, longest {lengths['longest']:,}"
    )
    bins = lengths["bins"]
    most = max(count for _, _, count in bins)
    first = next(number for number, one in enumerate(bins) if one[2])
    for low, high, count in bins[first:]:
        # A bin with few documents still shows that it has some.
        bar = "#" * max(round(_BAR_CHARS * count / most), 1 if count else 0)
        yield f"    {f'{low:,}-{high:,}' if high > low else f'{low:,}':>21} {count:>12,} {bar}"


def _vocabulary_lines(vocabulary: dict[str, Any] | None, tokens: int) -> Iterator[str]:
    if vocabulary is None:
        yield "  vocabulary: too large to count"
        return
    unknown = vocabulary["unknown_share"]
    said = "" if unknown is None else f"; unknown {unknown:.4%} of the tokens"
    yield (f"  vocabulary: {vocabulary['used']:,} ids used, {vocabulary['unused']:,} never{said}")
    top = ", ".join(f"{text} {count / tokens:.2%}" for _, text, count in vocabulary["top"])
    yield f"    most frequent: {top}"
    if vocabulary["unused"]:
        rest = ", …" if vocabulary["unused"] > _TOP else ""
        unused = ", ".join(text for _, text in vocabulary["unused_first"])
        yield f"    never: {visible(unused, 300)}{rest}"
