"""What a sweep has done so far: a journal, one line for each thing done, and `sweep.json` of it.

The journal is the truth and what `--resume` goes by: its first line says what was asked, every
further one is on the disk before the next run starts.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from scalellm.durable import fsync_path
from scalellm.errors import UserError

JOURNAL_NAME = "journal.jsonl"
REPORT_NAME = "sweep.json"
Entry = dict[str, Any]


class Journal:
    """The journal of a sweep's folder, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Claims the folder. Raises UserError if it cannot be written or another sweep runs."""
        self._path = folder / JOURNAL_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"--out {folder} cannot be written: {error.strerror}; choose another"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder} is in use by another sweep; wait for it or choose another --out"
            ) from None
        self._file: IO[str] | None = None
        self.entries: list[Entry] = []

    def begin(self, head: Entry, *, resume: bool) -> Entry:
        """Returns the first line: `head`, or that of the sweep which is gone on with.

        Raises:
            UserError: there is a sweep and nobody said resume, the other way round, or its
                `head["config"]` is another one.
        """
        found = self._read()
        folder = self._path.parent
        if found and not resume:
            raise UserError(
                f"--out {folder} already holds a sweep: add --resume to go on with it, or choose "
                "another --out"
            )
        if resume and not found:
            raise UserError(f"--resume: {folder} holds no sweep; leave --resume out to begin one")
        # What failed, but not for want of memory, is tried again: the user may have mended it.
        failed = [line for line in found if line.get("status") == "failed"]
        again = [line for line in found if line not in failed and not (failed and _is_end(line))]
        lines = again or [head]
        if lines[0]["config"] != head["config"]:
            raise UserError(_difference(folder, lines[0]["config"], head["config"]))
        _replace(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")
        self.entries = lines[1:]
        return lines[0]

    def _read(self) -> list[Entry]:
        """All whole lines; a kill may have cut the last one short."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise UserError(f"{self._path} is damaged; begin again with another --out") from None

    def add(self, entry: Entry) -> None:
        """Appends an entry; it is on the disk when this returns."""
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries.append(entry)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()


def _is_end(entry: Entry) -> bool:
    return entry.get("kind") == "end"


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Writes `sweep.json`; it is there whole or as it was before."""
    path = folder / REPORT_NAME
    _replace(path, json.dumps(report, indent=1) + "\n")
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


def _difference(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
    return (
        f"--resume: {folder} was begun with {key}={_words(before.get(key))}, not "
        f"{_words(now.get(key))}; give the same options, or another --out"
    )


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
