"""Shares of a mixture are exact, spread evenly, and stages go on where the datasets stood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.token_datasets import random_documents, write_counting, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import TokenDataset
from scalellm.data.mixture import PERIOD, Mixture, Pattern, Stage, continued, shares
from scalellm.data.order import SampleOrder
from scalellm.errors import ConfigError, DataError

weights = st.dictionaries(
    st.text(min_size=1, max_size=3), st.floats(1, 100), min_size=1, max_size=8
)


@given(weights)
def test_shares_are_whole_and_within_one_row_of_the_weight(weights: dict[str, float]) -> None:
    units = shares(weights)
    assert sum(units.values()) == PERIOD
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(units[name] - weight / total * PERIOD) < 1


def test_shares_by_hand() -> None:
    assert shares({"a": 3, "b": 1}) == {"a": 3072, "b": 1024}
    assert shares({"a": 1, "b": 1, "c": 1}) == {"a": 1366, "b": 1365, "c": 1365}
    assert shares({"a": 1, "b": 0}) == {"a": PERIOD, "b": 0}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": -1.0}, "the weight of 'a' is -1.0; it must be from 0 to 1e"),
        ({"a": 1e308, "b": 1e308}, "the weight of 'a' is 1e.308; it must be from 0 to 1e"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": 0.0, "b": 0.0}, "no weight of a, b is above 0"),
        ({"a": 1.0, "b": 1e-6}, "'b' is 1e-06 of all, less than one row in 4096"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shares(weights)


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 3 * PERIOD))
def test_every_window_holds_its_share(weights: dict[str, float], start: int) -> None:
    units = list(shares(weights).values())
    pattern = Pattern(units)
    assert np.bincount(pattern.source_of, minlength=len(units)).tolist() == units
    window = pattern.source_of[np.arange(start, start + 10_000) % PERIOD]
    for source, count in enumerate(units):
        assert pattern.count(source, PERIOD) == count
        found = np.count_nonzero(window == source)
        # Within 1% of the rows, as promised; in truth within two rows.
        assert abs(found - 10_000 * count / PERIOD) < 2
        assert pattern.count(source, start + 10_000) - pattern.count(source, start) == found


@pytest.mark.parametrize(
    "weights", [{"big": 99.0} | {f"s{n}": 1.0 for n in range(99)}, {"a": 1.0}, {"a": 1, "b": 0}]
)
def test_no_dataset_is_ever_a_row_off_its_share(weights: dict[str, float]) -> None:
    units = np.array(list(shares(weights).values()))
    source_of = Pattern(units.tolist()).source_of
    given = np.cumsum(source_of[:, None] == np.arange(len(units)), axis=0)
    wanted = np.arange(1, PERIOD + 1)[:, None] * units / PERIOD
    assert np.abs(given - wanted).max() < 1


def test_after_4096_rows_the_shares_are_exact_and_nobody_waits_long() -> None:
    pattern = Pattern(list(shares({"a": 0.7, "b": 0.2, "c": 0.1}).values()))
    assert np.bincount(pattern.source_of).tolist() == [2867, 819, 410]
    for source, share in enumerate((0.7, 0.2, 0.1)):
        assert np.diff(pattern.slots[source]).max() <= 2 / share + 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([16, 64, 128]),
    st.sampled_from([16, 64, 128]),
    st.integers(0, 4000),
    st.integers(1, 5),
)
def test_another_length_reads_no_token_again_in_a_pass(
    old_len: int, new_len: int, position: int, lanes: int
) -> None:
    num_tokens, frame = 40_001, 512
    old = SampleOrder(num_tokens, old_len, 3, lanes, frame)
    new = SampleOrder(num_tokens, new_len, 3, lanes, frame)
    begin = continued(position, old, new)
    epoch, within = divmod(position, old.num_samples)
    if old_len == new_len:
        assert begin == position
        return
    new_epoch, new_within = divmod(begin, new.num_samples)
    assert new_epoch in (epoch, epoch + 1)
    if new_epoch > epoch:
        assert new_within == 0
        return
    read = {int(s) * old_len // frame for s in old.samples(np.arange(within), epoch)}
    rest = new.samples(np.arange(new_within, new.num_samples), epoch)
    assert not read & {int(sample) * new_len // frame for sample in rest}


def test_lengths_that_do_not_divide_a_frame_begin_a_new_pass() -> None:
    old, new = SampleOrder(40_001, 128, 3, 4, 512), SampleOrder(40_001, 100, 3, 4, 512)
    assert continued(0, old, new) == 0
    assert continued(7, old, new) == new.num_samples
    assert continued(2 * old.num_samples, old, new) == 2 * new.num_samples


def test_a_plain_mixture_is_its_dataset(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write_counting(tmp_path / "a", 1000))
    other = TokenDataset.open(write_counting(tmp_path / "b", 1000, level=1, shard_frames=2))
    plain = Mixture({"a": dataset}, (Stage(0, 16, (PERIOD,)),))
    assert plain.fingerprint == dataset.fingerprint
    half = (PERIOD // 2, PERIOD // 2)
    mixed = Mixture({"a": dataset, "b": other}, (Stage(0, 16, half),))
    assert mixed.num_tokens == 2000
    variants = [
        mixed,
        Mixture({"b": other, "a": dataset}, mixed.stages),
        Mixture(mixed.datasets, (Stage(0, 16, (PERIOD - 1, 1)),)),
        Mixture(mixed.datasets, (*mixed.stages, Stage(8, 16, half))),
        Mixture(mixed.datasets, (*mixed.stages, Stage(16, 16, half))),
        Mixture(mixed.datasets, (*mixed.stages, Stage(8, 32, half))),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_datasets_of_other_vocabularies_are_refused(tmp_path: Path) -> None:
    a = TokenDataset.open(write_counting(tmp_path / "a", 1000))
    b = TokenDataset.open(write_documents(tmp_path / "b", random_documents(500)))
    with pytest.raises(DataError, match="'b' has the vocabulary size 1000, 'a' has 1001"):
        Mixture({"a": a, "b": b}, (Stage(0, 16, (1, PERIOD - 1)),))
