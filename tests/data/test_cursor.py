"""A cursor is small, strict, of what was handed out, and refused by another order."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from helpers.token_datasets import (
    take,
    write_counting,
)

from scalellm.data import Cursor, TokenDataset, TokenStream
from scalellm.errors import ConfigError, DataError

NUM_TOKENS = 5003


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Ids 1, 2, 3, ...: a row tells where it comes from."""
    return TokenDataset.open(write_counting(tmp_path_factory.mktemp("c") / "d", NUM_TOKENS))


def test_the_cursor_is_of_what_was_handed_out_not_of_what_was_decoded(
    counting: TokenDataset,
) -> None:
    with TokenStream(counting, seq_len=16, global_batch_size=4, decode_threads=2) as stream:
        assert stream.cursor.samples_consumed == 0
        _, cursor = next(stream)
        time.sleep(0.05)
        assert stream.cursor == cursor
        assert cursor.samples_consumed == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "0" * 64}, "another dataset"),
        ({"seed": 8}, "seed=8, this run has seed=7.*set seed=8"),
        ({"seq_len": 32}, "seq_len=32, this run has seq_len=16.*set seq_len=32"),
        ({"lanes": 0}, "lanes=0, this run has lanes=64"),
        ({"samples_consumed": -1}, "samples_consumed=-1"),
        ({"samples_consumed": 2**63}, "samples_consumed="),
    ],
)
def test_a_cursor_of_another_order_is_refused(
    counting: TokenDataset, change: dict[str, Any], words: str
) -> None:
    cursor = take(counting, 1, seed=7)[0][1]
    with pytest.raises(DataError, match=words):
        TokenStream(
            counting, seq_len=16, global_batch_size=4, seed=7, cursor=replace(cursor, **change)
        )


def test_a_cursor_is_small_and_strict() -> None:
    largest = Cursor(2**61, 2**40, 2**63, "f" * 64, 10**7, 10**5)
    assert len(json.dumps(largest.to_dict())) <= 256
    assert Cursor.from_dict(largest.to_dict()) == largest
    for change in ({"epoch": True}, {"seed": "1"}, {"lanes": -1}, {"more": 1}, {"seq_len": 1.0}):
        with pytest.raises(DataError, match="the cursor"):
            Cursor.from_dict({**largest.to_dict(), **change})
    with pytest.raises(DataError, match="the cursor"):
        Cursor.from_dict({"samples_consumed": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_size": 30, "world_size": 16}, "multiple of world_size=16; try 32"),
        ({"global_batch_size": 0}, "try 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be 0 to world_size - 1 = 1"),
    ],
)
def test_impossible_arithmetic_is_refused(
    counting: TokenDataset, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        take(counting, 1, **options)
