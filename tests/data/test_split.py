"""A split depends on the text alone; none is empty for lack of luck; samples are stable."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.data.split import TRAIN, VALIDATION, TextSample, assign_splits, text_hash

TEXTS = [f"document number {n}\nwith {n * n} words\n" for n in range(2000)]


def splits(texts: list[str], fraction: float, seed: int = 0) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {TRAIN: [], VALIDATION: []}
    for split, text in assign_splits(texts, fraction, seed):
        result[split].append(text)
    return result


@given(
    st.lists(st.text("ab \n", min_size=1).filter(str.strip), max_size=12),
    st.floats(0, 0.99),
    st.integers(0, 3),
)
def test_no_text_is_lost_and_both_splits_have_some(
    texts: list[str], fraction: float, seed: int
) -> None:
    result = splits(texts, fraction, seed)
    assert Counter("".join(result[TRAIN] + result[VALIDATION])) == Counter("".join(texts))
    if len(texts) >= 2 and fraction > 0:
        assert result[TRAIN] and result[VALIDATION]
    if fraction == 0:
        assert result[TRAIN] == texts


@given(st.permutations(TEXTS[:40]), st.sampled_from([0.001, 0.01, 0.1, 0.5, 0.99]))
def test_the_order_of_documents_changes_no_split(texts: list[str], fraction: float) -> None:
    result, expected = splits(texts, fraction), splits(TEXTS[:40], fraction)
    for split in (TRAIN, VALIDATION):
        assert sorted(result[split]) == sorted(expected[split])


def test_the_share_is_about_the_fraction_and_seeds_differ() -> None:
    first, second = splits(TEXTS, 0.1), splits(TEXTS, 0.1, seed=1)
    for result in (first, second):
        assert 140 < len(result[VALIDATION]) < 260
    assert set(first[VALIDATION]) != set(second[VALIDATION])


def test_new_documents_move_no_old_one() -> None:
    few, many = splits(TEXTS[:500], 0.1), splits(TEXTS, 0.1)
    assert set(few[VALIDATION]) <= set(many[VALIDATION])
    assert set(few[TRAIN]) <= set(many[TRAIN])


def test_a_long_text_gives_its_end_from_a_paragraph() -> None:
    paragraphs = [f"paragraph {n} " + "word " * 50 + "\n\n" for n in range(200)]
    text = "".join(paragraphs)
    result = splits([text], 0.05)
    (train,), (validation,) = result[TRAIN], result[VALIDATION]
    assert train + validation == text
    assert validation.startswith("paragraph ")
    assert 0.02 < len(validation) / len(text) < 0.1


@pytest.mark.parametrize("text", ["one line of several words", "没有空格的一行中文", "a\nb", "ab"])
def test_a_single_short_text_is_cut_too(text: str) -> None:
    result = splits([text], 0.01)
    assert len(result[TRAIN]) == len(result[VALIDATION]) == 1
    assert result[TRAIN][0] + result[VALIDATION][0] == text


def test_one_character_stays_in_train() -> None:
    assert splits(["x"], 0.5) == {TRAIN: ["x"], VALIDATION: []}


def test_of_few_documents_the_lowest_position_gives_validation() -> None:
    texts = TEXTS[:5]
    lowest = min(texts, key=lambda text: text_hash(text)[0])
    fraction = text_hash(lowest)[0] / 2
    (validation,) = splits(texts, fraction)[VALIDATION]
    assert lowest.endswith(validation)


def test_if_all_hash_into_validation_one_goes_to_train() -> None:
    texts = TEXTS[:3]
    highest = max(texts, key=lambda text: text_hash(text)[0])
    fraction = (1 + text_hash(highest)[0]) / 2
    result = splits(texts, fraction)
    assert result[TRAIN] == [highest]
    assert len(result[VALIDATION]) == 2


def test_the_sample_is_bounded_and_of_any_order_alike() -> None:
    size = sum(map(len, TEXTS))
    expected: list[str] = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        sample = TextSample(size // 10)
        for text in shuffled:
            sample.add(text)
        texts = sample.texts()
        assert size // 10 <= sum(map(len, texts)) < size // 10 + max(map(len, TEXTS))
        assert texts == (expected or texts)
        expected = texts


def test_a_small_corpus_is_sampled_whole() -> None:
    sample = TextSample(1 << 20)
    for text in TEXTS:
        sample.add(text)
    assert sorted(sample.texts()) == sorted(TEXTS)
