"""Buckets out of core: the same ones in any amount of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data.dedup.buckets import SORTED_RECORD_BYTES, BucketFiles, Buckets
from scalellm.data.dedup.components import Components
from scalellm.data.dedup.memory import Memory
from scalellm.data.dedup.rows import Rows
from scalellm.errors import DataError


def buckets_of(folder: Path, keys: np.ndarray, limit_records: int) -> list[list[int]]:
    budget_bytes = limit_records * SORTED_RECORD_BYTES
    memory = Memory()
    files = BucketFiles(folder, len(keys), budget_bytes, memory)
    for start in range(0, len(keys), 100):
        files.add(keys[start : start + 100], np.arange(start, min(start + 100, len(keys))))
    found: list[list[int]] = []

    def take(buckets: Buckets) -> None:
        bounds = zip(buckets.starts, buckets.stops, strict=True)
        found.extend(buckets.documents[start:stop].tolist() for start, stop in bounds)

    def take_huge(slices: Iterator[np.ndarray]) -> None:
        parts = [part.tolist() for part in slices]
        assert len(parts) > 1
        assert max(map(len, parts)) <= limit_records
        found.append([document for part in parts for document in part])

    files.read(take, take_huge)
    assert memory.peak_bytes <= budget_bytes
    assert not list(folder.iterdir())
    return sorted(found)


@pytest.mark.parametrize("spread", [1, 2, 50, 2000])
@pytest.mark.parametrize("limit_records", [7, 100, 5000])
def test_every_bucket_comes_once_and_in_order(
    tmp_path: Path, spread: int, limit_records: int
) -> None:
    rng = np.random.default_rng(spread)
    # Neighbouring keys share their high bits, so their file must be cut again.
    names = np.concatenate([np.arange(spread // 2), rng.integers(0, 2**64, spread, np.uint64)])
    keys = names.astype(np.uint64)[rng.integers(0, len(names), 3000)]
    members: dict[int, list[int]] = {}
    for document, key in enumerate(keys.tolist()):
        members.setdefault(key, []).append(document)
    wanted = sorted(documents for documents in members.values() if len(documents) > 1)
    assert buckets_of(tmp_path, keys, limit_records) == wanted


def test_no_records_and_no_pairs(tmp_path: Path) -> None:
    assert buckets_of(tmp_path, np.zeros(0, np.uint64), 10) == []
    assert buckets_of(tmp_path, np.arange(25, dtype=np.uint64) << np.uint64(58), 10) == []


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 60))
def test_components_are_those_of_a_search_by_hand(pairs: list[tuple[int, int]], batch: int) -> None:
    components = Components(31)
    wanted = list(range(31))
    for left, right in pairs:
        low, high = sorted((wanted[left], wanted[right]))
        wanted = [low if name == high else name for name in wanted]
    for start in range(0, len(pairs), batch):
        part = np.array(pairs[start : start + batch])
        components.join(part[:, 0], part[:, 1])
    assert components.roots(np.arange(31)).tolist() == wanted
    assert components.all_roots().tolist() == wanted


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_chain_of_a_million_is_one_component(shuffled: bool) -> None:
    right = np.arange(1, 1_000_000)
    if shuffled:
        np.random.default_rng(0).shuffle(right)
    components = Components(1_000_000)
    for part in np.array_split(right, 7):
        components.join(part - 1, part)
    assert not components.all_roots().any()


def test_rows_are_gathered_from_several_files_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    data = rng.integers(0, 2**32, (1000, 5), np.uint32)
    parts = []
    for number, (start, stop) in enumerate([(0, 300), (300, 300), (300, 301), (301, 1000)]):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data[start:stop].tobytes())
        parts.append((path, stop - start))
    rows = Rows(parts, "<u4", 5)
    chunks = list(rows.chunks(128))
    assert (np.concatenate([chunk for _, chunk in chunks]) == data).all()
    assert [start for start, _ in chunks][:5] == [0, 128, 256, 300, 301]
    for numbers in (rng.integers(0, 1000, 400), np.array([999, 0, 0, 300]), np.zeros(0, int)):
        assert (rows.gather(numbers) == data[numbers]).all()
    rows.hold()
    assert (rows.gather(numbers) == data[numbers]).all()
    with pytest.raises(DataError, match=r"3\.bin has 13980 bytes, not the 14000"):
        Rows([*parts[:3], (parts[3][0], 700)], "<u4", 5)
