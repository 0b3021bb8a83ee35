"""The fingerprints of earlier runs: one folder a run, that appears whole or not at all.

    INDEX/run-000001-0f3c.../{digests,signatures,short}.bin and run.json

All documents of a run are kept, those it removed too, so that two runs find what one run over the
texts of both would find. Runs are numbered in the order in which they looked at the index; a run
sees those with lower numbers. Two that look at the same time get the same number and do not see
each other. A run with the key of an earlier one is that run again: it sees what it saw then, and
takes its place.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from pydantic import ValidationError

from scalellm.config.section import Section
from scalellm.data.dedup.fingerprint import FINGERPRINT_VERSION
from scalellm.data.dedup.options import DedupOptions
from scalellm.data.staging import HashedFile, StagedDirectory, write_synced
from scalellm.errors import DataError

DIGESTS, SIGNATURES, SHORT = "digests.bin", "signatures.bin", "short.bin"
_RECORD = "run.json"
_NAME = re.compile(r"run-(\d{6})-([0-9a-f]{16})")
_COPY_BYTES = 1 << 20


class RunRecord(Section):
    """What `run.json` says; `files` are blake3 hashes by name."""

    version: int
    run_key: str
    documents: int
    near: bool
    ngram: int
    num_hashes: int
    files: dict[str, str]


@dataclass(frozen=True)
class EarlierRun:
    """Where the fingerprints of a run are, and of how many documents."""

    folder: Path
    num_documents: int


class FingerprintIndex:
    """The index as one run sees it.

    Args:
        folder: of the index; need not exist.
        run_key: names this run: equal for a repetition, different for everything else.
        options: the runs must have been fingerprinted alike.

    Attributes:
        runs: earlier ones, oldest first.

    Raises:
        DataError: a run there is damaged or was fingerprinted otherwise.
    """

    def __init__(self, folder: Path, run_key: str, options: DedupOptions) -> None:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is no folder, so it holds no fingerprints; give another")
        found = [match for path in sorted(folder.glob("run-*")) if (match := _match(path))]
        key_hash = hashlib.blake2b(run_key.encode(), digest_size=8).hexdigest()
        numbers = [int(match[1]) for match in found]
        own = [int(match[1]) for match in found if match[2] == key_hash]
        number = own[0] if own else max(numbers, default=0) + 1
        self._target = folder / f"run-{number:06d}-{key_hash}"
        self._run_key, self._options = run_key, options
        self.runs = [_check(folder / m[0], options) for m in found if int(m[1]) < number]

    def commit(self, folder: Path, num_documents: int) -> None:
        """Copies this run's fingerprints from `folder` into the index.

        Raises:
            DataError: no room, or the index cannot be written.
        """
        options, staged = self._options, StagedDirectory(self._target)
        try:
            record = RunRecord(
                version=FINGERPRINT_VERSION,
                run_key=self._run_key,
                documents=num_documents,
                near=options.near,
                ngram=options.ngram,
                num_hashes=options.num_hashes,
                files={
                    name: _copy(folder / name, staged.path / name)
                    for name in (DIGESTS, SIGNATURES, SHORT)
                },
            )
            write_synced(staged.path / _RECORD, record.model_dump_json(indent=1).encode())
            staged.commit(lambda target: None)
        finally:
            staged.abort()


def _match(path: Path) -> re.Match[str] | None:
    """None for what is no finished run, such as the rest of a killed one."""
    return _NAME.fullmatch(path.name)


def _check(folder: Path, options: DedupOptions) -> EarlierRun:
    forget = f"remove {folder} to forget its documents, or give another index"
    try:
        record = RunRecord.model_validate_json((folder / _RECORD).read_bytes())
        damaged = [name for name, digest in record.files.items() if _hash(folder / name) != digest]
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder} is damaged ({type(error).__name__}); {forget}") from None
    if damaged or set(record.files) != {DIGESTS, SIGNATURES, SHORT}:
        names = ", ".join(damaged) or _RECORD
        raise DataError(f"{folder} is damaged ({names} is not what was written); {forget}")
    if record.version != FINGERPRINT_VERSION:
        raise DataError(
            f"{folder} has fingerprints of version {record.version}, not {FINGERPRINT_VERSION}; "
            + forget
        )
    if options.near:
        _check_alike(folder, record, options)
    return EarlierRun(folder, record.documents)


def _check_alike(folder: Path, record: RunRecord, options: DedupOptions) -> None:
    there = {name: getattr(record, name) for name in ("near", "ngram", "num_hashes")}
    differ = [
        f"{name}={value} there, {getattr(options, name)} now"
        for name, value in there.items()
        if value != getattr(options, name)
    ]
    if differ:
        raise DataError(
            f"{folder} was fingerprinted with other options ({'; '.join(differ)}); use the same "
            "or give another index"
        )


def _copy(source: Path, target: Path) -> str:
    digest, out = blake3(), HashedFile(target)
    try:
        with source.open("rb") as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
                out.write(block)
        out.close(sync=True)
    finally:
        out.close()
    return digest.hexdigest()


def _hash(path: Path) -> str:
    digest = blake3()
    digest.update_mmap(path)
    return digest.hexdigest()
