"""Mistakes a user can mend: one sentence each, shown without a traceback.

The command line prints the sentence on stderr and exits with `EXIT_USER_ERROR`. Everything that is
not a `UserError` is a bug of ours or of the machine and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED_BY_SIGNAL = 3


class UserError(Exception):
    """A mistake of the user: the message names the value, its unit, the limit and the fix.

    All ranks meet most mistakes alike, so rank 0 speaks for them. `rank_only` marks what only this
    rank can see (its disk, its GPU): it says so itself.
    """

    rank_only = False


class ConfigError(UserError):
    """A configuration that cannot be run: unknown key, wrong type, impossible arithmetic."""


class DataError(UserError):
    """A source or dataset that cannot be trusted: damaged, lying, empty, or of another format."""


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded: damaged, incomplete, or of another model."""


class DivergedError(Exception):
    """Training gave up: shown as one sentence, but nobody's typing mistake (exit code 1)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed: Python's, torch's on a CPU, or a GPU's."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest candidate, or `""` if none is near."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
