# ruff: noqa: RUF001
"""Placeholders for persons' data, and what only looks like it."""

from __future__ import annotations

import pytest

from scalellm.data.clean import Cleaner, CleanOptions
from scalellm.data.clean.numbers import luhn

CLEANER = Cleaner(CleanOptions.model_validate({"pii": {"enabled": True}}))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Write to anna.k+x@mail.example.co.uk.", "Write to <EMAIL>."),
        ("<jörg.müller@firma.de>", "<<EMAIL>>"),
        ("'max@web.de', ok", "'<EMAIL>', ok"),
        ("请联系info@firma.cn谢谢", "请联系<EMAIL>谢谢"),
        ("Call +49 30 901820 today", "Call <PHONE> today"),
        ("+44 (0)20 8366 1177", "<PHONE>"),
        ("Phone: (718) 555-1816.", "Phone: <PHONE>."),
        ("718-555-1816 or 718.555.1816", "<PHONE> or <PHONE>"),
        ("Tel.: 030/901820", "Tel.: <PHONE>"),
        ("тел. 8 495 123-45-67", "тел. <PHONE>"),
        ("电话：13800138000。", "电话：<PHONE>。"),
        ("from 81.2.69.142:8080 on", "from <IP>:8080 on"),
        ("[2001:4860:4860::8844]", "[<IP>]"),
        ("card 4111 1111 1111 1111, 378282246310005", "card <CARD>, <CARD>"),
        ("5555-5555-5555-4444", "<CARD>"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN <IBAN> BIC COBADEFF"),
        ("GB29NWBK60161331926819", "<IBAN>"),
        ("DNI 12345678Z", "DNI <ID>"),
        ("CPF 111.444.777-35", "CPF <ID>"),
        ("身份证11010519491231002X。", "身份证<ID>。"),
        ("服务器81.2.69.142在线", "服务器<IP>在线"),
        ("RSSMRA85T10A562S", "<ID>"),
        ("SSN 536-90-4399", "SSN <ID>"),
        ("NHS number 943 476 5919", "NHS number <ID>"),
        ("PESEL: 44051401359", "PESEL: <ID>"),
        ("ip 81.2.69.142 4111 1111 1111 1111", "ip <IP> <CARD>"),
    ],
)
def test_is_replaced(text: str, cleaned: str) -> None:
    assert CLEANER.clean(text).text == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # wrong check digit
        "IBAN DE89 3704 0044 0532 0130 01",
        "DNI 12345678A",
        "CPF 111.444.777-36",
        "11010519491231002Y 110105194912310021",
        "943 476 5919",  # right, but nothing says what it is
        "192.168.0.1 10.0.0.1 127.0.0.1 172.16.9.9 192.0.2.44 198.51.100.17 203.0.113.99 0.0.0.0",
        "fe80::1 2001:db8::1 ::1 fd00::12",
        "v10.20.30.40, version 10.20.30.40, numpy==10.20.30.40, section 1.2.3.14",
        "std::ab::cd(ef::ab) dead::beef",
        "255.255.255.0 300.1.1.300 1.2.3.4.5.6 1.3.6.1.4.1.311",
        "2024-01-15 10:20:30, 20240115T102030Z, 1700000000, 1700000000123",
        "ISBN 978-3-16-148410-0, ISSN 2049-3630",
        "550e8400-e29b-41d4-a716-446655440000",
        "3.14159265358979323846 and 0.4111111111111111",
        "1234 5678 9012 3456 7890 1234",
        "4111 1111 1111 1111 4111",
        "logo@2x.png lodash@4.17.js a@b @decorator user@localhost x @ y",
        "git@github.com:group/project.git",
        "255 250 250\t\tsnow\n240 255 240\t\thoneydew",
        "5+12345678901 and 2+3=5",
    ],
)
def test_stays(text: str) -> None:
    cleaned = CLEANER.clean(text)
    assert cleaned.text == text
    assert cleaned.changes == {}


def test_counts_by_kind() -> None:
    text = "a@b.org, c@d.org, 81.2.69.142, +49 30 901820, 4111111111111111, GB29NWBK60161331926819"
    assert CLEANER.clean(text).changes == {
        "pii.email": 2,
        "pii.ip": 1,
        "pii.phone": 1,
        "pii.card": 1,
        "pii.iban": 1,
    }


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "a@b.org"),
        ("phone", "+49 30 901820"),
        ("ip", "81.2.69.142"),
        ("card", "4111111111111111"),
        ("iban", "GB29NWBK60161331926819"),
        ("national_id", "12345678Z"),
    ],
)
def test_each_kind_has_a_switch(kind: str, text: str) -> None:
    assert CLEANER.clean(text).changes == {f"pii.{kind}": 1}
    off = Cleaner(CleanOptions.model_validate({"pii": {"enabled": True, kind: False}}))
    assert off.clean(text).text == text


def test_luhn() -> None:
    # 1, 8, 3, 2, 9 doubled give 28; 7 + 9 + 7 + 9 + 7 = 39: 67, and 3 makes it 70.
    assert [digit for digit in "0123456789" if luhn("7992739871" + digit)] == ["3"]
