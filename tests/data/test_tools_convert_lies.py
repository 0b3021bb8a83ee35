"""Sources that are damaged or lie: one sentence, nothing written or allocated."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from helpers.foreign_files import ndarray_bytes, write_llm_c, write_mds, write_megatron

from scalellm.data.tools import _vocabulary
from scalellm.data.tools._foreign import ReadForeign
from scalellm.data.tools.convert import ConvertOptions, convert
from scalellm.errors import UserError

HEADER_BYTES = 34


def refuses(source: Path, words: str, **options: Any) -> None:
    out = source.parent / "made" / "out"
    options = {"eos_id": 0, "vocab_size": 1000, **options}
    with pytest.raises(UserError, match=words) as error:
        convert(ConvertOptions(sources=(source,), out=out, **options), progress=False)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    return write_megatron(tmp_path / "in", [[[1, 2], [3]], [[4, 5, 6]], [[7]]])


def forge(file: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "code", "value", "words"),
    [
        (0, "<Q", 0, "is no Megatron index of version 1"),
        (9, "<Q", 2, "is no Megatron index of version 1"),
        (17, "<B", 7, "has ids of type code 7"),
        (17, "<B", 200, "has ids of type code 200"),
        (18, "<Q", 2**63, "is cut off or damaged"),
        (18, "<Q", 2**64 - 1, "is cut off or damaged"),
        (26, "<Q", 10**15, "is cut off or damaged"),
        (HEADER_BYTES, "<i", -2, "sequence 0 of -2 ids"),
        (HEADER_BYTES, "<i", 2**31 - 1, "sequence 1 of 1 ids starts at byte 4, but"),
        (HEADER_BYTES + 12, "<i", 2**31 - 1, "one of the two is cut off"),
        (HEADER_BYTES + 16 + 8, "<q", -8, "sequence 1 of 1 ids starts at byte -8"),
        (HEADER_BYTES + 16 + 8, "<q", 2**62, "sequence 1 of 1 ids starts at byte 4611"),
        (HEADER_BYTES + 48, "<q", 1, "no document bound at sequence 0"),
        (HEADER_BYTES + 48 + 8, "<q", 4, "do not rise from 0 to its 4 sequences"),
        (HEADER_BYTES + 48 + 8, "<q", -1, "do not rise from 0 to its 4 sequences"),
        (HEADER_BYTES + 48 + 24, "<q", 2**40, "do not rise from 0 to its 4 sequences"),
    ],
)
def test_a_lying_megatron_index(megatron: Path, at: int, code: str, value: int, words: str) -> None:
    forge(megatron.with_name("in.idx"), lambda data: struct.pack_into(code, data, at, value))
    refuses(megatron, words)


@pytest.mark.parametrize("keep", [0, 20, 33, 34, 60, 100])
def test_a_truncated_megatron_index(megatron: Path, keep: int) -> None:
    os.truncate(megatron.with_name("in.idx"), keep)
    refuses(megatron, "its header alone|is cut off", kind="megatron")


@pytest.mark.parametrize("size", [0, 13, 15])
def test_megatron_ids_that_are_too_few_or_too_many(megatron: Path, size: int) -> None:
    os.truncate(megatron.with_name("in.bin"), size)
    refuses(megatron, rf"in.bin has {size} bytes, its index speaks of 14")


def test_other_megatron_files(tmp_path: Path, megatron: Path) -> None:
    write_megatron(tmp_path / "images", [[[1, 2]]], modes=[1])
    refuses(tmp_path / "images", "is multimodal")
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    refuses(tmp_path / "old", "old fairseq kind")
    megatron.with_name("in.bin").unlink()
    refuses(megatron, "in.bin: No such file")
    refuses(tmp_path / "nowhere", "there is no .*nowhere")
    refuses(tmp_path / "nowhere", "nowhere.idx: No such file", kind="megatron")


@pytest.mark.parametrize("value", [-1, 1000, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_named(tmp_path: Path, value: int) -> None:
    source = write_megatron(tmp_path / "in", [[[1, 2]], [[3, value, 4]]], "int32")
    words = "the negative token id -1" if value < 0 else f"token id {value}, outside the vocabulary"
    refuses(source, f"document 1 holds {words}")


def test_an_id_beyond_every_vocabulary_is_named_by_the_scan(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "in", [[[1, 2**40]]], "int64")
    refuses(source, "token id 1099511627776, the limit is", vocab_size=None)
    negative = write_megatron(tmp_path / "negative", [[[1, -5]]], "int64")
    refuses(negative, "document 0 holds the negative token id -5", vocab_size=None)


def test_flat_files(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(b"\x01\x00\x02")
    refuses(path, "has 3 bytes, no multiple of the 2 bytes of a uint16")
    path.write_bytes(b"")
    refuses(path, "no document is left for the train split")
    refuses(path, "the sources hold no document", vocab_size=None)
    write_llm_c(path, np.arange(300, dtype="<u2"))
    os.truncate(path, 1024 + 400)
    refuses(path, "promises 300 ids of 2 bytes after its header and has 200")
    write_llm_c(path, np.arange(300, dtype="<u2"), version=2)
    refuses(path, "has a header of version 2, not 1")
    write_llm_c(path, np.arange(300, dtype="<u2"), magic=20240522)
    refuses(path, "holds evaluation questions")
    forge(write_llm_c(path, np.arange(9, dtype="<u2")), lambda d: struct.pack_into("<i", d, 8, -9))
    refuses(path, "promises -9 ids")
    write_llm_c(path, np.arange(9, dtype="<u2"))
    refuses(path, "says it holds uint16; leave it out", read=ReadForeign(dtype="uint32"))
    np.arange(9, dtype="<u2").tofile(path)
    refuses(path, "--dtype='float32' is no integer type", read=ReadForeign(dtype="float32"))


def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.bin")
    refuses(tmp_path / "train.bin", "is no regular file", kind="nanogpt")


COLUMNS = {"tokens": ("ndarray:uint16", None)}


@pytest.fixture(params=[None, "zstd"])
def mds(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rows = [[ndarray_bytes(np.array(ids, np.uint16))] for ids in ([1, 2, 3], [4, 5])]
    return write_mds(tmp_path / "in", [rows], COLUMNS, compression=request.param)


def forge_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "index.json"
    fields = json.loads(file.read_text())
    change(fields["shards"][0])
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shard: shard.update(version=1), "only mds, version 2"),
        (lambda shard: shard.update(format="csv"), "only mds, version 2"),
        (lambda shard: shard.pop("raw_data"), "is no index of MDS shards"),
        (lambda shard: shard.update(samples=-1), "with -1 samples"),
        (lambda shard: shard.update(samples=10**15), "with 1000000000000000 samples"),
        (lambda shard: shard["raw_data"].update(basename="../in/x"), "is no plain file name"),
        (lambda shard: shard["raw_data"].update(basename="/etc/passwd"), "is no plain file name"),
        (lambda shard: shard["raw_data"].update(bytes=-1), "with -1 bytes"),
        (lambda shard: shard["raw_data"].update(bytes=2**63), "with 9223372036854775808 bytes"),
        (lambda shard: shard.update(column_sizes=[-3]), "columns and their sizes"),
        (lambda shard: shard.update(column_sizes=[]), "columns and their sizes"),
        (lambda shard: shard.update(column_names=["text"]), "has no column input_ids or tokens"),
        (lambda shard: shard.update(column_encodings=["pkl"]), "holds pkl, no row of integers"),
        (lambda shard: shard.update(column_encodings=["ndarray:float32"]), "no row of integers"),
        (lambda shard: shard.update(column_encodings=["bytes"]), "say which integers they are"),
        (lambda shard: shard.update(column_encodings=["ndarray:int64"]), "is no row of ids"),
        (lambda shard: shard.update(column_sizes=[8]), "is no row of ids"),
    ],
)
def test_a_lying_mds_index(
    mds: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    forge_json(mds, change)
    refuses(mds, words)


def test_mds_hashes_are_checked(mds: Path) -> None:
    file = next(mds.glob("shard*"))
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 29):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        refuses(mds, "does not match its sha1")
    file.write_bytes(whole[:-1])
    refuses(mds, rf"has {len(whole) - 1} bytes, its index says {len(whole)}")
    file.unlink()
    refuses(mds, "No such file")


def test_an_mds_shard_whose_header_lies(tmp_path: Path) -> None:
    rows = [[ndarray_bytes(np.array(ids, np.uint16))] for ids in ([1, 2, 3], [4, 5])]
    for number, (at, value) in enumerate(
        [(0, 3), (0, 2**32 - 1), (4, 0), (4, 2**32 - 1), (8, 10**6), (12, 5), (12, 2**31)]
    ):
        folder = write_mds(tmp_path / f"in{number}", [rows], COLUMNS, hashes=[])
        forge(folder / "shard.00000.mds", lambda d, a=at, v=value: struct.pack_into("<I", d, a, v))
        refuses(folder, "has a header that lies")


@pytest.mark.parametrize("at", [0, 4, 5])
def test_an_mds_sample_that_lies(tmp_path: Path, at: int) -> None:
    # The column's size, the array's number of axes, its length.
    rows = [[ndarray_bytes(np.array([1, 2, 3], np.uint16))]]
    folder = write_mds(tmp_path / "in", [rows], COLUMNS, hashes=[])
    first = 4 * 3 + len('{"format": "mds"}')
    forge(folder / "shard.00000.mds", lambda data: data.__setitem__(first + at, 255))
    refuses(folder, "sample 0 is no row of ids")


@pytest.mark.parametrize("mds", ["zstd"], indirect=True)
def test_a_zstd_bomb_stops_at_the_size_it_declares(mds: Path) -> None:
    packed = next(mds.glob("*.zstd"))
    packed.write_bytes(zstandard.ZstdCompressor().compress(bytes(256 << 20)))

    def lie(shard: dict[str, Any]) -> None:
        shard["zip_data"].update(bytes=packed.stat().st_size, hashes={})

    forge_json(mds, lie)
    refuses(mds, "does not hold the")


@pytest.mark.parametrize("mds", ["zstd"], indirect=True)
def test_other_compressions_are_named(mds: Path) -> None:
    forge_json(mds, lambda shard: shard.update(compression="br:11"))
    refuses(mds, "is compressed with 'br'; zstd and gz can be read")


def test_hugging_face_sources(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "in.parquet"
    for column, words in (
        (pa.array([[1, 2], None]), "row 1 is null"),
        (pa.array([[1, 2], [3, None]]), "has an id that is null"),
        (pa.array(["a", "b"]), "holds string where token ids are expected"),
        (pa.array([[1.5], [2.5]]), "holds list.* where token ids are expected"),
    ):
        pq.write_table(pa.table({"input_ids": column}), path)
        refuses(path, words)
    pq.write_table(pa.table({"ids": pa.array([[1]])}), path)
    refuses(path, "has no column input_ids or tokens.*--column.*ids")
    refuses(path, "has no column 'idz'; its columns are: ids", read=ReadForeign(column="idz"))
    os.truncate(path, path.stat().st_size - 5)
    refuses(path, "is damaged or of another format")
    arrow = tmp_path / "in.arrow"
    arrow.write_bytes(b"ARROW1\x00\x00" + bytes(50))
    refuses(arrow, "is damaged or of another format")


@pytest.mark.parametrize("name", ["../in.arrow", "/etc/passwd", "", 5, None])
def test_a_saved_dataset_that_names_files_outside(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    refuses(folder, "outside itself")


def test_what_cannot_be_asked_for(tmp_path: Path, megatron: Path, tiny_dataset: Path) -> None:
    refuses(megatron, "did you mean 'megatron'", kind="megatrn")
    refuses(megatron, "--eos-id=1000 is not below the vocabulary of 1000 ids", eos_id=1000)
    refuses(megatron, "--eos-id=-1 is not 0 to", eos_id=-1)
    refuses(megatron, "--vocab-size=0 ids is not 1 to", vocab_size=0)
    refuses(megatron, "--vocab-size=5 ids is below the", vocab_size=5, tokenizer=tiny_dataset)
    refuses(megatron, "--val-fraction=1.0 is not a share", val_fraction=1.0)
    refuses(megatron, "leaves no document for validation", val_fraction=1e-9)
    refuses(megatron, "no document is left for the train split", val_fraction=1 - 1e-9)
    refuses(megatron, "gives 2 names for 1 sources", split_names=("train", "validation"))
    refuses(megatron, "is not a lower-case word", split_names=("Train",))
    refuses(megatron, "no document is left for the train split", split_names=("test",))
    refuses(tiny_dataset, "is a scalellm dataset already")
    (tmp_path / "notes.txt").write_text("text")
    refuses(tmp_path / "notes.txt", "looks like none of megatron, mds, hf, nanogpt")


def test_a_source_that_changes_meanwhile_is_noticed(
    megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*arguments: Any) -> Any:
        os.utime(megatron.with_name("in.bin"), (1, 1))
        return _vocabulary.choose_vocabulary(*arguments)

    monkeypatch.setattr("scalellm.data.tools.convert.choose_vocabulary", touch)
    refuses(megatron, "a source was changed while it was read")


def test_what_is_there_is_not_replaced(tmp_path: Path, megatron: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is taken|holds no dataset"):
            convert(
                ConvertOptions(sources=(megatron,), out=out, overwrite=overwrite), progress=False
            )
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
