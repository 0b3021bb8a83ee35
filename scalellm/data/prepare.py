"""The way of text into a dataset: read, filter, split, train a tokenizer, encode, write.

The corpus is never in memory. It is read once to train a tokenizer (from a bounded sample of the
train documents) and once to encode; with a tokenizer file only once. With cleaning or deduplication
it is read once, and what is left of it lies in a work folder beside the dataset meanwhile, which a
run that was interrupted finds again. The same sources and options give the same dataset, byte for
byte, with any number of workers, on this machine or on a Ray cluster.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scalellm.data import encode_job
from scalellm.data.corpus import Corpus, PrepareOptions
from scalellm.data.documents import Tally
from scalellm.data.encode_job import Encode, Encoded, SplitTexts
from scalellm.data.format import FRAME_TOKENS
from scalellm.data.packing import PackedSplit
from scalellm.data.pool import call_in_process, ordered_map, sigterm_as_interrupt
from scalellm.data.prepare_checks import find_made, make_index, no_text, refuse_unwritable
from scalellm.data.prepare_report import PrepareReport, SplitReport
from scalellm.data.refine import Refined, key_of, refine
from scalellm.data.split import TRAIN, VALIDATION, TextSample
from scalellm.data.spool import WorkFolder
from scalellm.data.staging import DiskError
from scalellm.data.tokenizer import Tokenizer, load_tokenizer
from scalellm.data.tokenizer_training import sample_bytes, train_tokenizer
from scalellm.data.writer import DatasetWriter
from scalellm.errors import UserError

__all__ = ["PrepareOptions", "PrepareReport", "prepare"]

# Below this, training takes less time than starting a process for it.
_TRAIN_HERE_CHARS = 2_000_000
_MB = 1_000_000

# Yields (split, text) anew at each call, and counts in the tally what is left out.
Texts = Callable[[Tally], Iterator[tuple[str, str]]]


def prepare(options: PrepareOptions, *, progress: bool = True) -> PrepareReport:
    """Makes a dataset of text, or finds it made already.

    Args:
        options: sources, tokenizer, filters and where to.
        progress: show bars and what is being done on stderr.

    Raises:
        UserError: something the user can mend; nothing was written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; nothing was written and no process is left.
    """
    started = time.perf_counter()
    corpus = Corpus(options)
    reused = find_made(options, corpus.made_from)
    if reused is not None:
        return reused
    refuse_unwritable(options.out)
    if options.dedup is not None and options.dedup.index is not None:
        make_index(options.dedup.index)
    with (
        sigterm_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="scalellm-") as scratch,
        _engine(options) as encode,
    ):
        show = _Progress(progress)
        with _refined(options, corpus, show) as refined:
            texts = _texts(corpus, refined)
            tokenizer = _tokenizer_for(options, refined, texts, Path(scratch), show)
            training_s = time.perf_counter() - started
            report = _encode(options, corpus, refined, texts, tokenizer, encode, show)
    seconds = time.perf_counter() - started
    return replace(report, seconds=seconds, training_s=training_s)


@contextmanager
def _refined(
    options: PrepareOptions, corpus: Corpus, show: _Progress
) -> Generator[Refined | None, None, None]:
    """Gives the cleaned documents; their folder goes with success and with the user's mistakes."""
    if not options.refine.is_on:
        yield None
        return
    work = WorkFolder(options.out, key_of(corpus.made_from))
    keep = True
    try:
        tally = Tally()
        num_workers = options.num_workers or _cores()
        with show.bar("cleaning" if options.clean else "reading") as bar:
            refined = refine(
                corpus.documents(tally),
                tally,
                options.refine,
                work,
                num_workers,
                # Prepared again in whatever way, a dataset is no duplicate of what it was.
                run_key=str(options.out.resolve()),
                progress=bar,
            )
        yield refined
        keep = False
    except DiskError as error:
        if work.mark() is None:
            raise
        kept = f"{error}; what was cleaned stays in {work.path} for the next try"
        raise DiskError(kept) from None
    except UserError:
        keep = False
        raise
    finally:
        work.close(remove=not keep or work.mark() is None)


def _texts(corpus: Corpus, refined: Refined | None) -> Texts:
    def read(tally: Tally) -> Iterator[tuple[str, str]]:
        if refined is None:
            raw = ((split, document.text) for split, document in corpus.documents(tally))
            return corpus.split_texts(raw)
        tally.dropped, tally.encodings = refined.tally.dropped, refined.tally.encodings
        return corpus.split_texts(refined.texts())

    return read


def _engine(options: PrepareOptions) -> AbstractContextManager[Encode]:
    """Gives what encodes. Entered first of all: a cluster that cannot be joined costs no work."""
    if options.engine == "ray":
        from scalellm.data.ray_engine import ray_engine

        return ray_engine(options.ray_address, options.num_workers)
    num_workers = options.num_workers or _cores()

    def encode(batches: Iterable[SplitTexts], file: Path) -> Generator[Encoded, None, None]:
        return ordered_map(encode_job.encode, batches, num_workers, encode_job.load, (file,))

    return nullcontext(encode)


