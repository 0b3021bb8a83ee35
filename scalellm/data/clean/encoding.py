"""Mends characters: surrogates, mojibake, control characters, line ends, letter spelling."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from scalellm.data.clean.options import EncodingOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, library, percent

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]{0,16}[A-Za-z]")
# Not the tab, the line ends and the form feed, which source code uses as white space.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# For ASCII texts: one fast search each takes a tenth of the time of the class above.
_ASCII_CONTROL = tuple(char for char in map(chr, range(128)) if _CONTROL.match(char))
_LINE_ENDS = ("\r", "\x85", "\u2028", "\u2029")
_LINE_END = re.compile("\r\n|[\r\x85\u2028\u2029]")
_MARK_RUN_LIMIT = 30
_MOJIBAKE_ENCODINGS = (
    *("latin-1", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "iso8859-2"),
    *("mac-roman", "cp437"),
)


def _as_read(first: int, last: int) -> str:
    """A class of the characters that these bytes become in the wrong encodings."""
    pages = (bytes(range(first, last + 1)).decode(e, "ignore") for e in _MOJIBAKE_ENCODINGS)
    return re.escape("".join(sorted(set("".join(pages)))))


@cache
def _mojibake() -> re.Pattern[str]:
    """A character's bytes of UTF-8 read in a wrong encoding: a quick test, as ftfy reads 1 MB/s.

    The first class and the looks behind say the same as an alternation, ten times as fast.
    """
    two, three, four = _as_read(0xC2, 0xDF), _as_read(0xE0, 0xEF), _as_read(0xF0, 0xF4)
    rest = _as_read(0x80, 0xBF)
    return re.compile(
        f"[{two}{three}{four}\x80-\x9f](?:(?<=[\x80-\x9f])|(?<=[ÃÂâ]) |(?<=[{two}])[{rest}]"
        f"|(?<=[{three}])[{rest}]{{2}}|(?<=[{four}])[{rest}]{{3}})"
    )


@cache
def _mark_runs() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """More combining marks in a row than any language writes (Unicode's Stream-Safe format).

    `unicodedata.normalize` sorts such a run in quadratic time: 40,000 marks take a second.

    Returns:
        A quick test that takes all rare scripts for marks (each range above U+FFFF costs time at
        every character), and the exact pattern.
    """
    common = "".join(
        chr(code) for code in range(0x300, 0x10000) if unicodedata.combining(chr(code))
    )
    rare = [chr(code) for code in range(0x10000, 0x1F000) if unicodedata.combining(chr(code))]
    quick, exact = f"[{common}\U00010000-\U0001efff]", f"[{common}{''.join(rare)}]"
    # Not "{31,}": a search that begins with a single class is fast.
    quick, exact = (f"{mark}{mark}{{{_MARK_RUN_LIMIT},}}" for mark in (quick, exact))
    return re.compile(quick), re.compile(exact)


class EncodingStage:
    def __init__(self, options: EncodingOptions) -> None:
        self._options = options
        if options.mend_mojibake:
            library("ftfy", "ftfy", "encoding.mend_mojibake")

    def __call__(self, page: Page) -> Verdict:
        text, changes = page.text, dict[str, int]()
        if not text.isascii():
            text = self._mend_letters(text, changes)
        text = _mend_control(text, changes)
        if not text.isascii():
            text = self._normalize(text, changes)
        replaced = text.count("\ufffd")
        if replaced > self._options.max_replacement_share * len(text):
            share, limit = replaced / len(text), self._options.max_replacement_share
            reason = (
                f"{percent(share)} of the characters are U+FFFD (unreadable), the limit is "
                f"{percent(limit)}"
            )
            return Verdict(text, "unreadable characters", reason, changes)
        return Verdict(text, changes=changes) if changes else KEEP

    def _mend_letters(self, text: str, changes: dict[str, int]) -> str:
        if _SURROGATE.search(text):
            # Halves that stand together are one character; a lone half is none.
            halves = text.encode("utf-16-le", errors="surrogatepass")
            text = halves.decode("utf-16-le", errors="replace")
            changes["surrogates"] = 1
        if self._options.mend_mojibake and _mojibake().search(text):
            lines = text.split("\n")
            mended = [_mend_line(line) for line in lines]
            if count := sum(a != b for a, b in zip(lines, mended, strict=True)):
                changes["mended"] = count
                text = "\n".join(mended)
        return text

    def _normalize(self, text: str, changes: dict[str, int]) -> str:
        if self._options.normalize == "none":
            return text
        quick, exact = _mark_runs()
        if quick.search(text):
            text, cut = exact.subn(lambda run: run[0][:_MARK_RUN_LIMIT], text)
            if cut:
                changes["marks"] = cut
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            changes["normalized"] = 1
        return text


def _mend_line(line: str) -> str:
    if line.isascii() or not _mojibake().search(line):
        return line
    import ftfy

    return ftfy.fix_encoding(line)


def _mend_control(text: str, changes: dict[str, int]) -> str:
    is_ascii = text.isascii()
    if any(char in text for char in _ASCII_CONTROL) or (not is_ascii and _CONTROL.search(text)):
        text, sequences = _ESCAPE_SEQUENCE.subn("", text)
        text, characters = _CONTROL.subn("", text)
        changes["control"] = sequences + characters
    if any(end in text for end in _LINE_ENDS):
        text = _LINE_END.sub("\n", text)
        changes["line_ends"] = 1
    return text
