"""Why a rank or its worker has ended, in one clause."""

from __future__ import annotations

import re
import signal

from scalellm.errors import EXIT_STOPPED_BY_SIGNAL

NODE_DIED = "is gone: its node died or was cut off"
_OWN_WORDS = re.compile(r"rank \d+ on ")  # of a rank's worker that has told us itself
_BROKEN = re.compile(r"Connection (?:closed|reset|refused)[^.]*(?:[\d.]+\]:\d+)?")
# torch writes "[rank0]: " before each line of a traceback.
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b.*)")


def cause_of_end(code: int, lines: list[str]) -> str:
    """One sentence on why a process ended, from its exit code and its last lines."""
    if code < 0:
        names = {member.value: member.name for member in signal.Signals}
        name = names.get(-code, f"signal {-code}")
        return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if code == EXIT_STOPPED_BY_SIGNAL:
        return "was asked to stop, and saved"
    for line in reversed(lines):
        if line.startswith("scalellm: "):
            return f"said: {line.removeprefix('scalellm: ')}"
        if broken := _BROKEN.search(line):
            return f"lost another rank: {broken[0]}"
        if found := _EXCEPTION.match(line):
            return f"raised {found[1][:300]}"
    return f"ended with exit code {code}"


def cause_of_loss(error: BaseException) -> str:
    """One clause on a worker that Ray has lost, from the first lines of what Ray raises."""
    text = str(error)
    if "RankDiedError" in text or _OWN_WORDS.match(text):
        return ""  # it has told us itself
    if "worker process has died" in text:
        return "is gone: its Ray worker was killed (out of memory?)"
    if "node" in text and ("died" in text or "dead" in text):
        return NODE_DIED
    first: str = (text.strip() or repr(error)).splitlines()[0]
    return f"is gone: {first[:200]}"
