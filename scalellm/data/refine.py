"""Cleaning and deduplication: the stages of `prepare` between reading and tokenizing.

Texts are cleaned and fingerprinted in worker processes, batch by batch, and kept on disk; then the
duplicates are found among the fingerprints. Memory is a few batches and what
`DedupOptions.memory_bytes` allows. Validation sources come first, so what stays of two duplicates
is the one that is validated on, and nothing nearly equal to it is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalellm.data.clean import Cleaner, CleanReport
from scalellm.data.dedup import Deduplicator, Fingerprints, fingerprints
from scalellm.data.documents import Document, Tally
from scalellm.data.pool import ordered_map
from scalellm.data.refine_options import RefineOptions
from scalellm.data.split import VALIDATION
from scalellm.data.spool import WorkFolder

_BATCH_CHARS = 1 << 20
_NUM_EXAMPLES = 3
_TOO_SHORT = "too short after cleaning"

# The split it belongs to ("": to be drawn by its hash), and the document.
SplitDocument = tuple[str, Document]


@dataclass(frozen=True)
class _Batch:
    """What a worker makes of a batch: the texts that stay, and their fingerprints."""

    records: list[tuple[str, str, str]]
    report: CleanReport
    fingerprints: Fingerprints | None
    too_short: int


class Refined:
    """The documents that are left, in order, and what was taken away.

    Attributes:
        tally: what reading left out.
        cleaning: the report of the stages; None if there was no cleaning.
        duplicates: what was removed as duplicate; its examples are filled in by the first `texts`.
        search_peak_bytes: most memory of the search for duplicates.
    """

    def __init__(
        self,
        work: WorkFolder,
        notes: dict[str, Any],
        search: Deduplicator | None,
    ) -> None:
        self._work, self._search = work, search
        self.tally = Tally(Counter(notes["dropped"]), Counter(notes["encodings"]))
        self.cleaning: dict[str, Any] | None = notes["cleaning"]
        self.cleaning_lines: list[str] = notes["cleaning_lines"]
        self.duplicates: dict[str, Any] | None = None
        self.search_peak_bytes = 0
        self._removed_N = np.zeros(notes["documents"], bool)
        self._origins: dict[int, str] = {}
        self._pairs: list[tuple[int, int]] = []
        if search is not None:
            self._find(search, notes["validation_documents"])

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields (split, text) of every document that stays."""
        wanted = {number for pair in self._pairs for number in pair}
        for number, (split, origin, text) in enumerate(self._work.texts()):
            if number in wanted:
                self._origins[number] = origin
            if not self._removed_N[number]:
                yield split, text
        if self.duplicates is not None:
            self.duplicates["examples"] = [
                {"removed": self._origins[number], "kept": self._origins.get(kept, "earlier run")}
                for number, kept in self._pairs
            ]

    @property
    def removed(self) -> dict[str, int]:
        """Documents taken away, by the stage that did."""
        counts = {}
        for stage, found in (self.cleaning or {"stages": {}})["stages"].items():
            counts[f"cleaned away by {stage}"] = sum(found["removed"].values())
        counts["duplicates"] = int(np.count_nonzero(self._removed_N))
        return {name: count for name, count in counts.items() if count}

    def keep(self) -> None:
        """Adds the fingerprints to the index of all runs, if there is one."""
        if self._search is not None:
            self._search.keep()

    def _find(self, search: Deduplicator, num_validation: int) -> None:
        found = search.find()
        self._removed_N = found.removed_N
        # What is validated on, run after run, is no duplicate of itself; what is trained on is.
        stays_V = self._removed_N[:num_validation] & (found.duplicate_of_N[:num_validation] < 0)
        self._removed_N[:num_validation] &= ~stays_V
        removed = np.flatnonzero(self._removed_N)[:_NUM_EXAMPLES].tolist()
        self._pairs = [(number, int(found.duplicate_of_N[number])) for number in removed]
        self.search_peak_bytes = found.peak_bytes
        self.duplicates = {
            "documents": len(found.removed_N),
            "exact": found.exact,
            "near": found.near,
            "stay_to_validate": int(np.count_nonzero(stays_V)),
        }


