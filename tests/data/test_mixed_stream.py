"""The mixed stream: one global order for every world and restart, every sample once a pass."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import (
    expected_rows,
    forge_index,
    random_documents,
    take,
    write_documents,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import Batch, Cursor, TokenDataset
from scalellm.data.mixed_stream import MixedStream
from scalellm.data.mixture import PERIOD, Mixture, Stage
from scalellm.errors import ConfigError, DataError

SIZES = {"large": 20_011, "small": 3_001, "tiny": 130}
UNITS = (2500, 1500, 96)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    root = tmp_path_factory.mktemp("mix")
    return {
        name: TokenDataset.open(
            write_documents(root / name, random_documents(size, seed=seed), frame_tokens=128)
        )
        for seed, (name, size) in enumerate(SIZES.items())
    }


def taken(mixture: Mixture, count: int, **options: Any) -> list[tuple[Batch, Cursor]]:
    with MixedStream(mixture, **{"global_batch_size": 48, "lanes": 4, **options}) as stream:
        return list(itertools.islice(stream, count))


def global_batches(
    mixture: Mixture, count: int, world_size: int, **options: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, Cursor]]:
    """Yields the rows (dataset, targets, tokens) of all ranks together, and the cursor."""
    ranks = [
        taken(mixture, count, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for steps in zip(*ranks, strict=True):
        batches, cursors = zip(*steps, strict=True)
        num_targets = np.concatenate([batch.num_targets_B for batch in batches])
        assert len(set(cursors)) == 1
        assert {batch.global_target_tokens for batch in batches} == {int(num_targets.sum())}
        sources = np.concatenate([batch.sources_B for batch in batches])
        tokens = np.concatenate([batch.tokens_BS for batch in batches])
        yield np.column_stack([sources, num_targets]), tokens, cursors[0]


def hash_of(parts: Any) -> str:
    digest = hashlib.sha256()
    for numbers, tokens, cursor in parts:
        digest.update(numbers.tobytes() + tokens.tobytes())
        digest.update(json.dumps(cursor.to_dict()).encode())
    return digest.hexdigest()


def test_one_order_for_all_worlds_and_a_switch_in_mid_epoch(
    datasets: dict[str, TokenDataset],
) -> None:
    """300 global batches of 48 rows, with a stage that begins in them."""
    stages = (Stage(0, 16, UNITS), Stage(48 * 140, 32, (96, 3000, 1000)))
    mixture = Mixture(datasets, stages)
    want = hash_of(global_batches(mixture, 300, 1, seed=5))
    for world_size in (2, 3, 4, 6, 8, 16):
        assert hash_of(global_batches(mixture, 300, world_size, seed=5)) == want
    switched, cursor = [], None
    for world_size, count in ((2, 101), (16, 3), (3, 96), (1, 100)):
        part = list(global_batches(mixture, count, world_size, cursor=cursor, seed=5))
        cursor = part[-1][2]
        switched += part
        assert len(json.dumps(cursor.to_dict())) <= 256
    assert hash_of(switched) == want


def test_every_sample_of_every_dataset_exactly_once_a_pass(
    datasets: dict[str, TokenDataset],
) -> None:
    mixture = Mixture(datasets, (Stage(0, 16, UNITS),))
    seen: dict[int, Counter[bytes]] = {number: Counter() for number in range(3)}
    num_samples = [order.num_samples for order in mixture.orders(mixture.stages[0], 0, 4)]
    for numbers, tokens, _ in global_batches(mixture, 60, 3):
        for (source, _), row in zip(numbers, tokens, strict=True):
            if seen[source].total() < num_samples[source]:
                seen[source][row.tobytes()] += 1
    for number, dataset in enumerate(datasets.values()):
        order = mixture.orders(mixture.stages[0], 0, 4)[number]
        rows, _ = expected_rows(dataset, order, range(order.num_samples))
        assert seen[number] == Counter(row.tobytes() for row in rows)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_are_as_defined(datasets: dict[str, TokenDataset], data: st.DataObject) -> None:
    """Row r is the next sample of the dataset that row r of the pattern names."""
    cuts = sorted(data.draw(st.lists(st.integers(1, PERIOD - 1), min_size=2, max_size=2)))
    units = (cuts[0], cuts[1] - cuts[0], PERIOD - cuts[1])
    seq_len, lanes = data.draw(st.sampled_from([16, 50])), data.draw(st.integers(1, 5))
    world_size, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rank, start = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, 9000))
    mixture = Mixture(datasets, (Stage(0, seq_len, units),))
    size = rows * world_size
    cursor = Cursor(start, 0, 7, mixture.fingerprint, seq_len, lanes)
    pattern, orders = mixture.stages[0].pattern, mixture.orders(mixture.stages[0], 7, lanes)
    options = {"seed": 7, "lanes": lanes, "decode_threads": data.draw(st.integers(0, 1))}
    batches = taken(
        mixture,
        5,
        rank=rank,
        world_size=world_size,
        global_batch_size=size,
        cursor=cursor,
        **options,
    )
    for step, (batch, _) in enumerate(batches):
        first = start + step * size + rank * rows
        for row, (tokens, num_targets) in enumerate(
            zip(batch.tokens_BS, batch.num_targets_B, strict=True)
        ):
            source = pattern.source_of[(first + row) % PERIOD]
            at = pattern.count(source, first + row)
            dataset = list(datasets.values())[source]
            want, want_targets = expected_rows(dataset, orders[source], range(at, at + 1))
            np.testing.assert_array_equal(tokens, want[0])
            assert (num_targets, batch.sources_B[row]) == (want_targets[0], source)


def test_proportions_are_exact_after_4096_rows(datasets: dict[str, TokenDataset]) -> None:
    mixture = Mixture(datasets, (Stage(0, 16, UNITS),))
    batches = taken(mixture, 512, global_batch_size=8)
    sources = np.concatenate([batch.sources_B for batch, _ in batches])
    assert np.bincount(sources).tolist() == list(UNITS)


def test_one_dataset_alone_is_its_own_stream(datasets: dict[str, TokenDataset]) -> None:
    dataset = datasets["large"]
    mixed = taken(Mixture({"": dataset}, (Stage(0, 16, (PERIOD,)),)), 30, global_batch_size=4)
    for (got, cursor), (want, other) in zip(mixed, take(dataset, 30, lanes=4), strict=True):
        np.testing.assert_array_equal(got.tokens_BS, want.tokens_BS)
        assert cursor == other


def test_positions_and_documents_come_along(datasets: dict[str, TokenDataset]) -> None:
    mixture = Mixture(datasets, (Stage(0, 16, UNITS),))
    for batch, _ in taken(mixture, 5, document_mask=True):
        whole_B = batch.num_targets_B == 16
        is_end_BT = batch.tokens_BS[whole_B, :-1] == 0
        np.testing.assert_array_equal(
            batch.documents_BT[whole_B, 1:], np.cumsum(is_end_BT[:, :-1], axis=1)
        )
        assert (batch.positions_BT[whole_B, 1:][is_end_BT[:, :-1]] == 0).all()


def test_a_stage_may_leave_a_dataset_out(datasets: dict[str, TokenDataset]) -> None:
    stages = (Stage(0, 16, (PERIOD, 0, 0)), Stage(96, 16, (0, 0, PERIOD)))
    batches = taken(Mixture(datasets, stages), 4)
    assert [set(batch.sources_B.tolist()) for batch, _ in batches] == [{0}, {0}, {2}, {2}]


def test_a_stage_goes_on_where_the_dataset_stood(datasets: dict[str, TokenDataset]) -> None:
    """Cutting a stage in two changes nothing but the cursor's fingerprint."""
    one = Mixture(datasets, (Stage(0, 16, UNITS),))
    rows = taken(one, 256)[:256]
    split = Mixture(datasets, (Stage(0, 16, UNITS), Stage(48 * 128, 16, UNITS)))
    for number, ((want, _), (got, _)) in enumerate(zip(rows, taken(split, 256), strict=True)):
        if number < 128:
            np.testing.assert_array_equal(got.tokens_BS, want.tokens_BS)
        else:
            # The pattern begins anew, so only each dataset's own sequence is the same.
            break
    sequence = {
        name: np.concatenate(
            [batch.tokens_BS[batch.sources_B == source] for batch, _ in taken(mixture, 256)]
        )
        for name, mixture in (("one", one), ("split", split))
        for source in (0,)
    }
    size = min(map(len, sequence.values()))
    np.testing.assert_array_equal(sequence["one"][:size], sequence["split"][:size])