class _Progress:
    """Bars on stderr, or nothing."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self.total_bytes: int | None = None

    def say(self, message: str) -> None:
        if self._shown:
            tqdm.write(message, file=sys.stderr)

    def bar(self, what: str, total_bytes: int | None = None) -> Any:
        return tqdm(
            desc=what,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=not self._shown,
            mininterval=0.5,
        )


def _tokenizer_for(
    options: PrepareOptions, refined: Refined | None, read: Texts, scratch: Path, show: _Progress
) -> Tokenizer:
    if not options.trains_tokenizer:
        return load_tokenizer(Path(options.tokenizer))
    sample = TextSample(sample_bytes(options.tokenizer, options.vocab_size), options.seed)
    tally, read_bytes = Tally(), 0
    with show.bar("reading") as bar:
        for split, text in read(tally):
            size_bytes = len(text.encode())
            read_bytes += size_bytes
            bar.update(size_bytes)
            if split == TRAIN:
                sample.add(text)
    show.total_bytes = read_bytes
    texts, out = sample.texts(), scratch / "tokenizer.model"
    chars = sum(map(len, texts))
    if not texts:
        raise no_text(options, tally, refined)
    show.say(f"training the {options.tokenizer} tokenizer on {chars:,} characters …")
    job = (options.tokenizer, texts, options.vocab_size, out)
    if chars < _TRAIN_HERE_CHARS:
        _train(*job)
    else:
        call_in_process(_train, *job)
    return load_tokenizer(out)


def _train(kind: str, texts: list[str], vocab_size: int, out: Path) -> None:
    train_tokenizer(kind, texts, vocab_size, out)


def _encode(
    options: PrepareOptions,
    corpus: Corpus,
    refined: Refined | None,
    read: Texts,
    tokenizer: Tokenizer,
    encode: Encode,
    show: _Progress,
) -> PrepareReport:
    """Writes the dataset; the report lacks only the times before."""
    started = time.perf_counter()
    tally, counts, unknown_tokens = Tally(), _Counts(), 0
    encoded = encode(encode_job.batches(read(tally)), tokenizer.file)
    writer = DatasetWriter(
        options.out,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_file=tokenizer.file,
        tokenizer_kind=tokenizer.kind,
        overwrite=options.overwrite,
        **_frames(options.pack),
    )
    packed = None if options.pack is None else PackedSplit(writer, TRAIN, options.pack)
    with writer, closing(encoded), show.bar("encoding", show.total_bytes) as bar:
        for batch in encoded:
            for split, tokens, text_bytes, text_words in batch.documents():
                if packed is not None and split == TRAIN:
                    packed.add(tokens, text_bytes, text_words)
                else:
                    writer.add(split, tokens, text_bytes=text_bytes, text_words=text_words)
                counts.add(split, text_bytes, text_words, len(tokens))
                bar.update(text_bytes)
            unknown_tokens += batch.unknown_tokens
        if packed is not None:
            packed.finish()
        splits = counts.reports()
        if TRAIN not in splits:
            raise no_text(options, tally, refined)
        encoding_s = time.perf_counter() - started
        report = PrepareReport(
            out=options.out,
            splits=splits,
            tokenizer_kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            dropped={name: count for name, count in tally.dropped.items() if count},
            encodings=dict(tally.encodings),
            unknown_tokens=unknown_tokens,
            notes=tuple(_notes(options, tokenizer, splits, unknown_tokens)),
            documents_per_s=sum(one.documents for one in splits.values()) / encoding_s,
            mb_per_s=sum(one.text_bytes for one in splits.values()) / encoding_s / _MB,
            cleaning=None if refined is None else refined.cleaning,
            cleaning_lines=() if refined is None else tuple(refined.cleaning_lines),
            deduplication=None if refined is None else refined.duplicates,
            packing=None if packed is None else packed.report(),
        )
        writer.finish({"made_from": corpus.made_from} | report.to_extra())
        if refined is not None:
            refined.keep()
    return report


def _frames(pack: int | None) -> dict[str, int]:
    """Frames of whole rows, so that reading a row touches one frame."""
    if pack is None:
        return {}
    frame_tokens = max(1, FRAME_TOKENS // pack) * pack
    return {"frame_tokens": frame_tokens, "shard_tokens": 1024 * frame_tokens}


class _Counts:
    """Documents, bytes, words and tokens by split."""

    def __init__(self) -> None:
        self._sums: dict[str, Counter[str]] = {}

    def add(self, split: str, text_bytes: int, text_words: int, tokens: int) -> None:
        counter = self._sums.setdefault(split, Counter())
        counter["documents"] += 1
        counter["text_bytes"] += text_bytes
        counter["text_words"] += text_words
        counter["tokens"] += tokens

    def reports(self) -> dict[str, SplitReport]:
        return {name: SplitReport(**self._sums[name]) for name in sorted(self._sums)}


def _notes(
    options: PrepareOptions,
    tokenizer: Tokenizer,
    splits: dict[str, SplitReport],
    unknown_tokens: int,
) -> Iterator[str]:
    lowered = tokenizer.vocab_size < options.vocab_size and options.tokenizer in ("bpe", "unigram")
    if lowered:
        yield (
            f"the text gives only {tokenizer.vocab_size:,} pieces, so vocab_size="
            f"{options.vocab_size} was lowered to that"
        )
    if unknown_tokens:
        yield f"{unknown_tokens:,} tokens stand for characters the tokenizer does not know"
    if VALIDATION not in splits and options.validation_sources:
        yield "there is no validation split: nothing of --validation-source was left"
    elif VALIDATION not in splits and options.val_fraction > 0:
        yield "there is no validation split: a single text of one character cannot be cut"


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
