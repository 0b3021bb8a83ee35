"""The stream: one global order for every world, batch size and restart; each sample once."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import (
    expected_rows,
    take,
    write_counting,
    write_documents,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import Cursor, TokenDataset
from scalellm.data.order import SampleOrder

NUM_TOKENS = 5003


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Ids 1, 2, 3, ...: a row tells where it comes from."""
    return TokenDataset.open(write_counting(tmp_path_factory.mktemp("c") / "d", NUM_TOKENS))


def global_batches(
    dataset: TokenDataset, count: int, world_size: int, **options: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, Cursor]]:
    """Yields tokens and num_targets of all ranks together, and the cursor, which all share."""
    ranks = [
        take(dataset, count, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for steps in zip(*ranks, strict=True):
        batches, cursors = zip(*steps, strict=True)
        num_targets = np.concatenate([batch.num_targets_B for batch in batches])
        assert len(set(cursors)) == 1
        assert {batch.global_target_tokens for batch in batches} == {int(num_targets.sum())}
        yield np.concatenate([batch.tokens_BS for batch in batches]), num_targets, cursors[0]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_rows_are_as_defined_for_any_geometry(counting: TokenDataset, data: st.DataObject) -> None:
    seq_len = data.draw(st.sampled_from([16, 64, 7, 50, 130, 1000, 6000]), "seq_len")
    world_size = data.draw(st.integers(1, 4), "world_size")
    rank = data.draw(st.integers(0, world_size - 1), "rank")
    rows = data.draw(st.integers(1, 9), "rows per rank")
    lanes, threads = data.draw(st.integers(1, 9), "lanes"), data.draw(st.integers(0, 2), "threads")
    shuffle, seed = data.draw(st.booleans(), "shuffle"), data.draw(st.integers(0, 99), "seed")
    start = data.draw(st.integers(0, 2000), "samples consumed")
    order = SampleOrder(NUM_TOKENS, seq_len, seed, lanes if shuffle else 0, counting.frame_tokens)
    size = rows * world_size
    cursor = Cursor(start, 0, seed, counting.fingerprint, seq_len, order.lanes)
    options = {"seq_len": seq_len, "global_batch_size": size, "seed": seed, "lanes": lanes}
    for step, (batch, after) in enumerate(
        take(
            counting,
            12,
            rank=rank,
            world_size=world_size,
            decode_threads=threads,
            cursor=cursor,
            shuffle=shuffle,
            **options,
        )
    ):
        first = start + step * size
        mine = range(first + rank * rows, first + (rank + 1) * rows)
        tokens, num_targets = expected_rows(counting, order, mine)
        np.testing.assert_array_equal(batch.tokens_BS, tokens)
        np.testing.assert_array_equal(batch.num_targets_B, num_targets)
        assert batch.tokens_BS.flags.c_contiguous
        assert batch.tokens_BS.flags.writeable
        every = expected_rows(counting, order, range(first, first + size))[1]
        assert batch.global_target_tokens == every.sum()
        assert after.samples_consumed == first + size
        assert after.epoch == after.samples_consumed // order.num_samples


def hash_of(parts: Iterable[tuple[np.ndarray, np.ndarray, Cursor]]) -> str:
    digest = hashlib.sha256()
    for tokens, num_targets, cursor in parts:
        digest.update(tokens.tobytes() + num_targets.tobytes())
        digest.update(json.dumps(cursor.to_dict()).encode())
    return digest.hexdigest()


def test_one_order_for_all_worlds_and_a_switch_in_mid_epoch(tmp_path: Path) -> None:
    """300 global batches of 48 samples are 11.5 epochs of 1251 samples."""
    dataset = TokenDataset.open(write_counting(tmp_path / "d", 20_011, frame_tokens=512))
    options = {"global_batch_size": 48, "lanes": 8, "seed": 5}
    want = hash_of(global_batches(dataset, 300, 1, **options))
    for world_size in (2, 3, 4, 6, 8, 16):
        assert hash_of(global_batches(dataset, 300, world_size, **options)) == want
    switched = []
    cursor = None
    for world_size, count in ((2, 101), (16, 3), (3, 96), (1, 100)):
        part = list(global_batches(dataset, count, world_size, cursor=cursor, **options))
        cursor = part[-1][2]
        assert cursor.samples_consumed % 1251
        switched += part
    assert hash_of(switched) == want


@pytest.mark.parametrize("seq_len", [16, 50, 64, 130])
def test_every_token_is_a_target_once_per_epoch(counting: TokenDataset, seq_len: int) -> None:
    order = SampleOrder(NUM_TOKENS, seq_len, 0)
    size = order.num_samples
    epochs: list[list[int]] = [[], [], []]
    rows = itertools.count()
    # Two ranks of 5 rows: 10 does not divide an epoch, so batches run across its end.
    for tokens, num_targets, _ in global_batches(
        counting, size * 3 // 10 + 1, 2, seq_len=seq_len, global_batch_size=10, lanes=3
    ):
        for row, number in zip(tokens, num_targets.tolist(), strict=True):
            epoch = next(rows) // size
            if epoch < 3:
                epochs[epoch] += row[1 : 1 + number].tolist()
    for targets in epochs:
        assert sorted(targets) == [0, *range(2, NUM_TOKENS)]
    assert epochs[0] != epochs[1]


def test_resume_is_exact_at_every_batch_and_for_another_batch_size(counting: TokenDataset) -> None:
    options: dict[str, Any] = {"global_batch_size": 6, "lanes": 4}
    whole = take(counting, 120, **options)
    for done in (0, 1, 17, 51, 52, 53, 104, 119):
        stored = Cursor.from_dict(json.loads(json.dumps(whole[done][1].to_dict())))
        batch, cursor = take(counting, 1, **options, cursor=stored)[0]
        if done + 1 < len(whole):
            np.testing.assert_array_equal(batch.tokens_BS, whole[done + 1][0].tokens_BS)
            assert cursor == whole[done + 1][1]
    one_by_one = take(counting, 30, global_batch_size=1, lanes=4, cursor=whole[51][1])
    np.testing.assert_array_equal(
        np.concatenate([batch.tokens_BS for batch, _ in one_by_one]),
        np.concatenate([batch.tokens_BS for batch, _ in whole[52:57]]),
    )


def test_a_rank_decodes_only_what_it_reads(
    counting: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_into = TokenDataset.read_into

    def counted(self: TokenDataset, start: int, out: np.ndarray) -> None:
        reads.append(start)
        read_into(self, start, out)

    monkeypatch.setattr(TokenDataset, "read_into", counted)
    for rank in range(4):
        reads.clear()
        take(counting, 4, global_batch_size=16, lanes=16, rank=rank, world_size=4, decode_threads=0)
        assert len(reads) == len(set(reads)) == 4
    cursor = Cursor(5, 0, 0, counting.fingerprint, 16, 16)
    reads.clear()
    take(counting, 1, global_batch_size=1, lanes=16, decode_threads=0, cursor=cursor)
    assert len(reads) == 1


def test_ids_above_65_536(tmp_path: Path) -> None:
    document = np.append(np.random.default_rng(0).integers(1, 200_000, 999), 0)
    path = write_documents(tmp_path / "d", [document], vocab_size=200_000)
    batches = take(TokenDataset.open(path), 63, global_batch_size=1, shuffle=False)
    assert batches[0][0].tokens_BS.dtype == np.uint32
    inputs = np.concatenate([batch.tokens_BS[0, :-1] for batch, _ in batches])
    np.testing.assert_array_equal(inputs[:1000], document)
