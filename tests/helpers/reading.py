"""Reads sources the way `prepare` does, for tests of what comes out of them."""

from __future__ import annotations

from pathlib import Path

from scalellm.data.documents import Document, ReadOptions, Tally
from scalellm.data.sources import open_sources


def read(
    *names: str | Path,
    options: ReadOptions | None = None,
    tally: Tally | None = None,
    limit_bytes: int | None = None,
) -> list[Document]:
    sources = open_sources(tuple(map(str, names)), options or ReadOptions(), limit_bytes)
    return [one for source in sources for one in source.documents(tally or Tally())]


def texts(*names: str | Path, **options: object) -> list[str]:
    return [document.text for document in read(*names, **options)]  # type: ignore[arg-type]
