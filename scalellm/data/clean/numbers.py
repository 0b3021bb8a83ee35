"""Numbers that identify a person or an account: shapes, and the check digits that confirm them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scalellm.data.clean.page import library

# What may not touch a number: letters of scripts with spaces. Chinese text runs into its numbers.
WORD = r"0-9A-Za-z_\u00c0-\u024f\u0370-\u052f"
# Where a run of digits begins: scanned fast, since most texts have few of them.
_DIGIT_RUN = re.compile(rf"[0-9](?<![{WORD}][0-9])(?:[ .\-/()\u00a0]{{0,2}}[0-9]){{6,}}")
_LETTER_RUN = re.compile(rf"[A-Z](?<![{WORD}][A-Z])[A-Z]{{0,5}}[0-9]{{2}}[0-9A-Z ]{{4,40}}")
# A shape may take a letter and its separator behind the run; one more to see where it ends.
_BEYOND = 4
_BEFORE = rf"(?<![{WORD}.])(?<![0-9][ \-/])"
_AFTER = rf"(?![ \-/.]?[0-9])(?![{WORD}])"

_CARD = re.compile(
    f"{_BEFORE}(?:[0-9]{{4}}([ -]?)[0-9]{{4}}\\1[0-9]{{4}}\\1[0-9]{{4}}(?:\\1[0-9]{{3}})?"
    f"|3[47][0-9]{{2}}([ -]?)[0-9]{{6}}\\2[0-9]{{5}}|3[0689][0-9]{{12}}){_AFTER}"
)
_ISSUER = re.compile("2[2-7]|3[04-9]|[456]")
_IBAN = re.compile(
    rf"(?<![{WORD}])[A-Z]{{2}}[0-9]{{2}}(?: ?[0-9A-Z]{{4}}){{2,7}}(?: ?[0-9A-Z]{{1,3}})?"
    rf"(?![{WORD}])"
)
_COUNTRY_CODE = (
    "1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-689][0-9]|3[578][0-9]|42[0-9]"
    "|5[09][0-9]|6[789][0-9]|8[0578][0-9]|9[679][0-9]"
)
_INTERNATIONAL = re.compile(
    rf"(?<![{WORD}+])\+(?:{_COUNTRY_CODE})(?:[ .\-/\u00a0]?\(?[0-9]{{1,12}}\)?){{1,6}}(?![{WORD}])"
)
_NORTH_AMERICAN = re.compile(
    rf"{_BEFORE}(?:1[ .-])?(?:\([2-9][0-9]{{2}}\) ?|[2-9][0-9]{{2}}[ .-])[2-9][0-9]{{2}}[.-]"
    rf"[0-9]{{4}}{_AFTER}"
)
_ANNOUNCED = re.compile(
    r"(?:\b(?:tel|phone|telephone|telefon|telefax|fax|mobile|mobil|cell|handy|call|whatsapp|tél"
    r"|téléphone|teléfono|telefono|móvil|telefone|celular|тел|телефон)|電話|电话|手机|전화)"
    r"(?: ?(?:number|no|nr|us|us at|at))?[.:\uff1a]{0,2}\Z",
    re.IGNORECASE,
)


class Found(NamedTuple):
    start: int
    end: int
    kind: str


class _Identity(NamedTuple):
    """An identity number: its shape, its module of python-stdnum, and words that announce it.

    Without words the shape is rare or the check strong; a lone check digit is right for one table
    cell in ten, so the others count only behind one of their words.
    """

    shape: str
    module: str
    words: str = ""


_IDENTITIES = (
    _Identity(r"[0-9]{8}[- ]?[A-Z]", "es.dni"),
    _Identity(r"[XYZ]-?[0-9]{7}-?[A-Z]", "es.nie"),
    _Identity(r"[A-Z]{6}[0-9]{2}[A-Z][0-9]{2}[A-Z][0-9]{3}[A-Z]", "it.codicefiscale"),
    _Identity(r"[A-Z]{4}[0-9]{6}[HM][A-Z]{5}[0-9A-Z][0-9]", "mx.curp"),
    _Identity(r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}", "fr.nir"),
    _Identity(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", "br.cpf"),
    _Identity(r"[0-9]{17}[0-9X]", "cn.ric"),
    _Identity(r"[0-9]{6}[-+][0-9]{4}", "se.personnummer"),
    _Identity(r"[0-9]{6}[-+A][0-9]{3}[0-9A-Y]", "fi.hetu"),
    _Identity(r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}", "be.nn"),
    _Identity(r"[0-9]{6}-[1-8][0-9]{6}", "kr.rrn"),
    _Identity(r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9K]", "cl.rut"),
    _Identity(r"756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}", "ch.ssn"),
    _Identity(r"[0-9]{3}-[0-9]{2}-[0-9]{4}", "us.ssn", "ssn|social security"),
    _Identity(r"[0-9]{3}[- ]?[0-9]{3}[- ]?[0-9]{3}", "ca.sin", r"\bsin\b|social insurance"),
    _Identity(r"[0-9]{3} ?[0-9]{3} ?[0-9]{4}", "gb.nhs", "nhs"),
    _Identity(r"[0-9]{4} ?[0-9]{4} ?[0-9]{4}", "in_.aadhaar", "aadhaar|आधार"),
    _Identity(r"[0-9]{6} ?[0-9]{5}", "no.fodselsnummer", "fødsels|personnummer"),
    _Identity(r"[0-9]{11}", "tr.tckimlik", "kimlik|tckn"),
    _Identity(r"[0-9]{11}", "pl.pesel", "pesel"),
    _Identity(r"[0-9]{9}", "nl.bsn", r"\bbsn\b|burgerservice"),
    _Identity(r"[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", "de.idnr", r"steuer|\bidnr|\btin\b"),
)
# One look decides for most windows: none of the shapes.
_ANY_IDENTITY = re.compile(f"{_BEFORE}(?:{'|'.join(one.shape for one in _IDENTITIES)}){_AFTER}")
_WORDS_CHARACTERS = 40


def find_numbers(text: str, kinds: frozenset[str]) -> Iterator[Found]:
    """Yields the numbers of the wanted kinds, in order, without overlaps.

    Args:
        text: any text.
        kinds: of "iban", "national_id", "card", "phone".
    """
    end = 0
    for window in _windows(text):
        found = [
            one for finder in _FINDERS if finder[0] in kinds for one in finder[1](text, window)
        ]
        # Where two kinds claim a place, the order of `_FINDERS` decides (`sorted` is stable).
        for one in sorted(found, key=lambda one: one.start):
            if one.start >= end:
                yield one
                end = one.end


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Places that hold a number of seven digits or more, with a few characters around."""
    runs = [match.span() for match in _DIGIT_RUN.finditer(text)]
    runs += [match.span() for match in _LETTER_RUN.finditer(text)]
    end = 0
    for start, stop in sorted(runs):
        if stop > end:
            # "+(", "X-": what may stand before the first digit. Never back into the last window.
            yield max(end, start - 2), min(len(text), stop + _BEYOND)
            end = stop


