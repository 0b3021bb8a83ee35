# ruff: noqa: RUF001
"""Encoding, HTML, lines, length, symbols, language: what each removes, mends and leaves alone."""

from __future__ import annotations

import inspect
import sysconfig
from pathlib import Path

import pytest

from scalellm.data.clean import Cleaned, Cleaner, CleanOptions
from scalellm.errors import ConfigError, UserError

ENGLISH = (
    "The library opened in the spring of 1921, and it has been the heart of the town to this day. "
    "Children learn to read in its bright rooms. Their parents come with them and stay for hours. "
    "In winter the old stove is lit, which is what most people remember of their first visit."
)
GERMAN = (
    "Die Bücherei wurde im Frühling 1921 eröffnet und ist bis heute das Herz der kleinen Stadt. "
    "Kinder lernen hier das Lesen. Ihre Eltern kommen mit und bleiben für ein paar Stunden."
)
CHINESE = (
    "这座图书馆于一九二一年春天开放，至今仍是小镇的中心。孩子们在明亮的房间里学习阅读。"
    "他们的父母也会一起来，常常待上几个小时。冬天的时候，老炉子会点起来，这是大多数人最难忘的事。"
    "图书馆的书大多是居民捐赠的，每一本书的第一页都写着捐赠者的名字和日期，读者可以免费借阅。"
)
RUSSIAN = (
    "Библиотека открылась весной 1921 года и до сих пор остаётся сердцем города. Дети учатся здесь "
    "читать. Их родители приходят вместе с ними и остаются на несколько часов."
)
THAI = "ห้องสมุดเปิดในฤดูใบไม้ผลิและเป็นหัวใจของเมืองเล็กๆ จนถึงวันนี้ เด็กๆ เรียนรู้การอ่านในห้องที่สว่างไสว"


def clean(text: str, **stages: dict[str, object]) -> Cleaned:
    chosen = {stage: {"enabled": True, **values} for stage, values in stages.items()}
    return Cleaner(CleanOptions.model_validate(chosen)).clean(text)


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, CHINESE, RUSSIAN, THAI, "a\tb\n\f\nπ ≠ ∞ 😀"])
def test_sound_characters_stay(text: str) -> None:
    assert clean(text, encoding={}) == Cleaned(text)


@pytest.mark.parametrize(
    ("text", "mended", "change"),
    [
        ("Der FrÃ¼hling lÃ¤sst sein blaues Band", "Der Frühling lässt sein blaues Band", "mended"),
        ("Itâ€™s fine", "It's fine", "mended"),
        ("nul\x00 and \x1b[31mred\x1b[0m", "nul and red", "control"),
        ("\ufeffone\r\ntwo\rthree", "one\ntwo\nthree", "line_ends"),
        ("cafe\u0301", "café", "normalized"),
        ("\ud83d\ude00!", "😀!", "surrogates"),
        ("Z" + "\u0301\u0316" * 500, None, "marks"),
    ],
)
def test_broken_characters_are_mended(text: str, mended: str | None, change: str) -> None:
    cleaned = clean(text, encoding={})
    assert f"encoding.{change}" in cleaned.changes
    assert cleaned.text is not None
    if mended is None:
        assert len(cleaned.text) <= 31
    else:
        assert cleaned.text.replace("’", "'") == mended


def test_rare_letters_are_no_run_of_marks() -> None:
    bold = "\U0001d400\U0001d401" * 40
    assert clean(bold, encoding={}).text == bold
    musical = "a" + "\U0001d165\U0001d16d" * 40
    assert clean(musical, encoding={}).changes["encoding.marks"] == 1


def test_unreadable_texts_are_removed() -> None:
    assert clean("\ufffd" + "a" * 99, encoding={}).text is not None
    cleaned = clean("\ufffd" * 2 + "a" * 98, encoding={})
    assert cleaned.text is None
    assert cleaned.removed_by == "encoding"
    assert "2% of the characters" in cleaned.reason
    assert "1%" in cleaned.reason
    lone = clean("\ud800" * 5, encoding={})
    assert lone.kind == "unreadable characters"


