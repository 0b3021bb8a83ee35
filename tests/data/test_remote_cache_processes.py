"""The cache of frames between processes: some share it, one is killed, one meets a full disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from helpers import web
from helpers.token_datasets import random_documents, write_documents
from helpers.web import size_of

from scalellm.data._cache import DiskCache


def key(number: int) -> str:
    return f"{number:064x}-0"


WRITER = """
import random, sys
from pathlib import Path
from scalellm.data._cache import DiskCache

cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]))
generator = random.Random(int(sys.argv[3]))
for _ in range(600):
    number = generator.randrange(60)
    size = 500 + 37 * number
    data = cache.get(f"{number:064x}-0", size)
    assert data is None or data == bytes([number]) * size
    if data is None:
        cache.put(f"{number:064x}-0", bytes([number]) * size)
"""


def test_processes_share_it_and_the_cap_holds_at_every_moment(tmp_path: Path) -> None:
    limit_bytes = 40_000
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(limit_bytes), str(seed)])
        for seed in range(3)
    ]
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(size_of(tmp_path))
        time.sleep(0.005)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert max(seen) > limit_bytes // 2
    # Looking is not atomic: a frame may be counted under its old and its new name.
    assert max(seen) <= limit_bytes + 3000
    assert size_of(tmp_path) <= limit_bytes
    assert not list((tmp_path / "scalellm-frames/.writing").iterdir())


KILLED = """
import os, sys, time
from pathlib import Path
from scalellm.data import _cache

def half(file, data):
    os.write(file, data[: len(data) // 2])
    print("half", flush=True)
    time.sleep(60)

_cache._write_all = half
_cache.DiskCache(Path(sys.argv[1]), 100_000).put("0" * 64 + "-0", bytes(50_000))
"""


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    writing = tmp_path / "scalellm-frames/.writing"
    living = DiskCache(tmp_path, 100_000)
    living.put(key(1), bytes(40_000))
    assert len(list(writing.iterdir())) == 1  # its writer lives
    living.put(key(2), bytes(30_000))  # no room beside what the writer reserved, but for one
    assert size_of(tmp_path) + 25_000 <= 100_000
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    DiskCache(tmp_path, 100_000)
    assert not list(writing.iterdir())
    assert living.get("0" * 64 + "-0", 50_000) is None


def test_a_full_disk_switches_it_off_with_one_warning(tmp_path: Path) -> None:
    """A real error of the system: no file may grow beyond 50 bytes."""
    documents = random_documents(64 * 30)
    tokens, cache = np.concatenate(documents), tmp_path / "cache"
    write_documents(tmp_path / "data", documents)
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from scalellm.config.location import RemoteOptions\n"
        "from scalellm.data import TokenDataset\n"
        "dataset = TokenDataset.open(sys.argv[1], remote=RemoteOptions(Path(sys.argv[2])))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "print(dataset.read(0, dataset.num_tokens).sum(), dataset.read(0, 640).sum())\n"
    )
    with web.serve(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{server.url}/data", str(cache)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout.split() == [str(tokens.sum()), str(tokens[:640].sum())]
    assert done.stderr.count("warning: ") == 1
    assert "takes no more frames (File too large)" in done.stderr
    assert not list((cache / "scalellm-frames").glob("*-*"))
    assert not list((cache / "scalellm-frames/.writing").iterdir())
