"""A dataset behind a URL: the same batches as from a folder, whatever the server does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from helpers import web
from helpers.token_datasets import random_documents, take, write_documents

from scalellm.config.location import RemoteOptions
from scalellm.data import TokenDataset
from scalellm.errors import DataError

DOCUMENTS = random_documents(64 * 9 + 10)
TOKENS = np.concatenate(DOCUMENTS)
NAMES = ["manifest.json", "train/00000.tokens.zst", "train/00001.docs.zst", "train/00000.index"]
FEW = RemoteOptions(retries=3, timeout_s=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of up to three frames, in the folder `data`."""
    return write_documents(tmp_path_factory.mktemp("remote") / "data", DOCUMENTS)


@pytest.fixture
def server(folder: Path) -> Iterator[web.Server]:
    with web.serve(folder.parent) as server:
        yield server


def read_all(server: web.Server, options: RemoteOptions = FEW) -> np.ndarray:
    dataset = TokenDataset.open(f"{server.url}/data", remote=options)
    np.testing.assert_array_equal(
        dataset.document_ends(0, dataset.num_tokens),
        np.cumsum([len(document) for document in DOCUMENTS]),
    )
    return dataset.read(0, dataset.num_tokens)


def refuses(server: web.Server, words: str, options: RemoteOptions = FEW) -> str:
    with pytest.raises(DataError, match=words) as error:
        read_all(server, options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize("threads", [0, 4])
def test_batches_and_cursors_equal_the_local_ones(
    folder: Path, server: web.Server, threads: int
) -> None:
    options = {"lanes": 3, "document_mask": True, "decode_threads": threads}
    local = take(TokenDataset.open(folder), 30, **options)
    dataset = TokenDataset.open(f"{server.url}/data/", remote=FEW)
    for (batch, cursor), (same, there) in zip(take(dataset, 30, **options), local, strict=True):
        np.testing.assert_array_equal(batch.tokens_BS, same.tokens_BS)
        np.testing.assert_array_equal(batch.documents_BT, same.documents_BT)
        assert cursor == there
    middle = local[10][1]  # a cursor of the folder, resumed from the URL
    [(batch, _)] = take(dataset, 1, **options, cursor=middle)
    np.testing.assert_array_equal(batch.tokens_BS, local[11][0].tokens_BS)
    assert server.methods == {"GET"}


def test_a_remote_dataset_verifies_and_lends_its_tokenizer(tiny_dataset: Path) -> None:
    mine = TokenDataset.open(tiny_dataset).tokenizer_path
    assert mine is not None
    with web.serve(tiny_dataset.parent) as server:
        dataset = TokenDataset.open(f"{server.url}/data", remote=FEW)
        dataset.verify()
        server.faults[mine.name] = web.flip(5, 1)
        copy = dataset.tokenizer_path
        assert copy is not None
        assert (copy.name, copy.read_bytes()) == (mine.name, mine.read_bytes())
        server.faults[mine.name] = web.flip(5)
        with pytest.raises(DataError, match="does not match its sha256"):
            _ = dataset.tokenizer_path
    del dataset
    assert not copy.parent.exists()


FAULTS = {
    "503 twice": web.refuse(503, 2),
    "429 once": web.refuse(429, 1),
    "cut in the body": web.cut(2),
    "a flipped bit": web.flip(123, 2),
    "a shorter range": web.short(3, 1),
    "too short by its header": web.wrong_length(-3, 1),
    "too long by its header": web.wrong_length(3, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_passing_fault_changes_nothing(server: web.Server, fault: str, name: str) -> None:
    server.faults[name] = FAULTS[fault]
    np.testing.assert_array_equal(read_all(server), TOKENS)
    # A header beyond the bytes asked for does not matter, and a manifest is asked for as a whole.
    if fault != "too long by its header" and (fault, name) != ("a shorter range", NAMES[0]):
        assert server.requests["data/" + name] > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_that_stays_never_reaches_a_batch(server: web.Server, name: str) -> None:
    size_bytes = (server.root / "data" / name).stat().st_size
    generator = np.random.default_rng(len(name))
    once = RemoteOptions(retries=1)
    for bit in generator.integers(0, size_bytes * 8, 15).tolist():
        server.faults[name] = web.flip(bit)
        refuses(server, name, once)


def test_a_redirect_is_followed(server: web.Server) -> None:
    (server.root / "moved").symlink_to(server.root)
    try:
        server.faults["tokens.zst"] = lambda number, handler: (
            not handler.path.startswith("/moved")
            and handler.plain(307, Location=f"/moved{handler.path}")
        )
        np.testing.assert_array_equal(read_all(server), TOKENS)
        assert server.requests["moved/data/train/00000.tokens.zst"]
    finally:
        (server.root / "moved").unlink()


def test_the_error_says_where_how_often_and_why(server: web.Server) -> None:
    name = "data/train/00001.tokens.zst"
    server.faults[name] = web.flip(40)
    text = refuses(server, r"frame 0 does not match its crc32.*\(3 tries in \d\.\d s\); ")
    assert text.startswith(f"{server.url}/{name}: frame 0 ")
    assert server.requests[name] == 3
    server.faults[name] = web.refuse(502)
    refuses(server, r"frame 0 cannot be read \(3 tries in .*HTTP 502; .* data.retries=3 tries")


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (403, "netrc"), (401, "netrc"), (418, "HTTP 418")]
)
def test_what_will_not_change_is_tried_once(server: web.Server, status: int, words: str) -> None:
    server.faults["00000.tokens"] = web.refuse(status)
    refuses(server, rf"\(1 try in .*{words}")
    assert server.requests["data/train/00000.tokens.zst"] == 1


def test_no_dataset_there(server: web.Server) -> None:
    with pytest.raises(DataError, match=r"/nothing holds no dataset: manifest\.json is missing"):
        TokenDataset.open(f"{server.url}/nothing", remote=FEW)
    with pytest.raises(DataError, match=r"no split 'trian'.*did you mean 'train'"):
        TokenDataset.open(f"{server.url}/data", "trian", FEW)


@pytest.mark.parametrize("as_date", [False, True])
def test_the_server_says_when_to_come_back(server: web.Server, as_date: bool) -> None:
    after = formatdate(time.time() + 2.5, usegmt=True) if as_date else "2"
    server.faults["00000.tokens"] = web.refuse(503, 1, Retry_After=after)
    began_s = time.monotonic()
    np.testing.assert_array_equal(read_all(server), TOKENS)
    assert time.monotonic() - began_s > (1.0 if as_date else 2.0)
    server.faults["00000.tokens"] = web.refuse(503, Retry_After="86400")
    refuses(server, r"\(1 try in .* asks to wait 86400 s")


def test_waits_grow_and_differ(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: list[float] = []
    monkeypatch.setattr(time, "sleep", waits_s.append)
    server.faults["manifest"] = web.refuse(500)
    for _ in range(2):
        with pytest.raises(DataError, match="8 tries"):
            TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(retries=8))
    waits_s = [wait_s for wait_s in waits_s if wait_s]  # without the server's own
    first, second = waits_s[:7], waits_s[7:]
    assert len(second) == 7
    assert first != second
    for number, wait_s in enumerate(first):
        assert 0.1 * 2**number <= wait_s <= 0.2 * 2**number


@pytest.mark.parametrize("headers_first", [False, True])
def test_a_stalled_server_is_left(server: web.Server, headers_first: bool) -> None:
    stop = threading.Event()
    options = RemoteOptions(retries=2, timeout_s=0.4)
    try:
        server.faults["00000.tokens"] = web.stall(stop, 1, headers_first)
        np.testing.assert_array_equal(read_all(server, options), TOKENS)
        server.faults["00000.tokens"] = web.stall(stop, headers_first=headers_first)
        began_s = time.monotonic()
        refuses(server, r"no answer within 0\.4 s", options)
        assert time.monotonic() - began_s < 10
    finally:
        stop.set()


def test_a_server_without_ranges_is_refused_before_it_sends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "data", DOCUMENTS)
    with web.serve(tmp_path) as server:

        def endless(number: int, handler: web.Handler) -> bool:
            handler.reply(200, bytes(64 << 20))
            return True

        server.faults["tokens.zst"] = endless
        dataset = TokenDataset.open(f"{server.url}/data", remote=FEW)
        with pytest.raises(DataError, match=r"1 try in .*ignores ranges .* answers 206"):
            dataset.read(0, 100)
        assert dataset.bytes_read < 1 << 20
        # Whole files need no ranges.
        server.faults = {"manifest": web.without_ranges, "index": web.without_ranges}
        np.testing.assert_array_equal(read_all(server), TOKENS)