PAGE = """<!DOCTYPE html>
<html><head><title>Town</title><style>p > a { color: red }</style></head>
<body><nav><a href="/">Home</a></nav><!-- <p>hidden</p> -->
<h1>The   library &amp; the town</h1><p>It opened in <b>1921</b>.<p title="a > b">Second
paragraph.<br/>New line<script>if (a<b) { document.write("<p>no</p>") }</script></p>
<ul><li>one<li>two</ul><pre>def f(x):
    return x &lt; 1</pre><svg><text>no</text></svg>
<table><tr><td>a</td><td>b</td></tr></table><footer>Imprint</footer></body></html>"""


def test_html_becomes_text() -> None:
    cleaned = clean(PAGE, html={})
    assert cleaned.changes == {"html.stripped": 1}
    assert cleaned.text == (
        "The library & the town\n\nIt opened in 1921.\n\nSecond paragraph.\nNew line\n\none\ntwo"
        "\n\ndef f(x):\n    return x < 1\n\na b"
    )
    assert "Home" in str(clean(PAGE, html={"drop_navigation": False}).text)
    assert clean("<p>x</p><p>y &eacute;&#233;</p>", html={}).text == "x\n\ny éé"


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: print('<p>')",
        "#include <stdio.h>\nint main() { return 1 << 3; }",
        "<?xml version='1.0'?>\n<svg><path/></svg>",
        "<h1 align='center'>Tool</h1>\n\nA README in Markdown with AT&amp;T.\n",
        "<p>Tool</p>\n\n```html\n<p>x</p>\n```\n\n<p>end</p>",
        "I <3 you, <b>really</b>",
        "vector<int> v; // <html>",
        "<T extends Object> void f() {}",
    ],
)
def test_what_is_no_html_stays(text: str) -> None:
    assert clean(text, html={}) == Cleaned(text)


def test_source_files_are_no_html() -> None:
    import html.parser
    import http.server

    for module in (html.parser, http.server, html):
        source = inspect.getsource(module)
        assert clean(source, html={}).text == source
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        source = path.read_text(encoding="utf-8", errors="replace")
        assert clean(source, html={}).text == source


def test_html_without_text_and_html_by_order() -> None:
    cleaned = clean("<html><script>x()</script></html>", html={})
    assert (cleaned.text, cleaned.removed_by, cleaned.kind) == (None, "html", "only markup")
    assert clean("so <b>bold</b> it is", html={"detect": "always"}).text == "so bold it is"
    assert clean("two\nlines", html={"detect": "always"}).text == "two\nlines"


LINES = """Home
This is the first line of the story, and it ends well.
Please enable JavaScript in your browser to see this page.
We use cookies to give you the best experience.
Lorem ipsum dolor sit amet, consectetur adipiscing elit.

Read more about the story...
The story goes on here. "It is a good one," he said."""


def test_scraps_of_a_page_are_dropped() -> None:
    cleaned = clean(LINES, lines={})
    assert cleaned.text == (
        "This is the first line of the story, and it ends well.\n\n"
        'The story goes on here. "It is a good one," he said.'
    )
    assert cleaned.changes == {"lines.dropped": 5}


@pytest.mark.parametrize(
    ("switch", "line"),
    [
        ({"min_words": 0}, "Fin."),
        ({"end_punctuation": False}, "Read more about the story..."),
        ({"drop_javascript": False}, "Please enable JavaScript in your browser."),
        ({"drop_cookies": False}, "We use cookies to give you the best experience."),
        ({"drop_lorem_ipsum": False}, "Lorem ipsum dolor sit amet."),
    ],
)
def test_each_rule_for_lines_has_a_switch(switch: dict[str, object], line: str) -> None:
    text = f"{line}\nOne two three. Four five six. Seven eight nine."
    dropped = clean(text, lines={})
    assert dropped.text == "One two three. Four five six. Seven eight nine."
    assert clean(text, lines=switch).text == text


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, CHINESE, RUSSIAN, THAI])
def test_prose_of_any_script_keeps_its_lines(text: str) -> None:
    assert clean(text, lines={}) == Cleaned(text)


def test_prose_on_javascript_stays() -> None:
    text = "JavaScript was made in ten days. It is in use to this day. Many write it with pleasure."
    assert clean(text, lines={}).text == text


