"""Reading any range, from any thread, decoding no more than needed."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.token_datasets import random_documents, write_counting, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import TokenDataset, reader
from scalellm.errors import DataError

NUM_TOKENS = 1000


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return random_documents(NUM_TOKENS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]) -> TokenDataset:
    return TokenDataset.open(write_documents(tmp_path_factory.mktemp("reader") / "d", documents))


def test_a_small_file_takes_no_more_memory_than_it_has(
    tmp_path: Path, documents: list[np.ndarray]
) -> None:
    """And not what a manifest may have: that once left a hole of 64 MiB in every rank's heap."""
    path = write_documents(tmp_path / "d", documents)
    tracemalloc.start()
    try:
        TokenDataset.open(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


ranges = st.tuples(st.integers(0, NUM_TOKENS), st.integers(0, NUM_TOKENS)).map(sorted)


@settings(max_examples=200, deadline=None)
@given(span=ranges)
def test_any_range_reads_as_written(
    dataset: TokenDataset, documents: list[np.ndarray], span: list[int]
) -> None:
    start, stop = span
    np.testing.assert_array_equal(dataset.read(start, stop), np.concatenate(documents)[start:stop])
    ends = np.cumsum([len(document) for document in documents])
    np.testing.assert_array_equal(
        dataset.document_ends(start, stop), ends[(ends > start) & (ends <= stop)]
    )
    strided = np.zeros((stop - start, 2), dataset.dtype)
    dataset.read_into(start, strided[:, 0])
    np.testing.assert_array_equal(strided[:, 0], np.concatenate(documents)[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, NUM_TOKENS + 1)])
def test_a_range_outside_is_refused(dataset: TokenDataset, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="1000 tokens"):
        dataset.read(start, stop)
    with pytest.raises(ValueError, match="1000 tokens"):
        dataset.document_ends(start, stop)


def test_the_last_target_of_a_frame_needs_no_second_frame(tmp_path: Path) -> None:
    path = write_counting(tmp_path / "d", 64 * 6, shard_frames=2)
    for shard in (path / "train" / "00001.tokens.zst", path / "train" / "00002.tokens.zst"):
        shard.unlink()
    dataset = TokenDataset.open(path)
    assert dataset.read(64, 129).tolist() == list(range(65, 130))
    with pytest.raises(DataError, match=r"00001\.tokens\.zst"):
        dataset.read(64, 130)


def test_shards_open_when_needed_and_few_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 2)
    dataset = TokenDataset.open(write_counting(tmp_path / "d", 64 * 10, shard_frames=1))
    assert len(dataset._open) == 0
    for place in (0, 9, 4, 0, 9, 7):
        assert dataset.read(place * 64, place * 64 + 2).tolist() == [place * 64 + 1, place * 64 + 2]
        assert len(dataset._open) <= 2


def test_threads_share_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 2)
    dataset = TokenDataset.open(write_counting(tmp_path / "d", 6400, shard_frames=20))
    starts = np.random.default_rng(0).integers(0, 6400 - 200, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        for start, tokens in zip(
            starts, pool.map(lambda start: dataset.read(start, start + 199), starts), strict=True
        ):
            assert tokens.tolist() == list(range(start + 1, start + 200))


def test_what_is_no_dataset_is_said_so(tmp_path: Path, dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match=r"holds no dataset: manifest\.json is missing"):
        TokenDataset.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no split 'trian', it has: train; did you mean 'train'"):
        TokenDataset.open(dataset.path, "trian")


def test_the_fingerprint_is_of_the_ids_alone(tmp_path: Path) -> None:
    documents = random_documents(200)
    one, same, other = (
        TokenDataset.open(write_documents(tmp_path / name, part)).fingerprint
        for name, part in (("a", documents), ("b", documents), ("c", documents[:-1]))
    )
    assert one == same != other


def test_verify_counts_tokens_and_documents(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write_documents(tmp_path / "d", random_documents(1000)))
    seen: list[int] = []
    dataset.verify(seen.append)
    assert sum(seen) == 1000


def test_the_snippet_of_the_format_page_runs(
    dataset: TokenDataset, documents: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "data-format.md"
    snippet = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(snippet.replace('Path("data")', f"Path({str(dataset.path)!r})"), names)
    assert capsys.readouterr().out.startswith("64 ids,")
    np.testing.assert_array_equal(names["documents"][0], documents[0])  # type: ignore[index]
    assert names["carry"] == np.concatenate(documents)[64]