def test_a_large_manifest_is_not_read(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.data.format.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(DataError, match="bytes or more, the limit is 100 bytes"):
        TokenDataset.open(f"{server.url}/data", remote=FEW)


def test_a_file_that_ends_early(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for file in folder.rglob("*.*"):
        copy = tmp_path / "data" / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    os.truncate(tmp_path / "data/train/00000.tokens.zst", 20)
    with web.serve(tmp_path) as server:
        refuses(server, "ends at byte 20")
        with pytest.raises(DataError, match=r"has 20 bytes, the manifest says \d+ bytes"):
            TokenDataset.open(f"{server.url}/data", remote=FEW).open_split("train").verify()
        os.truncate(tmp_path / "data/train/00001.tokens.zst", 0)
        with pytest.raises(DataError, match="HTTP 416"):
            TokenDataset.open(f"{server.url}/data", remote=FEW).read(64 * 3, 64 * 4)


def test_a_dead_server_is_named(folder: Path) -> None:
    with web.serve(folder.parent) as server:
        dataset = TokenDataset.open(f"{server.url}/data", remote=RemoteOptions(retries=2))
        dataset.read(0, 10)
    with pytest.raises(DataError, match=r"frame 1 cannot be read \(2 tries in"):
        dataset.read(64, 100)