def test_a_stage_inside_a_batch_is_refused(datasets: dict[str, TokenDataset]) -> None:
    mixture = Mixture(datasets, (Stage(0, 16, UNITS), Stage(100, 16, UNITS)))
    with pytest.raises(ConfigError, match="a stage begins at row 100, inside a batch of 48"):
        MixedStream(mixture, global_batch_size=48)


def test_a_cursor_of_another_mixture_is_refused(datasets: dict[str, TokenDataset]) -> None:
    mixture = Mixture(datasets, (Stage(0, 16, UNITS),))
    [(_, cursor)] = taken(mixture, 1)
    other = Mixture(datasets, (Stage(0, 16, UNITS[::-1]),))
    with pytest.raises(DataError, match="the cursor belongs to another dataset"):
        taken(other, 1, cursor=cursor)


def test_damage_in_one_dataset_ends_the_stream(
    datasets: dict[str, TokenDataset], tmp_path: Path
) -> None:
    path = write_documents(tmp_path / "d", random_documents(5000, seed=9), frame_tokens=128)

    def lie(records: np.ndarray) -> None:
        records["crc32"][1] ^= 1

    forge_index(path, lie)
    mixed = Mixture(
        {"good": datasets["large"], "bad": TokenDataset.open(path)},
        (Stage(0, 16, (PERIOD - 64, 64)),),
    )
    with MixedStream(mixed, global_batch_size=48, lanes=4) as stream:
        with pytest.raises(DataError, match="frame 1 does not match its crc32"):
            for _ in itertools.islice(stream, 300):
                pass
        with pytest.raises(DataError, match="frame 1"):
            next(stream)
