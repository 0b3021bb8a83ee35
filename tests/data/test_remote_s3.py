"""A dataset in a bucket, through s3fs: a real S3 server, and one with faults."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import web
from helpers.token_datasets import random_documents, take, write_documents

from scalellm.config.location import RemoteOptions
from scalellm.data import TokenDataset
from scalellm.errors import DataError

pytest.importorskip("s3fs")

DOCUMENTS = random_documents(64 * 9 + 10)
TOKENS = np.concatenate(DOCUMENTS)
URL = "s3://bucket/data"
FEW = RemoteOptions(retries=3, timeout_s=10)
SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("s3") / "bucket" / "data", DOCUMENTS)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def faulty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[web.Server]:
    """Speaks as much of the protocol as reading needs: objects are at /bucket/key."""
    with web.serve(folder.parents[1]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def refuses(words: str, options: RemoteOptions = FEW) -> None:
    with pytest.raises(DataError, match=words) as error:
        TokenDataset.open(URL, remote=options).read(0, len(TOKENS))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_equal_the_local_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(process.stdout.readline())}")
        _upload(folder)
        dataset = TokenDataset.open(URL, remote=FEW)
        options = {"lanes": 3, "document_mask": True, "decode_threads": 4}
        local = take(TokenDataset.open(folder), 20, **options)
        for (batch, cursor), (same, there) in zip(take(dataset, 20, **options), local, strict=True):
            np.testing.assert_array_equal(batch.tokens_BS, same.tokens_BS)
            np.testing.assert_array_equal(batch.documents_BT, same.documents_BT)
            assert cursor == there
        dataset.verify()
        with pytest.raises(DataError, match="s3://bucket/other holds no dataset"):
            TokenDataset.open("s3://bucket/other", remote=FEW)
        with pytest.raises(DataError, match="s3://nowhere/data holds no dataset"):
            TokenDataset.open("s3://nowhere/data", remote=FEW)
        _damage("data/train/00001.tokens.zst")
        refuses(r"00001\.tokens\.zst: frame 0 does not match its crc32.*\(3 tries in")
    finally:
        process.kill()
        process.wait()


def _upload(folder: Path) -> None:
    import s3fs

    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.mkdir("bucket")
    bucket.put(str(folder), "bucket/data", recursive=True)


def _damage(name: str) -> None:
    import s3fs

    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    data = bytearray(bucket.cat_file(f"bucket/{name}"))
    data[10] ^= 1
    bucket.pipe_file(f"bucket/{name}", bytes(data))


@pytest.mark.parametrize(
    "fault",
    [web.refuse(503, 2), web.refuse(429, 1), web.cut(1), web.flip(9, 1), web.wrong_length(-2, 1)],
    ids=["503 twice", "429", "cut", "a flipped bit", "wrong length"],
)
def test_a_passing_fault_changes_nothing(faulty: web.Server, fault: web.Fault) -> None:
    faulty.faults["tokens.zst"] = fault
    dataset = TokenDataset.open(URL, remote=FEW)
    np.testing.assert_array_equal(dataset.read(0, len(TOKENS)), TOKENS)
    assert faulty.requests["bucket/data/train/00000.tokens.zst"] > 3
    assert faulty.methods <= {"GET", "HEAD"}


def test_tries_are_counted_by_us_alone(faulty: web.Server) -> None:
    faulty.faults["00000.tokens"] = web.refuse(500)
    refuses(r"frame 0 cannot be read \(3 tries in .*HTTP 500")
    assert faulty.requests["bucket/data/train/00000.tokens.zst"] == 3


@pytest.mark.parametrize(("status", "words"), [(403, "AWS_PROFILE"), (404, "no such file")])
def test_what_will_not_change_is_tried_once(faulty: web.Server, status: int, words: str) -> None:
    faulty.faults["00000.tokens"] = web.refuse(status)
    refuses(rf"\(1 try in .*{words}")
    assert faulty.requests["bucket/data/train/00000.tokens.zst"] == 1


def test_the_server_says_when_to_come_back(faulty: web.Server) -> None:
    faulty.faults["00000.tokens"] = web.refuse(503, 1, Retry_After="2")
    began_s = time.monotonic()
    assert TokenDataset.open(URL, remote=FEW).read(0, 1)[0] == TOKENS[0]
    assert time.monotonic() - began_s > 2.0


def test_a_stalled_server_is_left(faulty: web.Server) -> None:
    stop = threading.Event()
    faulty.faults["00000.tokens"] = web.stall(stop)
    began_s = time.monotonic()
    try:
        refuses("cannot be read .2 tries in", RemoteOptions(retries=2, timeout_s=0.5))
        assert time.monotonic() - began_s < 15
    finally:
        stop.set()


def test_a_server_without_ranges_is_refused_before_it_sends_all(faulty: web.Server) -> None:
    def endless(number: int, handler: web.Handler) -> bool:
        handler.reply(200, bytes(32 << 20))
        return True

    faulty.faults["tokens.zst"] = endless
    dataset = TokenDataset.open(URL, remote=FEW)
    with pytest.raises(DataError, match="ignores ranges"):
        dataset.read(0, 10)
    assert dataset.bytes_read < 1 << 20


def test_no_credentials(faulty: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    refuses(r"1 try in .*NoCredentialsError.*AWS_PROFILE")
