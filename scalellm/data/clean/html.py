"""HTML to text, in one pass and linear time whatever the input.

Not a parser: text needs no tree, and the parsers at hand take quadratic time on deep nesting.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from scalellm.data.clean.options import HtmlOptions
from scalellm.data.clean.page import KEEP, Page, Verdict

# Between these an end tag is the only markup.
_RAW = {"script", "style", "title", "textarea", "iframe", "noembed", "noframes", "xmp"}
_DROPPED = {"noscript", "template", "svg", "math", "object", "canvas", "select", "button", "audio"}
_DROPPED |= {"video"}
_NAVIGATION = {"nav", "header", "footer", "aside", "form"}
_PARAGRAPH = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "dl", "blockquote"}
_PARAGRAPH |= {"article", "section", "main", "figure", "hr", "pre", "body", "fieldset", "details"}
_LINE = {"div", "li", "br", "tr", "dt", "dd", "figcaption", "caption", "summary", "address"}
_LINE |= _NAVIGATION | {"center", "option"}
_CELL = {"td", "th"}
_INLINE = {"a", "b", "i", "em", "strong", "span", "img", "font", "u", "small", "code", "script"}
_BEGINS = re.compile(r"[\s\ufeff]*<")
_WHOLE = re.compile(r"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_FRAGMENT = re.compile(
    rf"<(?:{'|'.join(sorted(_PARAGRAPH | _LINE | _CELL | _INLINE))})(?:\s[^<>]{{0,2000}})?/?>",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"(?:</[a-z][a-z0-9]{0,20}\s{0,9}|<(?:br|hr|img)\b[^<>]{0,2000})>\s{0,99}\Z", re.IGNORECASE
)
_MARKUP = re.compile(r"<(?:(!--)|[!?]|(/?)([a-zA-Z][a-zA-Z0-9]{0,30})(?![a-zA-Z0-9]))")
_LONG_NUMBER = re.compile(r"&#[0-9]{8,}")
# Marks of our own in the text on its way; they are dropped from the input first.
_BREAK, _GAP, _PRE = "\x01", "\x02", "\x03"
_MARKS = re.compile("[\x00-\x03]")
_BREAKS = re.compile(f"[{_BREAK}{_GAP}][ {_BREAK}{_GAP}]*")
_MAX_QUOTED = 4096
# Text that was escaped twice is stripped twice; more is nobody's page.
_MAX_ROUNDS = 4


def is_html(text: str) -> bool:
    """Whether a text is a page or a fragment of HTML, not prose or a program with a "<" in it."""
    begin = _BEGINS.match(text)
    if not begin:
        return False
    at = begin.end() - 1
    for _ in range(8):  # the XML declaration and comments may stand first
        end = "?>" if text.startswith("<?xml", at) else "-->"
        if not text.startswith(("<?xml", "<!--"), at) or (found := text.find(end, at)) < 0:
            break
        following = _BEGINS.match(text, found + len(end))
        if not following:
            return False
        at = following.end() - 1
    if _WHOLE.match(text, at):
        return True
    # A README in Markdown may well begin with a tag; it does not end with one, or has code in it.
    return bool(_FRAGMENT.match(text, at) and _ENDS.search(text[-2200:]) and "\n```" not in text)


class HtmlStage:
    def __init__(self, options: HtmlOptions) -> None:
        self._always = options.detect == "always"
        self._dropped = _DROPPED | (_NAVIGATION if options.drop_navigation else set())

    def __call__(self, page: Page) -> Verdict:
        text, rounds = page.text, 0
        always = self._always and _MARKUP.search(text)
        while rounds < _MAX_ROUNDS and (is_html(text) or (always and not rounds)):
            text = strip_html(text, self._dropped)
            rounds += 1
        if text == page.text:
            return KEEP
        changes = {"stripped": 1}
        if not text:
            return Verdict("", "only markup", "no text is left without the HTML tags", changes)
        return Verdict(text, changes=changes)


def strip_html(text: str, dropped: set[str]) -> str:
    """The visible text: a blank line between paragraphs, white space kept inside <pre>.

    Args:
        text: any text, HTML or not.
        dropped: names of elements left out with all they contain.
    """
    parts = "".join(_visible(_MARKS.sub("", text), dropped)).split(_PRE)
    parts = [html.unescape(_LONG_NUMBER.sub("\ufffd", part)) for part in parts]
    for index in range(0, len(parts), 2):  # every second part stood inside <pre>
        flowing = _BREAKS.sub(_line_breaks, " ".join(parts[index].split()))
        parts[index] = flowing.replace(" \n", "\n")
    return "".join(parts).replace(_BREAK, "\n").replace(_GAP, "\n").strip()


def _line_breaks(match: re.Match[str]) -> str:
    return "\n\n" if _GAP in match[0] else "\n"


def _visible(text: str, dropped: set[str]) -> Iterable[str]:
    """Yields pieces of text, and the marks that stand for the tags between them."""
    position, skipped, depth, in_pre = 0, "", 0, False
    while match := _MARKUP.search(text, position):
        if not skipped:
            yield text[position : match.start()]
        comment, slash, name = match.groups()
        if comment:
            end = text.find("-->", match.end())
            position = end + 3 if end >= 0 else len(text)
            continue
        position = _end_of_tag(text, match.end())
        name = (name or "").lower()
        if skipped:
            if name == skipped:
                depth += -1 if slash else 1
                skipped = skipped if depth else ""
            continue
        if name in _RAW and not slash:
            position = _after_raw(text, name, position)
        elif name in dropped and not slash and text[position - 2] != "/":
            skipped, depth = name, 1
        elif name == "pre" and in_pre == bool(slash):
            in_pre = not in_pre
            yield _PRE if slash else _GAP + _PRE
            yield _GAP if slash else ""
        elif name in _PARAGRAPH:
            yield _GAP
        elif name in _LINE:
            yield _BREAK
        elif name in _CELL:
            yield " "
    if not skipped:
        yield text[position:]
    if in_pre:
        yield _PRE


def _end_of_tag(text: str, position: int) -> int:
    """Behind the ">" that ends a tag, past one in quotes; the end of the text if there is none."""
    end = text.find(">", position)
    if end < 0:
        return len(text)
    quote = '"' if text.count('"', position, end) % 2 else ""
    quote = quote or ("'" if text.count("'", position, end) % 2 else "")
    if quote:
        closing = text.find(quote, end, end + _MAX_QUOTED)
        after = text.find(">", closing, closing + _MAX_QUOTED) if closing >= 0 else -1
        end = max(end, after)
    return end + 1


def _after_raw(text: str, name: str, position: int) -> int:
    """Behind the content of a raw element, at its end tag."""
    end = re.compile(f"</{name}", re.IGNORECASE).search(text, position)
    return end.start() if end else len(text)
