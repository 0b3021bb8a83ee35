"""Writing: what goes in comes out, and a dataset is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from helpers.token_datasets import EOS_ID, random_documents, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import DatasetWriter, TokenDataset
from scalellm.errors import DataError


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def new_writer(out: Path, **options: object) -> DatasetWriter:
    defaults: dict[str, object] = {"tokenizer_file": None, "tokenizer_kind": "none"}
    return DatasetWriter(out, vocab_size=1000, eos_id=EOS_ID, **{**defaults, **options})


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    frame_tokens=st.integers(5, 80),
    shard_frames=st.integers(1, 4),
)
def test_documents_survive_any_geometry(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    frame_tokens: int,
    shard_frames: int,
) -> None:
    documents = [np.append(np.arange(1, size), EOS_ID) for size in sizes]
    out = tmp_path_factory.mktemp("geometry") / "data"
    write_documents(out, documents, frame_tokens=frame_tokens, shard_frames=shard_frames)
    dataset = TokenDataset.open(out)
    dataset.verify()
    assert dataset.num_tokens == sum(sizes)
    assert dataset.num_documents == len(sizes)
    assert (dataset.num_bytes_text, dataset.num_words_text) == (3 * len(sizes), 2 * len(sizes))
    np.testing.assert_array_equal(dataset.read(0, sum(sizes)), np.concatenate(documents))
    np.testing.assert_array_equal(dataset.document_ends(0, sum(sizes)), np.cumsum(sizes))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    document = np.array([vocab_size - 1, EOS_ID])
    dataset = TokenDataset.open(
        write_documents(tmp_path / "data", [document], vocab_size=vocab_size)
    )
    assert dataset.dtype == dtype
    assert dataset.read(0, 2).tolist() == [vocab_size - 1, EOS_ID]


def test_plain_zstd_reads_a_shard(tmp_path: Path) -> None:
    documents = random_documents(500)
    out = write_documents(tmp_path / "data", documents, shard_frames=100)
    shard = out / "train" / "00000.tokens.zst"
    tool = shutil.which("zstd")
    if tool:
        raw = subprocess.run([tool, "-dc", shard], check=True, capture_output=True).stdout
        np.testing.assert_array_equal(np.frombuffer(raw, "<u2"), np.concatenate(documents))
    data = shard.read_bytes()
    num_frames, flags, magic = struct.unpack("<IBI", data[-9:])
    assert (num_frames, flags, magic) == (8, 0, 0x8F92EAB1)
    entries = np.frombuffer(data[-9 - 8 * num_frames : -9], "<u4").reshape(-1, 2)
    skippable = struct.unpack("<II", data[-17 - 8 * num_frames : -9 - 8 * num_frames])
    assert skippable == (0x184D2A5E, 8 * num_frames + 9)
    start = int(entries[:3, 0].sum())
    frame = data[start : start + int(entries[3, 0])]
    raw = zstandard.ZstdDecompressor().decompress(frame)
    assert len(raw) == entries[3, 1]
    np.testing.assert_array_equal(
        np.frombuffer(raw, "<u2"), np.concatenate(documents)[3 * 64 : 4 * 64]
    )


def test_the_same_documents_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_documents(tmp_path / name, random_documents(500)) for name in ("a", "b"))
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_tokenizer_is_copied_and_verified(tmp_path: Path) -> None:
    source = tmp_path / "my.model"
    source.write_bytes(b"pieces")
    with new_writer(tmp_path / "data", tokenizer_file=source, tokenizer_kind="bpe") as writer:
        writer.add("train", np.array([1, EOS_ID]))
        out = writer.finish()
    dataset = TokenDataset.open(out)
    assert dataset.tokenizer_path == out / "tokenizer.model"
    assert dataset.manifest.tokenizer is not None
    assert dataset.manifest.tokenizer.kind == "bpe"
    (out / "tokenizer.model").write_bytes(b"piecez")
    with pytest.raises(DataError, match=r"tokenizer\.model.*sha256"):
        _ = dataset.tokenizer_path


@pytest.mark.parametrize("source", ["missing.model", "notes.txt"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "notes.txt").write_text("no tokenizer")
    with pytest.raises(DataError, match="tokenizer"):
        new_writer(tmp_path / "data", tokenizer_file=tmp_path / source)
    assert left_over(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("bad", [1000, -1, 2**40])
def test_an_id_beyond_the_vocabulary_leaves_nothing(tmp_path: Path, bad: int) -> None:
    with new_writer(tmp_path / "data") as writer:
        writer.add("train", np.array([1, EOS_ID]))
        with pytest.raises(DataError, match=rf"token id {bad} .*1000 ids"):
            writer.add("train", np.array([bad, EOS_ID]))
        assert left_over(tmp_path) == []


def test_no_train_split_leaves_nothing(tmp_path: Path) -> None:
    with new_writer(tmp_path / "data") as writer:
        writer.add("validation", np.array([1, EOS_ID]))
        with pytest.raises(DataError, match="train split is empty"):
            writer.finish()
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("raises", [True, False])
def test_leaving_without_finish_leaves_nothing(tmp_path: Path, raises: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt), new_writer(tmp_path / "data") as writer:
        writer.add("train", np.array([1, EOS_ID]))
        assert len(left_over(tmp_path)) == 1
        if raises:
            raise KeyboardInterrupt
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "tokens", [np.array([1, 2]), np.array([], int), np.array([[1, 0]]), np.array([1.0, 0.0])]
)
def test_what_is_no_document_is_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    with new_writer(tmp_path / "data") as writer, pytest.raises(ValueError, match="a document"):
        writer.add("train", tokens)


def test_only_a_dataset_is_overwritten_and_only_when_told(tmp_path: Path) -> None:
    out = write_documents(tmp_path / "data", random_documents(100))
    with pytest.raises(DataError, match="already holds a dataset"):
        new_writer(out)
    assert TokenDataset.open(out).num_tokens == 100
    write_documents(out, random_documents(200), overwrite=True)
    assert TokenDataset.open(out).num_tokens == 200
    (out / "manifest.json").write_text('{"format": "scalellm-tokens", dam')
    write_documents(out, random_documents(300), overwrite=True)
    assert TokenDataset.open(out).num_tokens == 300
    assert left_over(tmp_path) == ["data"]


def test_other_people_s_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("five years")
    with pytest.raises(DataError, match="not empty and holds no dataset"):
        new_writer(tmp_path / "data", overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        new_writer(tmp_path / "data" / "thesis.txt", overwrite=True)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "five years"


def test_a_target_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    with new_writer(tmp_path / "data") as slow:
        slow.add("train", np.array([1, EOS_ID]))
        write_documents(tmp_path / "data", random_documents(50))
        with pytest.raises(DataError, match="already holds a dataset"):
            slow.finish()
    assert TokenDataset.open(tmp_path / "data").num_tokens == 50
    assert left_over(tmp_path) == ["data"]


def test_through_a_symlink_the_link_s_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "big-disk")
    write_documents(tmp_path / "data", random_documents(50))
    assert (tmp_path / "big-disk" / "manifest.json").is_file()
    assert TokenDataset.open(tmp_path / "data").read(0, 50).shape == (50,)


_WRITE_FOR_EVER = """
import sys, numpy as np
from pathlib import Path
from scalellm.data import DatasetWriter
with DatasetWriter(Path(sys.argv[1]), vocab_size=9, eos_id=0, tokenizer_file=None,
                   tokenizer_kind="none", frame_tokens=64, shard_tokens=128) as writer:
    for number in range(10**9):
        writer.add("train", np.zeros(50, np.int64))
        if number == 100:
            print("writing", flush=True)
