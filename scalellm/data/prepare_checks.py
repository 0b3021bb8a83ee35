"""What `prepare` refuses, and when it has nothing to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalellm.data.corpus import PrepareOptions
from scalellm.data.documents import Tally
from scalellm.data.format import MANIFEST, load_manifest
from scalellm.data.prepare_report import PrepareReport
from scalellm.data.refine import Refined
from scalellm.data.spool import remove_work
from scalellm.errors import DataError

_MENDED = "replace it with --overwrite, or give another --out"


def find_made(options: PrepareOptions, made_from: dict[str, Any]) -> PrepareReport | None:
    """The report of the same dataset, or None if `out` is free.

    Raises:
        DataError: `out` holds something else.
    """
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out} is taken and holds no dataset; give another --out")
    if options.overwrite:
        return None
    manifest = load_manifest(out)
    found = manifest.extra.get("made_from")
    if not isinstance(found, dict):
        raise DataError(f"{out} holds a dataset of unknown origin; {_MENDED}")
    wanted = json.loads(json.dumps(made_from))
    names = (*wanted, *(name for name in found if name not in wanted))
    changed = [name for name in names if found.get(name) != wanted.get(name)]
    if not changed:
        remove_work(out)
        return PrepareReport.of_dataset(out, manifest)
    if changed == ["fingerprints"]:
        raise DataError(f"{out} was prepared before its sources changed; {_MENDED}")
    differ = ", ".join(
        f"{name}={before!r} there, {now!r} now"
        for change in changed
        if change != "fingerprints"
        for name, before, now in _differences(change, found.get(change), wanted.get(change))
    )
    raise DataError(f"{out} was prepared with other options ({differ}); {_MENDED}")


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the settings that differ, those of a section one by one."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif isinstance(before, dict) or isinstance(now, dict):
        yield (
            name,
            "on" if isinstance(before, dict) else before,
            "on" if isinstance(now, dict) else now,
        )
    else:
        yield name, before, now


def make_index(folder: Path) -> None:
    """Makes the folder that is written last, so that it does not fail then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"dedup.index={folder} cannot be made: {error.strerror}; give another folder"
        ) from None


def refuse_unwritable(out: Path) -> None:
    """Fails before the work, not after it."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"{parent} is no folder that can be written; give another --out")


def no_text(options: PrepareOptions, tally: Tally, refined: Refined | None) -> DataError:
    """Returns the error for sources of which nothing is left to train on."""
    reasons = dict(sorted(tally.dropped.items()))
    if refined is not None:
        reasons |= refined.removed
    dropped = ", ".join(f"{name} {count:,}" for name, count in reasons.items())
    return DataError(
        f"there is no text to train on in {', '.join(options.sources)} (left out: "
        f"{dropped or 'nothing'}); give more text or relax the filters"
    )
