"""Gopher's table A1, by examples counted by hand."""

from __future__ import annotations

import random

import pytest

from scalellm.data.clean import Cleaned, Cleaner, CleanOptions
from scalellm.data.clean.options import RepetitionOptions
from scalellm.data.clean.repetition import duplicate_shares, ngram_shares, split_paragraphs

OFF = dict.fromkeys(RepetitionOptions.model_fields, 1.0) | {"enabled": True}


def clean(text: str, **limits: float) -> Cleaned:
    """Cleans with all limits off but these."""
    return Cleaner(CleanOptions.model_validate({"repetition": {**OFF, **limits}})).clean(text)


def shares(words: str) -> dict[int, tuple[float, float]]:
    return {size: (top, duplicate) for size, top, duplicate in ngram_shares(words.split())}


def test_parts_that_stood_before() -> None:
    # 5 parts, 2 stood before; 4 + 4 of 3 + 4 + 4 + 4 + 5 = 20 characters.
    assert duplicate_shares(["one", "same", "same", "same", "other"]) == (2 / 5, 8 / 20)
    assert duplicate_shares([]) == (0.0, 0.0)
    assert split_paragraphs("a\nb\n\n \n c\n\nd") == ["a\nb", "c", "d"]


def test_top_ngrams() -> None:
    # 16 words of one letter; "a b" stands 3 times: 3 x 2 of 16 characters. No 3-gram stands twice.
    found = shares("a b c d a b e f a b g h i j k l")
    assert found[2] == (6 / 16, 0.0)
    assert found[3] == (0.0, 0.0)
    # "aa b c" twice: 2 x 4 characters of 12; of the 2-grams "aa b" (3) and "b c" (2) the longest.
    found = shares("aa b c d aa b c e")
    assert found[2][0] == 6 / 10
    assert found[3][0] == 8 / 10
    assert found[4][0] == 0.0


def test_duplicate_ngrams_count_each_character_once() -> None:
    # Six words twice: the 5-grams at the second occurrence overlap and cover 6 of 13 characters.
    found = shares("a b c d e f X a b c d e f")
    assert found[5] == (0.0, 6 / 13)
    assert found[6] == (0.0, 6 / 13)
    assert found[7] == (0.0, 0.0)
    # The first 5-gram of a run of one word is new, all that follow are not: all but one word.
    assert shares("a a a a a a a a a a")[5][1] == pytest.approx(9 / 10)


def test_ngrams_against_counting_them_plainly() -> None:
    dice = random.Random(7)
    for length in (0, 1, 2, 9, 10, 11, 200):
        for letters in ("ab", "abcdefgh"):
            words = [dice.choice(letters) * dice.randint(1, 2) for _ in range(length)]
            found = shares(" ".join(words))
            for size in range(2, 11) if words else ():
                assert found[size] == pytest.approx(plainly(words, size)), (words, size)


def plainly(words: list[str], size: int) -> tuple[float, float]:
    grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    total = sum(map(len, words))
    if size < 5:
        most = max(map(grams.count, grams), default=0)
        longest = max(
            (len("".join(gram)) for gram in grams if grams.count(gram) == most), default=0
        )
        return (min(1.0, most * longest / total) if most > 1 else 0.0), 0.0
    covered = {
        place
        for at, gram in enumerate(grams)
        if gram in grams[:at]
        for place in range(at, at + size)
    }
    return 0.0, sum(len(words[place]) for place in covered) / total


@pytest.mark.parametrize(
    ("text", "setting", "share", "kind"),
    [
        ("x\ny\nx\nz", "max_duplicate_line_share", 1 / 4, "duplicate lines"),
        (
            "xxx\ny\nxxx\nz",
            "max_duplicate_line_character_share",
            3 / 8,
            "characters in duplicate lines",
        ),
        ("x\n\ny\n\nx", "max_duplicate_paragraph_share", 1 / 3, "duplicate paragraphs"),
        (
            "xxx\n\ny\n\nxxx",
            "max_duplicate_paragraph_character_share",
            3 / 7,
            "characters in duplicate paragraphs",
        ),
        ("a b a b c d", "max_top_2_gram_share", 4 / 6, "top 2-gram"),
        ("a b c a b c d e", "max_top_3_gram_share", 6 / 8, "top 3-gram"),
        ("a b c d e a b c d f", "max_top_4_gram_share", 8 / 10, "top 4-gram"),
        *(
            (
                " ".join([*"abcdefghij"[:size], "X", *"abcdefghij"[:size]]),
                f"max_duplicate_{size}_gram_share",
                size / (2 * size + 1),
                f"duplicate {size}-grams",
            )
            for size in range(5, 11)
        ),
    ],
)
def test_each_limit_holds(text: str, setting: str, share: float, kind: str) -> None:
    assert clean(text, **{setting: share - 0.001}).kind == kind
    assert clean(text, **{setting: share}).kind == ""


def test_the_reason_has_both_numbers() -> None:
    cleaned = clean("ab ba ab ba c d e f g h i j k l", max_top_2_gram_share=0.2)
    assert cleaned.reason == "top 2-gram is 44.4% of the characters, the limit is 20%"


def test_the_limits_are_gophers() -> None:
    options = CleanOptions().repetition
    table = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    for size, limit in table.items():
        word = "top" if size < 5 else "duplicate"
        assert getattr(options, f"max_{word}_{size}_gram_share") == limit
    assert options.max_duplicate_line_share == options.max_duplicate_paragraph_share == 0.30
    assert options.max_duplicate_line_character_share == 0.20
    assert options.max_duplicate_paragraph_character_share == 0.20


def test_a_menu_is_removed_and_prose_is_not() -> None:
    cleaner = Cleaner(CleanOptions.model_validate({"repetition": {"enabled": True}}))
    assert cleaner.clean("Buy now and save\n" * 20).removed_by == "repetition"
    prose = (
        "The library opened in spring and soon became the heart of our town. Children learn to "
        "read in its bright rooms, while parents drink tea downstairs. An old stove is lit."
    )
    assert cleaner.clean(prose).text == prose
    chinese = "请点击这里购买。优惠多多。" * 20
    assert cleaner.clean(chinese).removed_by == "repetition"
