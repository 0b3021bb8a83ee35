"""Where text comes from: the running Python's own library, files and folders, Hugging Face.

A source is walked more than once (to train the tokenizer, then to encode), always in the same
order. Names: `stdlib`, a path, or `hf:NAME[:CONFIG][@SPLIT]`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scalellm.data.documents import (
    SUFFIXES,
    Document,
    ReadOptions,
    Tally,
    is_readable,
    read_file,
)
from scalellm.data.hub import HF_PREFIX, HubSource
from scalellm.errors import DataError, UserError, did_you_mean

STDLIB = "stdlib"
# Not read: other people's packages; tables of characters; topics come from the module itself.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")


class Source(Protocol):
    """Something documents can be read from, again and again in the same order."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Yields every document; counts what is left out and the encodings in `tally`."""

    def fingerprint(self) -> str:
        """Hex digest that changes when the source does; cheap, without reading the text."""


@dataclass(frozen=True)
class LimitedSource:
    """The first documents of a source, up to `limit_bytes` of UTF-8 text (at least one)."""

    source: Source
    limit_bytes: int

    @property
    def name(self) -> str:
        return self.source.name

    def documents(self, tally: Tally) -> Iterator[Document]:
        taken_bytes = 0
        for document in self.source.documents(tally):
            yield document
            taken_bytes += len(document.text.encode("utf-8", "surrogatepass"))
            if taken_bytes >= self.limit_bytes:
                return

    def fingerprint(self) -> str:
        return self.source.fingerprint()


@dataclass(frozen=True)
class StdlibSource:
    """The `.py` files of the running Python's library and the topics of `pydoc`.

    Attributes:
        root: the library folder; one file is one document, decoded as PEP 263 says.
        shuffled: files in the order of a hash of their path, so that a prefix is representative.
    """

    root: Path
    shuffled: bool = False
    name: str = STDLIB

    def documents(self, tally: Tally) -> Iterator[Document]:
        for path in self._files():
            try:
                with tokenize.open(path) as file:
                    yield Document(file.read(), f"{STDLIB}:{path.relative_to(self.root)}")
            except (SyntaxError, UnicodeDecodeError):
                # Files that test the handling of a wrong encoding.
                tally.dropped["undecodable"] += 1
            except OSError:
                tally.dropped["unreadable"] += 1
        for topic, text in _pydoc_topics():
            yield Document(text, f"pydoc:{topic}")

    def fingerprint(self) -> str:
        return _digest(sys.version, *(_identity(path) for path in self._files()))

    def _files(self) -> list[Path]:
        files = [
            path
            for path in _walk(self.root, Tally(), skipped=_STDLIB_SKIPPED)
            if path.suffix == ".py"
        ]
        return sorted(files, key=_hash_order(self.root)) if self.shuffled else files


@dataclass(frozen=True)
class PathSource:
    """One file, or all files of known suffixes under a folder, hidden ones left out."""

    path: Path
    options: ReadOptions
    shuffled: bool = False

    @property
    def name(self) -> str:
        return str(self.path)

    def documents(self, tally: Tally) -> Iterator[Document]:
        for path in self._files(tally):
            yield from read_file(path, self.options, tally)

    def fingerprint(self) -> str:
        return _digest(*(_identity(path) for path in self._files(Tally())))

    def _files(self, tally: Tally) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        files = []
        for path in _walk(self.path, tally):
            if is_readable(path):
                files.append(path)
            else:
                tally.dropped["files of unknown suffix"] += 1
        if not files:
            raise DataError(
                f"{self.path} holds no file of a known suffix; they are {', '.join(SUFFIXES)}"
            )
        return sorted(files, key=_hash_order(self.path)) if self.shuffled else files


def open_sources(
    names: tuple[str, ...], options: ReadOptions, limit_bytes: int | None = None
) -> list[Source]:
    """Opens every source by its name and fails before anything is read.

    Args:
        names: `stdlib`, paths, `hf:NAME[:CONFIG][@SPLIT]`.
        options: how files are read.
        limit_bytes: at most about so much text of each source: of folders and the library a
            sample of whole files, of one file and of Hugging Face the beginning.

    Raises:
        UserError: an unknown name or a path that does not exist.
    """
    if not names:
        raise UserError("no source given; use stdlib, a path, or hf:NAME")
    sources = [_open_source(name, options, limit_bytes is not None) for name in names]
    if limit_bytes is None:
        return sources
    return [LimitedSource(source, limit_bytes) for source in sources]


def _open_source(name: str, options: ReadOptions, shuffled: bool) -> Source:
    if name == STDLIB:
        return StdlibSource(_stdlib_root(), shuffled)
    if name.startswith(HF_PREFIX):
        return HubSource.parse(name, options.text_field)
    if not name:
        raise UserError("a source is empty; use stdlib, a path, or hf:NAME")
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"source {name!r} does not exist{_nearest(path, name)}")
    if not path.is_dir() and not is_readable(path):
        raise UserError(f"{path} has no known suffix; the suffixes are {', '.join(SUFFIXES)}")
    return PathSource(path, options, shuffled)


def _stdlib_root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise UserError(
            f"this Python keeps no library sources ({root} is no folder); give a path as the source"
        )
    return root


def _nearest(path: Path, name: str) -> str:
    try:
        siblings = sorted(os.listdir(path.parent))
    except OSError:
        return "; use stdlib, a path, or hf:NAME"
    hint = did_you_mean(path.name, [*siblings, STDLIB] if path.name == name else siblings)
    return hint or "; use stdlib, a path, or hf:NAME"


def _walk(root: Path, tally: Tally, skipped: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every visible file under a folder, sorted; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        hidden = [name for name in folders if name.startswith(".")]
        if hidden:
            tally.dropped["hidden folders"] += len(hidden)
        # In place: `os.walk` goes on into what is left here.
        folders[:] = sorted(set(folders) - set(hidden) - set(skipped))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                tally.dropped["hidden files"] += 1
            elif path.is_file():
                yield path


def _hash_order(root: Path) -> Callable[[Path], bytes]:
    return lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _pydoc_topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data import topics
    except ImportError:
        return []
    return sorted(topics.topics.items())
