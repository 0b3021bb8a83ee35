# ruff: noqa: RUF001
"""C4's rules for lines, and limits for lines of source code."""

from __future__ import annotations

import re

from scalellm.data.clean.options import LinesOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, split_words

_END = frozenset(".!?;\"'”’»›。！？；」』）…।॥؟۔።։")
# Thai and Lao put no mark at the end of a sentence.
_NEEDS_NO_END = re.compile("[\u0e00-\u0eff]\\W{0,9}\\Z")
# One character each: a run with "+" would be read again from each of its characters.
_SENTENCE = re.compile("[.!?…।॥؟۔።։](?=[\\s\"'”’»›)]|\\Z)|[。！？](?![。！？])")
# Longer lines are prose that mentions the words.
_NOTICE_CHARACTERS = 400
_LOREM_IPSUM = ("lorem ipsum",)
_JAVASCRIPT = re.compile(
    r"\b(?:enable|disabled?|require[sd]?|turn|activate|browser|aktivier\w*|activ[ae]\w*"
    r"|habilit\w*|desactiv\w*|abilit\w*|включ\w*)\b|启用|有効"
)
_COOKIES = (
    *("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies"),
    *("use cookies", "using cookies", "accept cookies", "accept all cookies", "cookie settings"),
    *("verwendet cookies", "verwenden cookies", "datenschutzerklärung", "utilise des cookies"),
    *("utilisons des cookies", "politique de confidentialité", "utiliza cookies"),
    *("utilizamos cookies", "política de privacidad", "utilizza i cookie", "隐私政策"),
)


class LinesStage:
    def __init__(self, options: LinesOptions) -> None:
        self._options = options

    def __call__(self, page: Page) -> Verdict:
        reason = self._too_long(page)
        if reason:
            return Verdict(kind="lines too long", reason=reason)
        text, dropped = self._drop(page)
        changes = {"dropped": dropped} if dropped else {}
        left = Page(text)
        kind, reason = self._too_few(left)
        if kind:
            return Verdict(text, kind, reason, changes)
        return Verdict(text, changes=changes) if dropped else KEEP

    def _too_long(self, page: Page) -> str:
        longest, mean = self._options.max_line_characters, self._options.max_mean_line_characters
        if not page.lines:
            return ""
        if longest is not None and (found := max(map(len, page.lines))) > longest:
            return f"has a line of {found:,} characters, the limit is {longest:,}"
        found_mean = sum(map(len, page.lines)) / len(page.lines)
        if mean is not None and found_mean > mean:
            return f"its lines have {found_mean:.0f} characters on average, the limit is {mean:g}"
        return ""

    def _drop(self, page: Page) -> tuple[str, int]:
        """The text without unwanted lines, and how many went; untouched if none."""
        lower = page.text.lower()
        javascript = self._options.drop_javascript and "javascript" in lower
        notices: tuple[str, ...] = _LOREM_IPSUM if self._options.drop_lorem_ipsum else ()
        notices += _COOKIES if self._options.drop_cookies else ()
        notices = tuple(words for words in notices if words in lower)
        kept: list[str] = []
        dropped = 0
        for line in page.text.split("\n"):
            bare = line.strip()
            if bare and (self._is_notice(bare, notices, javascript) or self._is_scrap(bare)):
                dropped += 1
            # One blank line stays where lines went.
            elif bare or not (kept and not kept[-1]) or not dropped:
                kept.append(line if bare else "")
        return ("\n".join(kept).strip("\n"), dropped) if dropped else (page.text, 0)

    def _is_scrap(self, line: str) -> bool:
        """Too short, or without an end: a menu, a button, a caption."""
        least = self._options.min_words
        # `split` is asked for no more words than are needed.
        if len(line.split(None, least)) < least and (
            line.isascii() or len(split_words(line)) < least
        ):
            return True
        if not self._options.end_punctuation:
            return False
        if line[-1] not in _END:
            return not _NEEDS_NO_END.search(line[-12:])
        return line.endswith(("...", "…")) and not line.endswith("……")

    @staticmethod
    def _is_notice(line: str, notices: tuple[str, ...], javascript: bool) -> bool:
        if len(line) > _NOTICE_CHARACTERS or not (notices or javascript):
            return False
        lower = line.lower()
        if any(words in lower for words in notices):
            return True
        return javascript and "javascript" in lower and bool(_JAVASCRIPT.search(lower))

    def _too_few(self, left: Page) -> tuple[str, str]:
        """Kind and reason; ("", "") if enough is left."""
        options = self._options
        if len(left.lines) < options.min_lines:
            found = f"{len(left.lines)} lines are left, the least is {options.min_lines}"
            return "too few lines", found
        if not options.min_sentences or _NEEDS_NO_END.search(left.text[-12:]):
            return "", ""
        sentences = 0
        for _ in _SENTENCE.finditer(left.text):
            sentences += 1
            if sentences >= options.min_sentences:
                return "", ""
        found = f"{sentences} sentences are left, the least is {options.min_sentences}"
        return "too few sentences", found