"""


@contextlib.contextmanager
def writing_process(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _WRITE_FOR_EVER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"writing\n"
            yield process
        finally:
            process.kill()


def test_killed_writer_leaves_nothing_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with writing_process(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stale = left_over(tmp_path)
    assert len(stale) == 1
    assert stale[0].startswith("data.tmp-")
    for path in (out, tmp_path / stale[0]):
        with pytest.raises(DataError, match="holds no dataset"):
            TokenDataset.open(path)
    other = tmp_path / "database.tmp-1-beef"
    other.mkdir()
    write_documents(out, random_documents(100))
    TokenDataset.open(out).verify()
    assert left_over(tmp_path) == ["data", "database.tmp-1-beef"]


def test_a_living_writer_s_directory_stays(tmp_path: Path) -> None:
    with writing_process(tmp_path / "data"):
        (lock,) = tmp_path.glob("data.tmp-*/.writer.lock")
        write_documents(tmp_path / "data", random_documents(100))
        assert lock.exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny file system needs root")
    try:
        documents = random_documents(700_000, vocab_size=60_000)
        with pytest.raises(DataError, match=r"cannot write \d+ bytes to .*No space left.*free"):
            write_documents(
                tmp_path / "data", documents, vocab_size=60_000, frame_tokens=4096, shard_frames=50
            )
        assert left_over(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


_WRITE_WITH_FILE_LIMIT = """
import sys, resource, numpy as np
from pathlib import Path
from scalellm.data import DatasetWriter
from scalellm.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
tokens = np.random.default_rng(0).integers(1, 60_000, 100_000)
tokens[-1] = 0
try:
    with DatasetWriter(Path(sys.argv[1]), vocab_size=60_000, eos_id=0, tokenizer_file=None,
                       tokenizer_kind="none", frame_tokens=1024, shard_tokens=102400) as writer:
        writer.add("train", tokens)
except DataError as error:
    print(error)
"""


def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", _WRITE_WITH_FILE_LIMIT, str(tmp_path / "data")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("cannot write ")
    assert "File too large" in shown.stdout
    assert left_over(tmp_path) == []