def test_too_few_and_too_long_lines() -> None:
    assert clean("Only one sentence is here.", lines={}).kind == "too few sentences"
    assert clean("menu\nhome\n", lines={"min_sentences": 0}).kind == "too few lines"
    blob = "x = 1\n" + "y" * 1001
    cleaned = Cleaner(CleanOptions(preset="code")).clean(blob)
    assert cleaned.reason == "has a line of 1,001 characters, the limit is 1,000"
    mean = clean("a" * 101 + "\n" + "b" * 101, lines={"max_mean_line_characters": 100})
    assert mean.reason == "its lines have 101 characters on average, the limit is 100"


def test_length() -> None:
    assert clean("word " * 50, length={}).text == "word " * 50
    assert clean("word " * 49, length={}).reason == "has 49 words, the least is 50"
    assert clean("word " * 100_001, length={}).kind == "too many words"
    assert clean("ab " * 60, length={}).kind == "words too short"
    assert clean(("b" * 11 + " ") * 60, length={}).kind == "words too long"
    assert clean("ab", length={"min_characters": 3}).kind == "too few characters"
    assert clean("ab", length={"min_words": 0, "max_characters": 1}).kind == "too many characters"


@pytest.mark.parametrize("text", [CHINESE, THAI * 2])
def test_scripts_without_spaces_have_words(text: str) -> None:
    stages: dict[str, dict[str, object]] = {"length": {}, "symbols": {}, "repetition": {}}
    assert len(text.split()) < 50
    if text == CHINESE:
        assert clean(text, **stages).text == text
    assert clean(text, length={}).text == text
    assert clean(text[:60], length={}).kind == "too few words"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (ENGLISH, ""),
        (GERMAN, ""),
        (RUSSIAN, ""),
        ("the # and # of " * 10, "too many #"),
        ("the wind ... and the rain of … " * 5, "too many ellipses"),
        ("- the cat and dog\n" * 10, "lines begin with a bullet"),
        ("the cat sat in and of the house with a friend of his ...\n" * 5, "lines end with an ell"),
        ("the and of 12 34 56 78 90 11", "too few words with letters"),
        ("Kupfer Eisen Zink Silber Gold Blei Zinn", "too few stop words"),
        ("", ""),
    ],
)
def test_symbols(text: str, kind: str) -> None:
    cleaned = clean(text, symbols={})
    assert cleaned.kind.startswith(kind)
    assert (cleaned.text is None) == bool(kind)


@pytest.mark.parametrize(
    ("text", "wanted", "stays"),
    [
        (ENGLISH, ["en"], True),
        (GERMAN, ["en"], False),
        (GERMAN, ["en", "de"], True),
        (CHINESE, ["zh"], True),
        (CHINESE, ["en", "de"], False),
        (RUSSIAN, ["ru"], True),
        (RUSSIAN, [], True),
        ("12345 67890 12", ["en"], True),
    ],
)
def test_language(text: str, wanted: list[str], stays: bool) -> None:
    cleaned = clean(text, language={"languages": wanted})
    assert (cleaned.text == text) == stays
    assert (cleaned.removed_by == "language") != stays


def test_long_texts_vote_in_pieces() -> None:
    text = ENGLISH * 12 + GERMAN * 8
    half = clean(text, language={"languages": ["de"], "min_share": 0.2})
    assert half.text == text
    most = clean(text, language={"languages": ["de"], "min_share": 0.8})
    assert most.kind == "language en"
    assert "of the text is in de (most is en), the least is 80%" in most.reason


def test_language_codes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"'english' is no ISO 639 code"):
        clean("x", language={"languages": ["english"]})
    # YAML's `no`, which is Norwegian here.
    options = CleanOptions.model_validate({"language": {"languages": [False, "de"]}})
    assert options.language.languages == ("no", "de")


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("ftfy", {"encoding": {}}),
        ("py3langid.langid", {"language": {"languages": ["en"]}}),
        ("stdnum", {"pii": {}}),
    ],
)
def test_a_missing_package_is_one_sentence(
    module: str, stages: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalellm.data.clean import language

    language._identifier.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'scalellm\[clean\]'"):
        clean("x", **stages)
