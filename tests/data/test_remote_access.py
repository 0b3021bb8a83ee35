"""The hub, missing packages, forks, threads and the end of a process: what is around a request."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import web
from helpers.token_datasets import random_documents, write_documents

from scalellm.config.location import RemoteOptions
from scalellm.data import TokenDataset
from scalellm.errors import DataError

DOCUMENTS = random_documents(64 * 9 + 10)
TOKENS = np.concatenate(DOCUMENTS)
FEW = RemoteOptions(retries=3, timeout_s=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("remote") / "data", DOCUMENTS)


@pytest.fixture
def server(folder: Path) -> Iterator[web.Server]:
    with web.serve(folder.parent) as server:
        yield server


def test_the_hub_is_asked_for_ranges_with_the_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    place = tmp_path / "datasets/user/name/resolve/v2"
    place.parent.mkdir(parents=True)
    place.symlink_to(folder.parent)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    netrc = tmp_path / "netrc"  # must not get in the token's way
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with web.serve(tmp_path) as hub, web.serve(tmp_path) as store:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with pytest.raises(DataError, match="hf://datasets/user/name/data holds no dataset"):
            TokenDataset.open("hf://datasets/user/name/data", remote=FEW)  # no revision main
        # As the real one does: large files are another host's, which must not see the token.
        hub.faults["tokens.zst"] = lambda number, handler: handler.plain(
            302, Location=store.url + handler.path
        )
        dataset = TokenDataset.open("hf://datasets/user/name@v2/data", remote=FEW)
        np.testing.assert_array_equal(dataset.read(0, len(TOKENS)), TOKENS)
        assert {seen.get("Authorization") for seen in hub.headers_seen} == {"Bearer hf_secret"}
        assert store.headers_seen
        assert {seen.get("Authorization") for seen in store.headers_seen} == {None}
        hub.faults["tokens.zst"] = web.refuse(401)
        with pytest.raises(DataError, match="HF_TOKEN") as error:
            TokenDataset.open("hf://datasets/user/name@v2/data", remote=FEW).read(0, 10)
        assert "hf_secret" not in str(error.value)


def test_a_web_server_is_given_what_netrc_says(
    server: web.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    TokenDataset.open(f"{server.url}/data", remote=FEW).read(0, 10)
    assert {seen.get("Authorization") for seen in server.headers_seen} == {"Basic bWU6c2VjcmV0"}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'fsspec and s3fs.*pip install "scalellm\[remote\]"'):
        TokenDataset.open("s3://bucket/data")


PROCESS = """
import os, sys, threading
from pathlib import Path
from scalellm.config.location import RemoteOptions
from scalellm.data import TokenDataset

dataset = TokenDataset.open(sys.argv[1], remote=RemoteOptions(Path(sys.argv[2]), retries=2))
first = dataset.read(0, 100).tobytes()
children = []
for _ in range(2):
    if (child := os.fork()) == 0:
        same = dataset.read(0, 100).tobytes() == first and len(dataset.read(100, 500)) == 400
        os._exit(0 if same else 1)
    children.append(child)
assert dataset.read(300, 500).shape == (200,)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_forks_read_on_and_the_process_ends_at_once(server: web.Server, tmp_path: Path) -> None:
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, f"{server.url}/data", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began_s < 30


def test_a_process_ends_while_a_request_hangs(server: web.Server) -> None:
    stop = threading.Event()
    server.faults["tokens"] = web.stall(stop)
    code = (
        "import sys, threading, time\n"
        "from scalellm.data import TokenDataset\n"
        "dataset = TokenDataset.open(sys.argv[1])\n"
        "threading.Thread(target=dataset.read, args=(0, 10), daemon=True).start()\n"
        "time.sleep(1)\n"
    )
    try:
        subprocess.run([sys.executable, "-c", code, f"{server.url}/data"], timeout=25, check=True)
    finally:
        stop.set()


def test_threads_fetch_at_once(server: web.Server) -> None:
    server.delay_s = 0.2
    dataset = TokenDataset.open(f"{server.url}/data", remote=FEW)
    assert dataset.fetch_threads > 1
    dataset.read(0, 1)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda at=at: results.append(int(dataset.read(at, at + 1)[0])))
        for at in (64, 128, 200, 400)
    ]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(int(TOKENS[at]) for at in (64, 128, 200, 400))
    assert time.monotonic() - began_s < 0.2 * 2 * 4 - 0.3
