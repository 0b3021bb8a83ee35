"""Placeholders for what identifies a person; what only looks like it stays."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from scalellm.data.clean.numbers import WORD, Found, find_numbers
from scalellm.data.clean.options import PiiOptions
from scalellm.data.clean.page import KEEP, Page, Verdict, library

PLACEHOLDERS = {
    "email": "<EMAIL>",
    "phone": "<PHONE>",
    "ip": "<IP>",
    "card": "<CARD>",
    "iban": "<IBAN>",
    "national_id": "<ID>",
}
# Searched from the "@" on: it is rare, and a search from the first letter would be quadratic.
_LETTER = "A-Za-z0-9À-ÖØ-öø-\u017f"
_DOMAIN = re.compile(
    rf"@((?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.){{1,8}})([A-Za-z]{{2,24}})"
    rf"(?![{_LETTER}_-])"
)
_LOCAL = re.compile(rf"[{_LETTER}.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}\Z")
# `logo@2x.png`, `lodash@4.min.js`: no country or registry ends so.
_FILE_ENDS = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "mjs", "html"})
_IPV4 = re.compile(
    rf"[0-9](?<![{WORD}.+-][0-9])[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}}(?![{WORD}]|\.[0-9]|-[0-9A-Za-z])"
)
_VERSION = re.compile(
    r"(?:(?:version|release|\bver|\bv|\brev)[.:]? ?[\"']?|[=~<>!]=)\Z", re.IGNORECASE
)
# Global unicast only, 2000::/3; "ab::cd" is C++.
_IPV6 = re.compile(
    rf"[23](?<![{WORD}:.][23])[0-9A-Fa-f]{{3}}:(?:[0-9A-Fa-f]{{0,4}}:){{1,6}}[0-9A-Fa-f]{{0,4}}(?![{WORD}:])"
)
# A placeholder may uncover what stood too close to another number.
_MAX_ROUNDS = 8


class PiiStage:
    def __init__(self, options: PiiOptions) -> None:
        self._kinds = frozenset(kind for kind in PLACEHOLDERS if getattr(options, kind))
        if options.national_id:
            library("stdnum", "python-stdnum", "pii.national_id")

    def __call__(self, page: Page) -> Verdict:
        text, changes = page.text, dict[str, int]()
        for _ in range(_MAX_ROUNDS):
            before = text
            if "email" in self._kinds and "@" in text:
                text = _replace(text, _emails(text), changes)
            text = _replace(text, find_numbers(text, self._kinds), changes)
            if "ip" in self._kinds:
                text = _replace(text, _addresses(text, _IPV4), changes)
                text = _replace(text, _addresses(text, _IPV6), changes)
            if text == before:
                break
        return Verdict(text, changes=changes) if changes else KEEP


def _replace(text: str, found: Iterable[Found], changes: dict[str, int]) -> str:
    pieces, end = [], 0
    for start, stop, kind in found:
        pieces += [text[end:start], PLACEHOLDERS[kind]]
        end = stop
        changes[kind] = changes.get(kind, 0) + 1
    return "".join([*pieces, text[end:]]) if pieces else text


def _emails(text: str) -> Iterable[Found]:
    end = 0
    for match in _DOMAIN.finditer(text):
        if match[2].lower() in _FILE_ENDS:
            continue
        local = _LOCAL.search(text, max(end, match.start() - 64), match.start())
        if not local or _is_no_person(local[0], text, match.end()):
            continue
        # Quotes and dots around an address are not part of it.
        start = match.start() - len(local[0].lstrip(".'`*/=|{!?&#"))
        if start < match.start():
            end = match.end()
            yield Found(start, end, "email")


def _is_no_person(local: str, text: str, end: int) -> bool:
    """`git@host:group/project` names a repository."""
    return local == "git" and text[end : end + 1] in (":", "/")


def _addresses(text: str, shape: re.Pattern[str]) -> Iterable[Found]:
    for match in shape.finditer(text):
        if _is_personal(match[0]) and not _VERSION.search(
            text[max(0, match.start() - 12) : match.start()]
        ):
            yield Found(*match.span(), "ip")


def _is_personal(address: str) -> bool:
    """A global address; an IPv4 one of small numbers is a version, a section, a public resolver."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 4 and sum(part >= 10 for part in ip.packed) < 2:
        return False
    return ip.is_global and not ip.is_multicast
