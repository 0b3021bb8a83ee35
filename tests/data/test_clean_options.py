"""Options of cleaning: presets, files, overrides, mistakes, and processes that agree."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.data.clean import Cleaned, Cleaner, CleanOptions, load_clean_options
from scalellm.data.clean.options import STAGES
from scalellm.errors import ConfigError


def enabled(options: CleanOptions) -> list[str]:
    return [stage for stage in STAGES if getattr(options, stage).enabled]


def test_presets() -> None:
    assert enabled(load_clean_options("none")) == []
    assert enabled(load_clean_options("light")) == ["encoding", "length"]
    assert enabled(load_clean_options("web")) == list(STAGES)
    assert enabled(load_clean_options("code")) == ["encoding", "lines", "length", "pii"]
    assert Cleaner(load_clean_options("none")).clean("<p>\x00") == Cleaned("<p>\x00")


def test_overrides_win() -> None:
    options = load_clean_options(
        "web", ["repetition.enabled=false", "language.languages=[en, de]", "length.max_words=null"]
    )
    assert "repetition" not in enabled(options)
    assert options.language.languages == ("en", "de")
    assert options.length.max_words is None
    # The preset holds for what a stage's other keys do not say.
    assert load_clean_options("code", ["lines.max_line_characters=9"]).lines.min_words == 0


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "clean.yaml"
    path.write_text("preset: light\npii: {enabled: true, phone: false}\n", encoding="utf-8")
    options = load_clean_options(str(path), ["pii.ip=false"])
    assert enabled(options) == ["encoding", "length", "pii"]
    assert not options.pii.phone
    assert not options.pii.ip
    assert options.pii.email


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("wep", [], r"neither none, light, web, code nor a YAML file; did you mean 'web'\?"),
        ("missing.yaml", [], "no config file at"),
        ("web", ["repetitions.enabled=false"], r"unknown key .*did you mean 'repetition'\?"),
        ("web", ["pii.emails=false"], r"unknown key pii.emails; did you mean 'email'\?"),
        ("web", ["length.min_words=-1"], r"length.min_words=-1 words is out of range: .* least 0"),
        ("web", ["encoding.max_replacement_share=20"], "out of range: it must be at most 1"),
        ("web", ["html=true"], "html=True is a value, but html is a section of keys|html takes no"),
        ("none", ["preset=wbe"], "none of none, light, web or code; did you mean 'web'"),
    ],
)
def test_mistakes_are_one_sentence(name: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_clean_options(name, overrides)
    assert "\n" not in str(caught.value)


HARD = [
    "",
    "\x00",
    "\ud800\udc00 \udfff<p>",
    "a" * 300_000,
    "\u0301\u0316" * 50_000,
    "<div>" * 50_000,
    "<a href='" * 30_000,
    "<html>&#" + "9" * 5000 + ";</html>",
    "<html>" + "&amp;" * 50_000,
    "1" * 200_000,
    "1 2-3." * 40_000,
    "a@" * 100_000,
    "a@b." * 50_000,
    "." * 200_000 + "x",
    "DE89 " * 40_000,
    "Ã¼" * 20_000,
    "<!--" * 50_000,
    "中" * 100_000,
    "²²²² ①②③④⑤⑥⑦⑧ ١٢٣٤٥٦٧٨",
]


@pytest.mark.parametrize("text", HARD, ids=[repr(text[:12]) for text in HARD])
@pytest.mark.parametrize("stage", STAGES)
def test_hostile_texts_never_raise(text: str, stage: str) -> None:
    values: dict[str, object] = {"enabled": True}
    if stage == "language":
        values["languages"] = ["en"]
    if stage == "lines":
        values |= {"min_words": 0, "end_punctuation": False}
    cleaned = Cleaner(CleanOptions.model_validate({stage: values})).clean(text)
    assert (cleaned.text is None) == bool(cleaned.removed_by) == bool(cleaned.reason)
    assert all(len(example) <= 160 for example in cleaned.examples.values())


SCRAPS = st.sampled_from(
    [
        *("a@b.org", "4111 1111 1111 1111", "81.2.69.142", "+49 30 901820", "12345678Z", "-", "4"),
        *(
            "<p>",
            "</p>",
            "<html>",
            "&lt;",
            "&amp;",
            "<pre>",
            "</pre>",
            "<script>",
            "<br>",
            "\n",
            " ",
        ),
        *("GB29NWBK60161331926819", "Tel. ", ".", "One two three.", "menu", "Ã¼", "\u0301", "\r"),
        *(
            "javascript enable. ",
            "中文。",
            "\x01",
            '"',
            "'",
            ">",
            "@",
            "<!--",
            "-->",
            "\n\n",
            "\ud800",
        ),
    ]
)
TEXTS = st.lists(SCRAPS | st.text(max_size=5), max_size=20).map("".join)
CLEANERS = {
    stage: Cleaner(CleanOptions.model_validate({stage: values}))
    for stage, values in {
        "pii": {"enabled": True},
        "html": {"enabled": True},
        "lines": {"enabled": True, "min_sentences": 0, "min_lines": 0},
    }.items()
}
WEB = Cleaner(load_clean_options("web", ["language.languages=[en]", "lines.min_sentences=0"]))


@pytest.mark.parametrize("stage", CLEANERS)
@given(text=TEXTS)
def test_a_second_cleaning_changes_nothing(stage: str, text: str) -> None:
    once = CLEANERS[stage].clean(text).text
    if once is not None:
        assert CLEANERS[stage].clean(once).text == once


@given(text=TEXTS)
def test_any_text_is_cleaned_or_removed(text: str) -> None:
    cleaned = WEB.clean(text)
    assert cleaned == WEB.clean(text)
    taken = sum(cleaned.characters.values())
    assert len(text) - taken == len(cleaned.text or "")


def test_every_process_gives_the_same() -> None:
    text = "Der FrÃ¼hling. Mail a@b.org and call +49 30 901820. The end of it is here.\n" * 4
    cleaner = pickle.loads(pickle.dumps(WEB))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(cleaner.clean, (text,)) == WEB.clean(text)