def _cards(text: str, window: tuple[int, int]) -> Iterator[Found]:
    for match in _CARD.finditer(text, *window):
        digits = re.sub("[ -]", "", match[0])
        if _ISSUER.match(digits) and luhn(digits):
            yield Found(*match.span(), "card")


def luhn(digits: str) -> bool:
    """Whether the last digit confirms the others (ISO/IEC 7812)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _ibans(text: str, window: tuple[int, int]) -> Iterator[Found]:
    for match in _IBAN.finditer(text, *window):
        # A word in capitals may follow the number: give it back group by group.
        candidate = match[0]
        while len(candidate) >= 15:
            if _is_iban(candidate.replace(" ", "")):
                yield Found(match.start(), match.start() + len(candidate), "iban")
                break
            candidate = candidate.rpartition(" ")[0]


def _is_iban(number: str) -> bool:
    """ISO 13616: 15 to 34 characters, the remainder by 97 is 1."""
    if not 15 <= len(number) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in number[4:] + number[:4])) % 97 == 1


def _identities(text: str, window: tuple[int, int]) -> Iterator[Found]:
    if not _ANY_IDENTITY.search(text, *window):
        return
    for identity in _IDENTITIES:
        # `re.compile` keeps what it compiled.
        for match in re.compile(f"{_BEFORE}{identity.shape}{_AFTER}").finditer(text, *window):
            before = text[max(0, match.start() - _WORDS_CHARACTERS) : match.start()]
            if identity.words and not re.search(identity.words, before, re.IGNORECASE):
                continue
            module = library(f"stdnum.{identity.module}", "python-stdnum", "pii.national_id")
            if module.is_valid(match[0]):
                yield Found(*match.span(), "national_id")


def _phones(text: str, window: tuple[int, int]) -> Iterator[Found]:
    if text.find("+", *window) >= 0:
        for match in _INTERNATIONAL.finditer(text, *window):
            if 8 <= sum(map(str.isdigit, match[0])) <= 15:
                yield Found(*match.span(), "phone")
    for match in _NORTH_AMERICAN.finditer(text, *window):
        yield Found(*match.span(), "phone")
    run = _DIGIT_RUN.search(text, *window)
    if run and sum(map(str.isdigit, run[0])) <= 15 and _is_announced(text, run.start()):
        start = run.start()
        while start and text[start - 1] in "+(":
            start -= 1
        yield Found(start, run.end(), "phone")


def _is_announced(text: str, start: int) -> bool:
    """Whether "Tel." or the like stands before."""
    before = text[max(0, start - _WORDS_CHARACTERS) : start].rstrip(" \t+(")
    is_possible = before and (before[-1] in ".:\uff1a" or before[-1].isalpha())
    return bool(is_possible and _ANNOUNCED.search(before))


_Finder = Callable[[str, tuple[int, int]], Iterator[Found]]
_FINDERS: tuple[tuple[str, _Finder], ...] = (
    ("iban", _ibans),
    ("national_id", _identities),
    ("card", _cards),
    ("phone", _phones),
)
