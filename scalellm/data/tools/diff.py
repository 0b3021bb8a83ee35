"""Whether two datasets hold the same documents, and if not, where and how they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scalellm.data.format import Manifest
from scalellm.data.reader import TokenDataset
from scalellm.data.tools._stats import next_end, runs
from scalellm.data.tools._text import text_of_ids, tokenizer_of, visible
from scalellm.errors import DataError

_HASH_BYTES = 16
_CONTEXT_TOKENS = 24
_CONTEXT_CHARS = 160
_READ_TOKENS = 1 << 20


@dataclass(frozen=True)
class Difference:
    """The result of `diff_datasets`.

    Attributes:
        differences: what makes them two datasets, one line each.
        notes: what differs beside the documents, such as the options they were made with.
    """

    a: Path | str
    b: Path | str
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    def lines(self) -> Iterator[str]:
        yield from self.differences
        yield from (f"note: {note}" for note in self.notes)
        if self.same:
            yield f"{self.a} and {self.b} hold the same documents in the same order"


def diff_datasets(a: Path | str, b: Path | str, *, progress: bool = True) -> Difference:
    """Compares two datasets; splits whose files have the same hashes are not read.

    Args:
        a: a folder, or a URL that `TokenDataset` reads; likewise b.
        progress: show bars on stderr.

    Memory: 16 bytes a document of each, about 100 while they are compared.

    Raises:
        DataError: one of them is no dataset, or damaged.
    """
    left, right = TokenDataset.open(a).manifest, TokenDataset.open(b).manifest
    differences = [*_meaning(left, right)]
    notes = [*_beside(left, right)]
    for name in sorted({*left.splits, *right.splits}):
        if name not in left.splits or name not in right.splits:
            differences.append(f"split {name} is only in {a if name in left.splits else b}")
            continue
        ours, theirs = TokenDataset.open(a, name), TokenDataset.open(b, name)
        if _shard_hashes(left, name) != _shard_hashes(right, name):
            differences += _SplitDiff(ours, theirs, progress).lines()
        notes += _counts(ours, theirs)
    return Difference(a, b, tuple(differences), tuple(notes))


def _shard_hashes(manifest: Manifest, name: str) -> list[Any]:
    shards = [(shard.sha256, shard.documents_sha256) for shard in manifest.splits[name].shards]
    return [manifest.dtype, manifest.frame_tokens, shards]


def _meaning(left: Manifest, right: Manifest) -> Iterator[str]:
    """What makes equal ids mean another text."""
    for name in ("vocab_size", "eos_id"):
        ours, theirs = getattr(left, name), getattr(right, name)
        if ours != theirs:
            yield f"{name}: {ours} and {theirs}"
    kinds = [one.tokenizer.kind if one.tokenizer else "none" for one in (left, right)]
    hashes = [one.tokenizer.sha256 if one.tokenizer else "none" for one in (left, right)]
    if hashes[0] != hashes[1]:
        yield f"tokenizer: {kinds[0]} {hashes[0][:12]} and {kinds[1]} {hashes[1][:12]}"


def _beside(left: Manifest, right: Manifest) -> Iterator[str]:
    if left.frame_tokens != right.frame_tokens:
        yield f"frame_tokens: {left.frame_tokens} and {right.frame_tokens}"
    ours, theirs = dict(_flat(left.extra)), dict(_flat(right.extra))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            values = (visible(repr(one.get(name)), 80) for one in (ours, theirs))
            yield f"{name}: {' and '.join(values)}"


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _counts(ours: TokenDataset, theirs: TokenDataset) -> Iterator[str]:
    for name in ("num_bytes_text", "num_words_text"):
        values = getattr(ours, name), getattr(theirs, name)
        if values[0] != values[1]:
            yield f"{ours.split}: {name}: {values[0]:,} and {values[1]:,}"


class _SplitDiff:
    """How one split of two datasets differs."""

    def __init__(self, ours: TokenDataset, theirs: TokenDataset, progress: bool) -> None:
        self._pair = ours, theirs
        with tqdm(
            desc=f"comparing {ours.split}",
            total=ours.num_tokens + theirs.num_tokens,
            unit="tok",
            unit_scale=True,
            disable=not progress,
            mininterval=0.5,
            leave=False,
        ) as bar:
            self._hashes = [document_hashes(one, bar.update) for one in self._pair]

    def lines(self) -> Iterator[str]:
        """Nothing if the documents and their order are the same."""
        a, b = self._hashes
        name, size = self._pair[0].split, min(len(a), len(b))
        differs = np.flatnonzero(a[:size] != b[:size])
        if len(a) == len(b) and not len(differs):
            return
        for what in ("num_documents", "num_tokens"):
            ours, theirs = (getattr(one, what) for one in self._pair)
            if ours != theirs:
                yield f"{name}: {what}: {ours:,} and {theirs:,}"
        first = int(differs[0]) if len(differs) else size
        only_a, only_b = _only(a, b)
        if only_a == only_b == 0:
            yield f"{name}: the same documents in another order, from document {first:,} on"
        else:
            yield (
                f"{name}: {only_a:,} documents only in {self._pair[0].path}, {only_b:,} only in "
                f"{self._pair[1].path}; the first that differs is document {first:,}"
            )
        yield from self._contexts(first)

    def _contexts(self, number: int) -> Iterator[str]:
        """Document `number` of both, around the first id that differs."""
        ranges = [_range_of(one, number) for one in self._pair]
        at = 0
        if None not in ranges:
            at = _first_difference(self._pair, [one[0] for one in ranges if one])
        for dataset, found in zip(self._pair, ranges, strict=True):
            if found is None:
                yield f"  {dataset.path}: has no document {number:,}"
                continue
            start, stop = found
            low = min(max(start, start + at - _CONTEXT_TOKENS // 2), stop)
            ids = dataset.read(low, min(stop, low + _CONTEXT_TOKENS)).tolist()
            text = text_of_ids(tokenizer_of(dataset), ids, _CONTEXT_CHARS)
            yield f"  {dataset.path}: from its token {low - start:,}: {text}"


def document_hashes(dataset: TokenDataset, progress: Callable[[int], object]) -> np.ndarray:
    """(documents,) 16 bytes each: blake2b of the ids as uint32, whatever they are stored as."""
    hashes = np.zeros(dataset.num_documents, f"S{_HASH_BYTES}")
    digest, number = hashlib.blake2b(digest_size=_HASH_BYTES), 0
    for start, stop in runs(dataset, None):
        data = memoryview(dataset.read(start, stop).astype("<u4").tobytes())
        at = 0
        for end in (4 * (dataset.document_ends(start, stop) - start)).tolist():
            digest.update(data[at:end])
            if number == len(hashes):
                raise DataError(
                    f"{dataset.path} has more documents than the {number} its manifest says; see "
                    "`scalellm data verify`"
                )
            hashes[number] = digest.digest()
            digest, number, at = hashlib.blake2b(digest_size=_HASH_BYTES), number + 1, end
        digest.update(data[at:])
        progress(stop - start)
    return hashes[:number]


def _only(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many documents are only in a and only in b; one that is there twice counts twice."""
    (values_a, counts_a), (values_b, counts_b) = (
        np.unique(one, return_counts=True) for one in (a, b)
    )
    place = np.minimum(np.searchsorted(values_b, values_a), max(len(values_b) - 1, 0))
    shared = 0
    if len(values_a) and len(values_b):
        found = values_b[place] == values_a
        shared = int(np.minimum(counts_a[found], counts_b[place[found]]).sum())
    return len(a) - shared, len(b) - shared


def _range_of(dataset: TokenDataset, number: int) -> tuple[int, int] | None:
    """First token and end of a document by its number."""
    start = passed = 0
    for first, stop in runs(dataset, None):
        ends = dataset.document_ends(first, stop)
        if number < passed + len(ends):
            place = number - passed
            return int(ends[place - 1]) if place else start, int(ends[place])
        start, passed = (int(ends[-1]) if len(ends) else start), passed + len(ends)
    return None


def _first_difference(pair: tuple[TokenDataset, TokenDataset], starts: list[int]) -> int:
    """Position in both documents of the first id that differs, or of the shorter one's end."""
    sizes = [next_end(one, start) - start for one, start in zip(pair, starts, strict=True)]
    for at in range(0, min(sizes), _READ_TOKENS):
        stop = min(at + _READ_TOKENS, *sizes)
        a, b = (one.read(start + at, start + stop) for one, start in zip(pair, starts, strict=True))
        different = np.flatnonzero(a != b)
        if len(different):
            return at + int(different[0])
    return min(sizes)
