"""Reads and checks everything of a dataset, in parallel, and lists all the damage there is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scalellm.cores import available_cores
from scalellm.data.format import MANIFEST, Manifest
from scalellm.data.reader import TokenDataset
from scalellm.data.store import RESTORE
from scalellm.data.tools._files import check_file, file_sizes, strangers
from scalellm.errors import DataError, UserError

_MB = 1_000_000
_MAX_WORKERS = 256
_JOB_FRAMES = 16
# Jobs per thread handed out before their results are taken: enough to keep all at work.
_AHEAD = 4


@dataclass(frozen=True)
class Verification:
    """The result of `verify_dataset`.

    Attributes:
        path: the dataset.
        damage: one line for each thing that is wrong: file, frame, what.
        strangers: files in the directory that are not of the dataset.
        num_files: files of the dataset, its manifest included.
        num_frames: frames of all splits.
        size_bytes: of all files.
        seconds: wall time.
    """

    path: Path
    damage: tuple[str, ...]
    strangers: tuple[str, ...]
    num_files: int
    num_frames: int
    size_bytes: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """What to print: the damage, the strangers; and, where all is well, that it is."""
        yield from self.damage
        for name in self.strangers:
            yield f"note: {self.path / name} does not belong to the dataset"
        if not self.damage:
            yield (
                f"{self.path} is sound: {self.num_files:,} files, {self.num_frames:,} frames, "
                f"{self.size_bytes / _MB:,.2f} MB in {self.seconds:.2f} s "
                f"({self.size_bytes / _MB / max(self.seconds, 1e-9):,.0f} MB/s)"
            )

    def raise_damage(self) -> None:
        """Raises DataError with one summary sentence if there is any damage."""
        if self.damage:
            found = "1 fault was" if len(self.damage) == 1 else f"{len(self.damage)} faults were"
            raise DataError(f"{self.path} is damaged: {found} found, listed above; {RESTORE}")


def verify_dataset(path: Path, workers: int = 0, *, progress: bool = True) -> Verification:
    """Checks every hash, every frame, the document ends, the carry tokens and all counts.

    Args:
        path: the dataset.
        workers: threads; 0 is one per core. zstd, crc32 and sha256 leave Python's lock alone.
        progress: show a bar on stderr.

    Raises:
        UserError: `workers` is out of range.
        DataError: no dataset, or a manifest that cannot be read: nothing else can be checked then.
    """
    if not 0 <= workers <= _MAX_WORKERS:
        raise UserError(f"--workers={workers} threads is not 0 (one per core) to {_MAX_WORKERS}")
    workers = workers or available_cores()
    started = time.perf_counter()
    manifest = TokenDataset.open(path).manifest
    sizes = file_sizes(path, manifest)
    checks = [_SplitCheck(path, manifest, name) for name in sorted(manifest.splits)]
    jobs = [_manifest_jobs(path, manifest), *(check.jobs() for check in checks)]
    damage: dict[str, None] = {}
    with (
        tqdm(
            desc="verifying",
            total=sum(sizes.values()),
            unit="B",
            unit_scale=True,
            disable=not progress,
            mininterval=0.5,
            leave=False,
        ) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for found, size_bytes in _in_order(pool, chain.from_iterable(jobs), workers * _AHEAD):
            damage |= dict.fromkeys(found)
            bar.update(size_bytes)
    for check in checks:
        damage |= dict.fromkeys(check.closing())
    return Verification(
        path,
        tuple(damage),
        tuple(strangers(path, sizes)),
        len(sizes),
        sum(shard.num_frames for one in manifest.splits.values() for shard in one.shards),
        sum(sizes.values()),
        time.perf_counter() - started,
    )


# A job gives the damage it found and the bytes it has done.
_Found = tuple[list[str], int]
_Job = Callable[[], _Found]


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[_Job], ahead: int) -> Iterator[_Found]:
    """Results in the order of the jobs, which are made only as they are needed."""
    waiting: deque[Future[_Found]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _manifest_jobs(path: Path, manifest: Manifest) -> Iterator[_Job]:
    # Opening has checked the manifest against its own hash.
    yield lambda: ([], (path / MANIFEST).stat().st_size)
    entry = manifest.tokenizer
    if entry is not None:
        yield lambda: check_file(path, entry.file, None, entry.sha256)


class _SplitCheck:
    """The jobs of one split, and what only all of them together tell."""

    def __init__(self, path: Path, manifest: Manifest, name: str) -> None:
        self._path, self._name, self._frame_tokens = path, name, manifest.frame_tokens
        self._split = manifest.splits[name]
        self._dataset = TokenDataset.open(path, name)
        shards = self._split.shards
        self._first_frames = [0, *accumulate(shard.num_frames for shard in shards)]
        # The first id of each frame and the one that should follow it; -1 where it was not read.
        self._first_ids = np.full(self._first_frames[-1], -1, np.int64)
        self._carries = np.full(self._first_frames[-1], -1, np.int64)
        self._documents, self._last_end = [0] * len(shards), 0
        self._unread = False
        self._lock = threading.Lock()

    def jobs(self) -> Iterator[_Job]:
        """Shard by shard, so that the second look at a file finds it in the page cache."""
        for number, shard in enumerate(self._split.shards):
            for name, size_bytes, sha256 in (
                (shard.index, None, shard.index_sha256),
                (shard.documents, shard.documents_size_bytes, shard.documents_sha256),
                (shard.file, shard.size_bytes, shard.sha256),
            ):
                yield _file_job(self._path, name, size_bytes, sha256, counts=name == shard.index)
            done_bytes = shard.size_bytes + shard.documents_size_bytes
            frames, stop = self._first_frames[number], self._first_frames[number + 1]
            for first in range(frames, stop, _JOB_FRAMES):
                last = min(first + _JOB_FRAMES, stop)
                part = done_bytes * (last - frames) // shard.num_frames
                part -= done_bytes * (first - frames) // shard.num_frames
                yield self._frames_job(number, range(first, last), part)

    def closing(self) -> Iterator[str]:
        """What the frames say together: carry tokens, counts and the last end."""
        wrong = (self._carries[:-1] >= 0) & (self._first_ids[1:] >= 0)
        wrong &= self._carries[:-1] != self._first_ids[1:]
        for frame in np.flatnonzero(wrong).tolist():
            place = int(np.searchsorted(self._first_frames, frame + 1, side="right")) - 1
            yield (
                f"{self._path / self._split.shards[place].file}: frame "
                f"{frame + 1 - self._first_frames[place]} does not start with the carry token of "
                "the frame before"
            )
        if self._unread:
            return  # counts of what could not be read would only repeat it
        for shard, documents in zip(self._split.shards, self._documents, strict=True):
            if documents != shard.num_documents:
                yield (
                    f"{self._path / shard.documents}: has {documents} document ends, the manifest "
                    f"says {shard.num_documents}"
                )
        padding = self._split.num_tokens - self._last_end
        if not 0 <= padding < (self._split.packed_seq_len or 1):
            yield (
                f"{self._path}: split {self._name!r} has its last document end at token "
                f"{self._last_end}, the manifest says {self._split.num_tokens}"
            )

    def _frames_job(self, shard: int, frames: range, done_bytes: int) -> _Job:
        def job() -> _Found:
            found = []
            for frame in frames:
                try:
                    found += self._check_frame(shard, frame)
                except DataError as error:
                    self._unread = True
                    found.append(_problem(error))
            return found, done_bytes

        return job

    def _check_frame(self, shard: int, frame: int) -> list[str]:
        dataset, size = self._dataset, self._frame_tokens
        start, stop = frame * size, min((frame + 1) * size, dataset.num_tokens)
        # One id more is the frame's carry, for which no second frame is decoded.
        ids = dataset.read(start, min(stop + 1, dataset.num_tokens))
        self._first_ids[frame] = ids[0]
        if stop < dataset.num_tokens:
            self._carries[frame] = ids[-1]
        ends = dataset.document_ends(start, stop) - start
        with self._lock:
            self._documents[shard] += len(ends)
            if len(ends):
                self._last_end = max(self._last_end, start + int(ends[-1]))
        where = f"{self._path / self._split.shards[shard].documents}: frame "
        where += f"{frame - self._first_frames[shard]}"
        if dataset.packed_seq_len is not None:
            fault = row_fault(ids[: stop - start], ends, dataset.packed_seq_len, start, dataset)
            return [f"{where} {fault}"] if fault else []
        open_ends = np.flatnonzero(ids[ends - 1] != dataset.eos_id)
        if not len(open_ends):
            return []
        end = int(ends[open_ends[0]])
        return [
            f"{where} ends a document at token {end}, where the id is {int(ids[end - 1])} and not "
            f"the end of text {dataset.eos_id}"
        ]


def row_fault(
    ids: np.ndarray, ends: np.ndarray, seq_len: int, start: int, dataset: TokenDataset
) -> str:
    """Says what is wrong with the packed rows that lie whole in a frame; "" if nothing is.

    A piece of a document that was cut ends without an end of text, so that is not asked of ends.
    """
    for row in range(-start % seq_len, len(ids) - seq_len + 1, seq_len):
        inside = ends[(ends > row) & (ends <= row + seq_len)]
        if not len(inside):
            return f"has a row at token {row} in which no document ends"
        if np.count_nonzero(ids[int(inside[-1]) : row + seq_len] != dataset.eos_id):
            return f"has a row at token {row} with ids behind the end of its last document"
    return ""


def _file_job(path: Path, name: str, size_bytes: int | None, sha256: str, *, counts: bool) -> _Job:
    def job() -> _Found:
        found, done_bytes = check_file(path, name, size_bytes, sha256)
        return found, done_bytes if counts else 0

    return job


def _problem(error: DataError) -> str:
    """The error without its advice, which the summary gives once."""
    return str(error).removesuffix(f"; {RESTORE}")
