"""Fingerprints: the estimate is as good as theory says, and depends on the text alone."""

from __future__ import annotations

import hashlib
import pickle
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from scalellm.data.dedup import DedupOptions, fingerprints
from scalellm.data.dedup.shingles import shingle_hashes

OPTIONS = DedupOptions()


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(50_000)}" for _ in range(count)]


def jaccard(left: str, right: str, ngram: int) -> float:
    """Of the sets of word n-grams, in plain Python; the texts have words and spaces only."""
    sets = []
    for text in (left, right):
        parts = text.lower().split()
        sets.append({tuple(parts[i : i + ngram]) for i in range(len(parts) - ngram + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(rng: random.Random, text: list[str], edits: int) -> list[str]:
    changed = list(text)
    for place in rng.sample(range(len(text)), edits):
        changed[place] = f"x{rng.randrange(10**6)}"
    return changed


def counts(*texts: str, ngram: int = 1) -> list[int]:
    return shingle_hashes(texts, ngram)[1].tolist()


@pytest.mark.parametrize("ngram", [1, 3, 5])
def test_the_estimate_is_unbiased_and_as_sharp_as_theory_says(ngram: int) -> None:
    rng = random.Random(ngram)
    options = DedupOptions(ngram=ngram)
    scaled_errors, errors = [], []
    for _ in range(600):
        text = words(rng, rng.choice([20, 60, 200, 800]))
        pair = [" ".join(text), " ".join(edited(rng, text, rng.randrange(1, 1 + len(text) // 4)))]
        true = jaccard(*pair, ngram)
        if not 0.05 < true < 0.95:
            continue
        signatures = fingerprints(pair, options).signatures_NK
        error = float((signatures[0] == signatures[1]).mean()) - true
        errors.append(error)
        scaled_errors.append(error / np.sqrt(true * (1 - true) / options.num_hashes))
    assert len(errors) > 300
    # Mean and spread of n normalised errors are within 4 of their own standard errors.
    assert abs(np.mean(scaled_errors)) < 4 / np.sqrt(len(errors))
    assert abs(np.std(scaled_errors) - 1) < 4 / np.sqrt(2 * len(errors))
    assert abs(np.mean(errors)) < 0.01


def test_the_number_of_distinct_shingles_is_that_of_plain_python() -> None:
    rng = random.Random(0)
    text = " ".join(words(rng, 100_000))
    for ngram in (1, 2, 5):
        parts = text.split()
        distinct = {tuple(parts[i : i + ngram]) for i in range(len(parts) - ngram + 1)}
        hashes, count = shingle_hashes([text], ngram)
        assert count.tolist() == [100_000 - ngram + 1]
        assert len(np.unique(hashes)) == len(distinct)


def test_case_spaces_and_punctuation_make_no_other_shingles() -> None:
    one, other = "The quick, brown FOX", "the   quick\nBrown   fox!"
    hashes, count = shingle_hashes([one, other], 2)
    assert count.tolist() == [3, 3]
    assert (hashes[:3] == hashes[3:]).all()
    # Order counts.
    hashes, _ = shingle_hashes(["a b", "b a"], 2)
    assert hashes[0] != hashes[1]


def test_words_of_many_scripts() -> None:
    assert counts("naïve café über_alles 42") == [4]
    assert counts("привет, мир") == [2]
    assert counts("हिन्दी भाषा") == [2]  # vowel signs belong to the word
    assert counts("한국어 문장") == [2]
    assert counts("我们去学校") == [5]
    assert counts("東京へ行くto 3 places") == [8]
    assert counts("ภาษาไทย") == [7]
    assert counts("𐐀𐐁𐐂 𠀀𠀁") == [3]
    assert counts("", "!?…", "\x00\ud800", " \n ") == [0, 0, 0, 0]
    greek, count = shingle_hashes(["ΟΔΟΣ οδοσ"], 1)
    assert count.tolist() == [2]
    assert greek[0] == greek[1]


def test_no_shingle_reaches_into_another_document() -> None:
    texts = ["a b c", "d e", "", "f g h i", "j"]
    hashes, count = shingle_hashes(texts, 3)
    assert count.tolist() == [1, 0, 0, 2, 0]
    alone = [shingle_hashes([text], 3)[0] for text in texts]
    assert (hashes == np.concatenate(alone)).all()


def test_exact_digest_ignores_only_whitespace_and_unicode_form() -> None:
    same = ["a  b\n", "a b", "\ta b"]
    others = ["a B", "a b.", "ab"]
    digests = [bytes(row) for row in fingerprints([*same, *others], OPTIONS).exact_N16]
    assert len(set(digests[:3])) == 1
    assert len(set(digests)) == 4
    forms = [unicodedata.normalize(form, "Ünïcödé") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    both = fingerprints([form + " word" * 20 for form in forms], OPTIONS)
    assert (both.exact_N16[0] == both.exact_N16[1]).all()
    assert (both.signatures_NK[0] == both.signatures_NK[1]).all()


def test_few_shingles_are_flagged() -> None:
    texts = [" ".join("abcdefghijklmnop"[:length]) for length in range(17)]
    assert fingerprints(texts, OPTIONS).is_short_N.tolist() == [True] * 12 + [False] * 5
    found = fingerprints(texts, DedupOptions(near=False))
    assert found.signatures_NK.shape == (17, 0)
    assert found.is_short_N.all()
    assert fingerprints([], OPTIONS).signatures_NK.shape == (0, 128)


@given(st.lists(st.text(max_size=200), max_size=12), st.integers(1, 6))
def test_a_text_s_fingerprint_does_not_depend_on_its_batch(texts: list[str], ngram: int) -> None:
    options = DedupOptions(ngram=ngram, num_hashes=16)
    together = fingerprints(texts, options)
    for number, text in enumerate(texts):
        alone = fingerprints([text], options)
        assert (alone.exact_N16[0] == together.exact_N16[number]).all()
        assert (alone.signatures_NK[0] == together.signatures_NK[number]).all()
        assert alone.is_short_N[0] == together.is_short_N[number]


@pytest.mark.parametrize("piece", ["a", "word ", "我", "\ud800", "é!", " "])
def test_ten_megabytes_of_one_thing(piece: str) -> None:
    text = piece * (10_000_000 // len(piece.encode("utf-8", "surrogatepass")))
    found = fingerprints(["before " * 30, text, "after " * 30], OPTIONS)
    around = fingerprints(["before " * 30, "after " * 30], OPTIONS)
    assert (found.signatures_NK[[0, 2]] == around.signatures_NK).all()
    assert found.is_short_N.tolist() == [False, piece in ("\ud800", " "), False]


# Changing what a fingerprint is makes old indexes useless: raise FINGERPRINT_VERSION, then this.
_GOLDEN = "66fa11a9b3f92b2d"
_TEXTS = ["Hello, 世界! " * 9, "The quick brown fox jumps over the lazy dog. " * 5, "ab"]


def _digest(texts: list[str]) -> str:
    found = fingerprints(texts, OPTIONS)
    arrays = (found.exact_N16, found.signatures_NK, found.is_short_N)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def test_fingerprints_are_the_same_in_every_process_and_version() -> None:
    code = (
        "import hashlib; from scalellm.data.dedup import DedupOptions, fingerprints\n"
        f"f = fingerprints({_TEXTS!r}, DedupOptions())\n"
        "a = (f.exact_N16, f.signatures_NK, f.is_short_N)\n"
        "print(hashlib.sha256(b''.join(x.tobytes() for x in a)).hexdigest()[:16])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert there.stdout.strip() == _digest(_TEXTS) == _GOLDEN


def test_fingerprints_can_be_pickled() -> None:
    found = fingerprints(_TEXTS, OPTIONS)
    copy = pickle.loads(pickle.dumps(found))
    assert len(copy) == 3
    assert (copy.signatures_NK == found.signatures_NK).all()


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.2}, {"ngram": 0}, {"num_hashes": 8}, {"memory_bytes": 1}, {"n": 1}]
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DedupOptions(**wrong)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.72, 0.9, 1.0])
@pytest.mark.parametrize("num_hashes", [16, 100, 128, 256, 1024])
def test_bands_find_pairs_at_the_threshold(threshold: float, num_hashes: int) -> None:
    options = DedupOptions(threshold=threshold, num_hashes=num_hashes)
    size, count = options.band_hashes, options.num_bands
    assert 1 <= size * count <= num_hashes
    assert 1 - (1 - threshold**size) ** count >= 0.95