def refine(
    documents: Iterable[SplitDocument],
    tally: Tally,
    options: RefineOptions,
    work: WorkFolder,
    num_workers: int,
    *,
    run_key: str,
    progress: Any,
) -> Refined:
    """Cleans the documents and finds the duplicates, or finds that it was done before.

    Args:
        documents: read once, in order.
        tally: filled while they are read.
        options: what to do.
        work: where the texts and fingerprints lie meanwhile.
        num_workers: processes that clean.
        run_key: names this run in the index of fingerprints.
        progress: has `update(bytes)`.

    Raises:
        UserError: a package is missing, the disk is full, or memory_bytes is too little.
    """
    notes = work.mark()
    search = None
    if options.dedup is not None:
        search = Deduplicator(work.path / "fingerprints", options.dedup, run_key=run_key)
    if notes is not None and search is not None:
        # The texts are there; their fingerprints are computed again: cheap beside cleaning.
        again = RefineOptions(None, options.dedup, 0)
        stored = ((split, Document(text, origin)) for split, origin, text in work.texts())
        with closing(_refined(stored, again, num_workers)) as batches:
            for batch in batches:
                _add(search, batch)
                progress.update(sum(len(text) for _, _, text in batch.records))
    elif notes is None:
        notes = _clean(documents, tally, options, work, num_workers, search, progress)
    return Refined(work, notes, search)


def _clean(
    documents: Iterable[SplitDocument],
    tally: Tally,
    options: RefineOptions,
    work: WorkFolder,
    num_workers: int,
    search: Deduplicator | None,
    progress: Any,
) -> dict[str, Any]:
    report, count, too_short, num_validation = CleanReport(), 0, 0, 0
    texts = work.texts_writer()
    try:
        with closing(_refined(documents, options, num_workers)) as batches:
            for batch in batches:
                report.merge(batch.report)
                texts.add(batch.records)
                _add(search, batch)
                count += len(batch.records)
                num_validation += sum(split == VALIDATION for split, _, _ in batch.records)
                too_short += batch.too_short
                progress.update(sum(len(text) for _, _, text in batch.records))
        if too_short:
            tally.dropped[_TOO_SHORT] += too_short
        notes = {
            "documents": count,
            "validation_documents": num_validation,
            "dropped": dict(tally.dropped),
            "encodings": dict(tally.encodings),
            "cleaning": report.to_dict() if options.clean is not None else None,
            "cleaning_lines": report.lines() if options.clean is not None else [],
        }
        work.complete(texts, notes)
    finally:
        texts.close()
    return notes


def _add(search: Deduplicator | None, batch: _Batch) -> None:
    if search is not None and batch.fingerprints is not None:
        search.add(batch.fingerprints)


def _refined(
    documents: Iterable[SplitDocument], options: RefineOptions, num_workers: int
) -> Generator[_Batch, None, None]:
    return ordered_map(_refine_batch, _batches(documents), num_workers, _load, (options,))


def _batches(documents: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    batch: list[SplitDocument] = []
    chars = 0
    for split, document in documents:
        batch.append((split, document))
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# What this process does to a batch, and its stages, whose tables are loaded once.
_options: RefineOptions | None = None
_cleaner: Cleaner | None = None


def _load(options: RefineOptions) -> None:
    global _options, _cleaner
    _options = options
    _cleaner = None if options.clean is None else Cleaner(options.clean)


def _refine_batch(batch: list[SplitDocument]) -> _Batch:
    if _options is None:
        raise RuntimeError("_refine_batch() before _load()")
    report, records, too_short = CleanReport(), [], 0
    for split, document in batch:
        text: str | None = document.text
        if _cleaner is not None:
            cleaned = _cleaner.clean(document.text)
            report.add(document.origin, document.text, cleaned)
            text = cleaned.text
        if text is not None and _options.clean and len(text.strip()) < max(1, _options.min_chars):
            text, too_short = None, too_short + 1
        if text is not None:
            records.append((split, document.origin, text))
    found = None
    if _options.dedup is not None:
        found = fingerprints([text for _, _, text in records], _options.dedup)
    return _Batch(records, report, found, too_short)


# What of `made_from` decides nothing before the tokenizer.
_LATER = ("tokenizer", "vocab_size", "pack", "val_fraction", "seed")


def key_of(made_from: dict[str, Any]) -> str:
    """Returns a name for all that decides the texts that are left: sources and options."""
    fields = {name: value for name, value in made_from.items() if name not in _LATER}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
