"""The cache of frames: shared, capped, and never trusted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import web
from helpers.token_datasets import random_documents, take, write_documents
from helpers.web import size_of

from scalellm.config.location import RemoteOptions
from scalellm.data import TokenDataset
from scalellm.data._cache import DiskCache, MemoryCache
from scalellm.errors import DataError

DOCUMENTS = random_documents(64 * 30)
TOKENS = np.concatenate(DOCUMENTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("cached") / "data", DOCUMENTS)


@pytest.fixture
def server(folder: Path) -> Iterator[web.Server]:
    with web.serve(folder.parent) as server:
        yield server


def key(number: int) -> str:
    return f"{number:064x}-0"


def frames_in(folder: Path) -> list[Path]:
    return sorted((folder / "scalellm-frames").glob("*-*"))


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_second_epoch_reads_nothing(server: web.Server, tmp_path: Path, on_disk: bool) -> None:
    options = RemoteOptions(tmp_path / "cache" if on_disk else None)
    dataset = TokenDataset.open(f"{server.url}/data", remote=options)
    batches = take(dataset, 30, document_mask=True)  # 120 samples of 16 tokens: one epoch
    read = dataset.bytes_read
    assert read == server.sent_bytes
    again = take(dataset, 30, document_mask=True)
    assert dataset.bytes_read == server.sent_bytes == read
    for (batch, _), (same, _) in zip(batches, again, strict=True):
        np.testing.assert_array_equal(batch.tokens_BS, same.tokens_BS)
    if on_disk:  # another process, here another dataset, reads the manifest alone
        other = TokenDataset.open(f"{server.url}/data", remote=options)
        np.testing.assert_array_equal(other.read(0, len(TOKENS)), TOKENS)
        assert other.bytes_read == os.path.getsize(server.root / "data/manifest.json")


def test_a_copy_elsewhere_shares_the_frames(server: web.Server, tmp_path: Path) -> None:
    options = RemoteOptions(tmp_path / "cache")
    TokenDataset.open(f"{server.url}/data", remote=options).read(0, len(TOKENS))
    (server.root / "copy").symlink_to(server.root / "data")
    try:
        copy = TokenDataset.open(f"{server.url}/copy", remote=options)
        np.testing.assert_array_equal(copy.read(0, len(TOKENS)), TOKENS)
    finally:
        (server.root / "copy").unlink()
    assert copy.bytes_read == os.path.getsize(server.root / "data/manifest.json")


@pytest.mark.parametrize("how", ["flip", "truncate", "grow", "empty", "another frame"])
def test_a_damaged_frame_is_fetched_again(server: web.Server, tmp_path: Path, how: str) -> None:
    options = RemoteOptions(tmp_path)
    TokenDataset.open(f"{server.url}/data", remote=options).read(0, len(TOKENS))
    sound = {path.name: path.read_bytes() for path in frames_in(tmp_path)}
    for path in frames_in(tmp_path):
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[len(data) // 2] ^= 4
        elif how == "truncate":
            del data[-3:]
        elif how == "grow":
            data += b"x"
        elif how == "empty":
            data.clear()
        else:
            data[:] = sound[next(name for name in sound if name != path.name)]
        path.write_bytes(data)
    dataset = TokenDataset.open(f"{server.url}/data", remote=options)
    np.testing.assert_array_equal(dataset.read(0, len(TOKENS)), TOKENS)
    assert {path.name: path.read_bytes() for path in frames_in(tmp_path)} == sound


def test_wrong_bytes_never_enter_the_cache(server: web.Server, tmp_path: Path) -> None:
    server.faults["00000.tokens"] = web.flip(33)
    with pytest.raises(DataError, match="crc32"):
        TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(tmp_path, retries=2)).read(
            0, 64
        )
    [index] = frames_in(tmp_path)
    assert index.name.endswith("-whole")


def test_the_cap_is_kept_and_the_oldest_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_064)
    for number in range(9):
        cache.put(key(number), bytes([number]) * 1000)
        assert size_of(tmp_path) <= 10_064
        time.sleep(0.002)
    assert cache.get(key(0), 1000) == bytes(1000)  # used again: no longer the oldest
    for number in range(9, 12):
        time.sleep(0.002)
        cache.put(key(number), bytes(1000))
        assert size_of(tmp_path) <= 10_064
    assert cache.get(key(0), 1000) is not None
    assert cache.get(key(1), 1000) is None
    assert cache.get(key(11), 1000) is not None
    cache.put(key(99), bytes(20_000))  # more than the cap holds
    assert cache.get(key(99), 20_000) is None
    assert cache.get(key(11), 1000) is not None


def test_a_smaller_cap_shrinks_what_an_earlier_run_left(tmp_path: Path) -> None:
    large = DiskCache(tmp_path, 1 << 20)
    for number in range(100):
        large.put(key(number), bytes(1000))
    DiskCache(tmp_path, 20_000).put(key(200), bytes(1000))
    assert size_of(tmp_path) <= 20_000


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3000)
    (tmp_path / "mine.txt").write_text("x" * 5000)
    (tmp_path / "scalellm-frames" / "notes").write_text("y")
    for number in range(20):
        cache.put(key(number), bytes(1000))
    assert (tmp_path / "mine.txt").exists()
    assert (tmp_path / "scalellm-frames" / "notes").exists()


def test_a_wrong_sum_is_mended(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_064)
    for number in range(8):
        cache.put(key(number), bytes(1000))
    for text in ("rubbish", "", "9" * 20):
        (tmp_path / "scalellm-frames/.total").write_text(text)
        cache.put(key(100 + len(text)), bytes(1000))
        assert cache.get(key(100 + len(text)), 1000) is not None
        assert size_of(tmp_path) <= 10_064


def test_memory_keeps_the_frames_used_last() -> None:
    cache = MemoryCache(3000)
    for number in range(3):
        cache.put(key(number), bytes(1000))
    assert cache.get(key(0), 1000) is not None
    cache.put(key(3), bytes(1000))
    assert cache.get(key(1), 1000) is None
    assert cache.get(key(0), 999) is None
    cache.put(key(4), bytes(4000))
    assert all(cache.get(key(number), 1000) is None for number in range(5))
    cache.put(key(5), bytes(3000))
    assert cache.get(key(5), 3000) is not None


def test_a_folder_that_cannot_be_written_is_said_so(server: web.Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*/file cannot be written.*choose"):
        TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(tmp_path / "file"))


def test_a_folder_removed_meanwhile_only_ends_the_caching(
    server: web.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(tmp_path))
    dataset.read(0, 64)
    for path in sorted((tmp_path / "scalellm-frames").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "scalellm-frames").rmdir()
    np.testing.assert_array_equal(dataset.read(0, len(TOKENS)), TOKENS)
    assert capsys.readouterr().err.count("warning: ") == 1


def test_threads_share_it(server: web.Server, tmp_path: Path) -> None:
    dataset = TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(tmp_path, 100_000))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for at in np.random.default_rng(seed).integers(0, len(TOKENS) - 70, 100).tolist():
            if not np.array_equal(dataset.read(at, at + 70), TOKENS[at : at + 70]):
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert size_of(tmp_path) <= 100_000
