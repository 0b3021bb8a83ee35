"""`scalellm data verify`: all damage, each once and by name, and what does not belong."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import forge_index, forge_manifest, random_documents, write_documents

from scalellm.cli import main
from scalellm.data.format import INDEX_HEADER, INDEX_RECORD
from scalellm.data.tools.verify import Verification, verify_dataset
from scalellm.errors import DataError, UserError

NUM_TOKENS = 64 * 20 + 10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,290 tokens: seven shards of three frames, the last one short."""
    return write_documents(tmp_path_factory.mktemp("verify") / "data", random_documents(NUM_TOKENS))


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def check(path: Path, workers: int = 2) -> Verification:
    return verify_dataset(path, workers, progress=False)


def damage(path: Path, workers: int = 2) -> list[str]:
    """The damage, with paths from the dataset on."""
    return [line.removeprefix(f"{path}/") for line in check(path, workers).damage]


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_a_sound_dataset(path: Path, workers: int) -> None:
    result = check(path, workers)
    assert (result.damage, result.strangers) == ((), ())
    assert (result.num_files, result.num_frames) == (1 + 3 * 7, 21)
    assert result.size_bytes == sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    [line] = result.lines()
    assert "is sound: 22 files, 21 frames" in line
    assert "MB/s" in line
    result.raise_damage()


def test_a_real_dataset_with_its_tokenizer(tiny_dataset: Path, tmp_path: Path) -> None:
    assert damage(tiny_dataset) == []
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    flip(copy / "tokenizer.model", 100)
    assert damage(copy) == ["tokenizer.model: does not match its sha256: it was changed or damaged"]
    (copy / "tokenizer.model").unlink()
    assert damage(copy) == ["tokenizer.model cannot be opened: No such file or directory"]


@pytest.mark.parametrize("workers", [1, 4])
def test_all_damage_is_listed_in_order(path: Path, workers: int) -> None:
    train = path / "train"
    index = np.fromfile(train / "00001.index", INDEX_RECORD, offset=INDEX_HEADER.itemsize)
    for frame in (0, 2):
        flip(train / "00001.tokens.zst", int(index["offset"][frame]) + 9)
    flip(train / "00003.index", 40)
    os.truncate(train / "00004.docs.zst", 5)
    (train / "00006.tokens.zst").unlink()
    lines = damage(path, workers)
    changed = "does not match its sha256: it was changed or damaged"
    bad_frame = "does not match its crc32: it was changed or damaged"
    # The size comes from the reader too, in the same words: one line.
    assert lines[4].startswith("train/00004.docs.zst has 5 bytes, the manifest says")
    assert lines[:4] + lines[5:] == [
        f"train/00001.tokens.zst: {changed}",
        f"train/00001.tokens.zst: frame 0 {bad_frame}",
        f"train/00001.tokens.zst: frame 2 {bad_frame}",
        f"train/00003.index: {changed}",
        "train/00006.tokens.zst cannot be opened: No such file or directory",
    ]


@pytest.mark.parametrize("name", ["00000.tokens.zst", "00002.docs.zst", "00006.index"])
def test_every_flipped_bit_is_found(path: Path, name: str) -> None:
    file = path / "train" / name
    whole = file.read_bytes()
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    for bit in generator.choice(len(whole) * 8, 40, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert f"train/{name}: does not match its sha256: it was changed or damaged" in damage(path)


def test_what_only_the_content_tells_although_all_is_signed(path: Path) -> None:
    def wrong_carry(records: np.ndarray) -> None:
        records["carry"][1] ^= 1

    forge_index(path, wrong_carry)
    forge_index(path, lambda records: np.put(records["carry"], 2, 0), shard=3)
    lines = damage(path)
    words = "does not start with the carry token of the frame before"
    assert lines == [
        f"train/00000.tokens.zst: frame 2 {words}",
        f"train/00004.tokens.zst: frame 0 {words}",
    ]


def test_counts_that_lie(path: Path) -> None:
    def lie(fields: dict[str, Any]) -> None:
        split = fields["splits"]["train"]
        split["shards"][2]["num_documents"] += 1
        split["num_documents"] += 1

    forge_manifest(path, lie)
    [line] = damage(path)
    assert line.startswith("train/00002.docs.zst: has ")
    assert "document ends, the manifest says" in line


def test_documents_that_do_not_end_with_the_end_of_text(path: Path) -> None:
    forge_manifest(path, lambda fields: fields.update(eos_id=999))
    lines = damage(path)
    assert len(lines) > 10
    assert all("where the id is 0 and not the end of text 999" in line for line in lines)
    assert lines[0].startswith("train/00000.docs.zst: frame 0 ends a document at token ")


def test_files_that_do_not_belong_are_mentioned_and_no_damage(path: Path) -> None:
    (path / "train" / "00007.tokens.zst").write_bytes(b"old")
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("x")
    result = check(path)
    assert result.strangers == ("notes/mine.txt", "train/00007.tokens.zst")
    assert result.damage == ()
    assert f"note: {path / 'notes/mine.txt'} does not belong to the dataset" in result.lines()


def test_a_pipe_is_damage_and_is_not_waited_for(path: Path) -> None:
    file = path / "train" / "00005.docs.zst"
    file.unlink()
    os.mkfifo(file)
    assert damage(path) == ["train/00005.docs.zst is not a regular file"]


def test_a_damaged_manifest_is_one_sentence(path: Path) -> None:
    flip(path / "manifest.json", 300)
    with pytest.raises(DataError, match=r"manifest\.json"):
        check(path)


@pytest.mark.parametrize("workers", [-1, 257])
def test_workers_out_of_range(path: Path, workers: int) -> None:
    with pytest.raises(UserError, match=rf"--workers={workers} threads is not 0"):
        check(path, workers)


def test_at_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(path)]) == 0
    assert "is sound" in capsys.readouterr().out
    for name in ("00000.docs.zst", "00001.index"):
        flip(path / "train" / name, 30)
    assert main(["data", "verify", str(path), "--workers", "1"]) == 2
    printed = capsys.readouterr()
    assert "train/00000.docs.zst: does not match its sha256" in printed.out
    assert "train/00001.index: does not match its sha256" in printed.out
    assert "is sound" not in printed.out
    said = printed.err.splitlines()[-1]
    assert said.startswith(f"scalellm: {path} is damaged: 3 faults were found, listed above; ")
    assert main(["data", "verify", "https://host/data"]) == 2
    assert "is a URL" in capsys.readouterr().err
