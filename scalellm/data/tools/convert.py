"""Datasets of ids that other tools made, converted to ours: the same documents, ids and order."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scalellm.data.format import MANIFEST, SPLIT_NAME
from scalellm.data.pool import sigterm_as_interrupt
from scalellm.data.split import TRAIN, VALIDATION
from scalellm.data.tokenizer import Tokenizer, load_tokenizer
from scalellm.data.tools._convert_options import AUTO, ConvertOptions, ConvertReport
from scalellm.data.tools._foreign import Foreign, ForeignSplit, Parts, ReadForeign, size_of
from scalellm.data.tools._from_hf import is_hf, open_hf
from scalellm.data.tools._from_mds import is_mds, open_mds
from scalellm.data.tools._from_megatron import is_megatron, open_megatron
from scalellm.data.tools._from_nanogpt import is_nanogpt, open_nanogpt
from scalellm.data.tools._vocabulary import Vocabulary, choose_vocabulary
from scalellm.data.tools._whole import position_of, text_size, whole_document
from scalellm.data.writer import DatasetWriter
from scalellm.errors import DataError, UserError

__all__ = ["ConvertOptions", "ConvertReport", "convert"]

# In the order in which "auto" asks: a Megatron prefix has a .bin file as nanoGPT's have.
_KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, ReadForeign], Foreign]]] = {
    "megatron": (is_megatron, lambda path, _: open_megatron(path)),
    "mds": (is_mds, open_mds),
    "hf": (is_hf, open_hf),
    "nanogpt": (is_nanogpt, open_nanogpt),
}
_HASH_BYTES = 8 << 20


def convert(options: ConvertOptions, *, progress: bool = True) -> ConvertReport:
    """Converts the sources to a dataset at `options.out`, which appears whole or not at all.

    The sources are only read. The same sources give the same bytes. Memory holds one document, at
    most 64 MiB of it: a longer one is mapped from a file.

    Raises:
        UserError: something the user can mend; nothing was written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; nothing was written.
    """
    started = time.perf_counter()
    _refuse_taken(options)
    opened = [_open(path, options) for path in options.sources]
    splits = _named_splits(opened, options)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    with sigterm_as_interrupt():
        before = _stamps(opened)
        made_from = _made_from(opened, options)
        vocabulary = choose_vocabulary(
            tokenizer,
            options.vocab_size,
            options.eos_id,
            lambda eos_id: _all_parts(splits, eos_id, _bar("scanning", splits, progress)),
        )
        job = _Job(options, vocabulary, tokenizer)
        with job.writer as writer, _bar("converting", splits, progress) as bar:
            for name, source, split in splits:
                job.add_split(name, source, split, bar)
            job.check_splits()
            if _stamps(opened) != before:
                raise DataError("a source was changed while it was read; convert it again")
            writer.finish({"made_from": made_from} | job.extra())
    return job.report([one.kind for one in opened], time.perf_counter() - started)


class _Job:
    """Documents into the writer, with the counts of the report."""

    def __init__(
        self, options: ConvertOptions, vocabulary: Vocabulary, tokenizer: Tokenizer | None
    ) -> None:
        self._options, self._vocabulary, self._tokenizer = options, vocabulary, tokenizer
        self._documents: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._eos_added = self._empty = 0
        self.writer = DatasetWriter(
            options.out,
            vocab_size=vocabulary.size,
            eos_id=vocabulary.eos_id,
            tokenizer_file=tokenizer.file if tokenizer else None,
            tokenizer_kind=tokenizer.kind if tokenizer else "none",
            overwrite=options.overwrite,
        )

    def add_split(self, name: str, source: Path, split: ForeignSplit, bar: Any) -> None:
        draws = name == TRAIN and self._options.val_fraction > 0
        for number, parts in enumerate(split.documents(self._vocabulary.cut_id)):
            size = sum(map(len, parts))
            if size == 0:
                self._empty += 1
                continue
            self._check_ids(parts, source, number)
            with whole_document(parts, self._vocabulary, self._options.out.parent) as tokens:
                target = name
                if draws and position_of(tokens) < self._options.val_fraction:
                    target = VALIDATION
                text_bytes, text_words = text_size(self._tokenizer, tokens)
                self.writer.add(target, tokens, text_bytes=text_bytes, text_words=text_words)
                self._documents[target] += 1
                self._tokens[target] += len(tokens)
                self._eos_added += len(tokens) - size
            bar.update(size)

    def check_splits(self) -> None:
        """Raises DataError if a split that must be there got no document."""
        fraction, names = self._options.val_fraction, ", ".join(self._documents) or "nothing"
        if not self._documents[TRAIN]:
            raise DataError(
                f"no document is left for the train split, there is: {names}; name the split of "
                "each source with --split-name, or lower --val-fraction"
            )
        if fraction and not self._documents[VALIDATION]:
            raise DataError(
                f"--val-fraction={fraction} of {self._documents[TRAIN]} documents leaves no "
                "document for validation; raise it, or give 0"
            )

    def extra(self) -> dict[str, Any]:
        return {
            "dropped": {"empty": self._empty} if self._empty else {},
            "eos_added": self._eos_added,
            "notes": list(self._vocabulary.notes),
        }

    def report(self, kinds: list[str], seconds: float) -> ConvertReport:
        names = sorted(name for name, count in self._documents.items() if count)
        return ConvertReport(
            self._options.out,
            tuple(dict.fromkeys(kinds)),
            self._vocabulary,
            {name: self._documents[name] for name in names},
            {name: self._tokens[name] for name in names},
            self._eos_added,
            self._empty,
            seconds,
        )

    def _check_ids(self, parts: Parts, source: Path, number: int) -> None:
        size = self._vocabulary.size
        for part in parts:
            if len(part) and (int(part.min()) < 0 or int(part.max()) >= size):
                wrong = int(part[np.flatnonzero((part < 0) | (part >= size))[0]])
                if wrong < 0:
                    raise DataError(
                        f"{source}: document {number} holds the negative token id {wrong}; give "
                        "the --dtype of the file, or mend it"
                    )
                raise DataError(
                    f"{source}: document {number} holds token id {wrong}, outside the vocabulary "
                    f"of {size} ids; give the --vocab-size or --tokenizer of what made it, or the "
                    "--dtype of the file"
                )


def _open(path: Path, options: ConvertOptions) -> Foreign:
    if (path / MANIFEST).is_file():
        raise DataError(f"{path} is a scalellm dataset already; train on it as it is")
    kind: str | None = options.kind
    if kind == AUTO:
        kind = next((one for one, (is_it, _) in _KINDS.items() if is_it(path)), None)
    if kind is None:
        if not path.exists():
            raise DataError(f"there is no {path}; give a file, a folder or a Megatron prefix")
        raise DataError(
            f"{path} looks like none of {', '.join(_KINDS)}; say what it is with --from"
        )
    return _KINDS[kind][1](path, options.read)


def _named_splits(
    opened: list[Foreign], options: ConvertOptions
) -> list[tuple[str, Path, ForeignSplit]]:
    """(name, source, split) of all, in order; a source that names no split is of train."""
    splits = []
    for number, source in enumerate(opened):
        for split in source.splits:
            name = split.name or TRAIN
            if options.split_names:
                if len(source.splits) > 1:
                    names = ", ".join(str(one.name) for one in source.splits)
                    raise UserError(
                        f"--split-name={options.split_names[number]}: {source.path} names its "
                        f"splits itself ({names}); leave it out, or give the files one by one"
                    )
                name = options.split_names[number]
            if not SPLIT_NAME.fullmatch(name):
                raise DataError(f"{source.path} has a split {name!r}; give one with --split-name")
            splits.append((name, source.path, split))
    if options.val_fraction and any(name == VALIDATION for name, _, _ in splits):
        raise UserError(
            f"--val-fraction={options.val_fraction}: the source has a validation split already; "
            "leave it out"
        )
    return splits


def _refuse_taken(options: ConvertOptions) -> None:
    """Before the first pass over the source; the writer looks again and more closely."""
    out = options.out
    if out.exists() and not options.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} is taken; replace a dataset with --overwrite, or give another --out"
        )


def _all_parts(
    splits: list[tuple[str, Path, ForeignSplit]], eos_id: int | None, bar: Any
) -> Iterator[Parts]:
    with bar:
        for _, _, split in splits:
            for parts in split.documents(eos_id):
                yield parts
                bar.update(sum(map(len, parts)))


def _bar(what: str, splits: list[tuple[str, Path, ForeignSplit]], shown: bool) -> Any:
    counts = [split.num_tokens for _, _, split in splits]
    total = None if None in counts else sum(count or 0 for count in counts)
    return tqdm(
        desc=what, total=total, unit="tok", unit_scale=True, disable=not shown, mininterval=0.5
    )


def _stamps(opened: list[Foreign]) -> list[tuple[int, int]]:
    files = [path for source in opened for path in source.files]
    return [(size_of(path), os.stat(path).st_mtime_ns) for path in files]


def _made_from(opened: list[Foreign], options: ConvertOptions) -> dict[str, Any]:
    sources = []
    for source in opened:
        files = [
            {"name": path.name, "size_bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in source.files
        ]
        sources.append({"path": str(source.path), "kind": source.kind, "files": files})
    names = ("split_names", "vocab_size", "eos_id", "val_fraction")
    chosen = {name: getattr(options, name) for name in names}
    chosen |= {"column": options.read.column, "dtype": options.read.dtype}
    return {"tool": "convert", "sources": sources, "options": chosen}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
