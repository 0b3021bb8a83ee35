"""JSON lines and Parquet: streamed, damage and mistakes named with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from helpers.reading import read, texts

from scalellm.data import lines
from scalellm.data.documents import ReadOptions, Tally
from scalellm.errors import DataError, UserError


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    data = json_lines({"text": "first\nline", "id": 1}, {"text": None}, {"text": "第二"}) + b"\n"
    two_frames = zstandard.compress(data[:20]) + zstandard.compress(data[20:])
    packed = {"": data, ".gz": gzip.compress(data), ".zst": two_frames}[suffix]
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(packed)
    tally = Tally()
    found = read(path, tally=tally)
    assert [one.text for one in found] == ["first\nline", "第二"]
    assert [one.origin for one in found] == [f"{path}:1", f"{path}:3"]
    assert tally.dropped == {"no text": 1}


@pytest.mark.parametrize("block_bytes", [1, 7, 64])
def test_lines_over_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(lines, "_ZSTD_BLOCK_BYTES", block_bytes)
    records = [{"text": "语言" * n} for n in range(20)]
    data = json_lines(*records).rstrip(b"\n")
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.ndjson.zst").write_bytes(zstandard.compress(data))
    assert texts(tmp_path) == 2 * [record["text"] for record in records]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"data\.jsonl:2 is not a line of JSON: Unterminated string"),
        (b"[" * 100_000, r"data\.jsonl:2 is not a line of JSON: .*recursion"),
        (b'["text"]', r"data\.jsonl:2 holds list, not an object"),
        (b'{"content": "a", "id": 1}', r":2 has no field 'text'; its fields are content, id"),
        (b'{"texts": "a"}', r"--text-field; did you mean 'texts'"),
        (b'{"text": 3, "body": "b"}', r":2: field 'text' holds int, not text; .*text, body"),
        (b'{"text": "\xe9"}', r":2 is not utf-8 \(byte 10 of the line\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(json_lines({"text": "good"}) + line + b"\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_field_and_an_encoding_can_be_named(tmp_path: Path) -> None:
    data = json.dumps({"body": "语言"}, ensure_ascii=False).encode("gb18030")
    (tmp_path / "data.jsonl").write_bytes(data)
    options = ReadOptions(encoding="gb18030", text_field="body")
    assert texts(tmp_path, options=options) == ["语言"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_compression_is_an_error_not_a_short_corpus(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    data = json_lines(*({"text": f"some text number {n * n}"} for n in range(20_000)))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = bytearray(gzip.compress(data) if suffix == ".gz" else compressor.compress(data))
    if damage == "cut":
        del packed[-20:]
    else:
        packed[len(packed) // 2] ^= 4
    (tmp_path / f"data.jsonl{suffix}").write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"data\.jsonl.*(is damaged|is not a line of JSON)"):
        read(tmp_path)


def test_a_file_cut_between_lines_is_noticed(tmp_path: Path) -> None:
    """The text read so far is whole lines; only the compression knows that more was there."""
    first, second = json_lines({"text": "first"}), json_lines({"text": "second"})
    cut = zstandard.compress(first) + zstandard.compress(second)[:10]
    (tmp_path / "data.jsonl.zst").write_bytes(cut)
    with pytest.raises(DataError, match=r"data\.jsonl\.zst is damaged: it ends too early"):
        read(tmp_path)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 100)
    (tmp_path / "data.jsonl").write_bytes(json_lines({"text": "x" * 2000}))
    with pytest.raises(DataError, match=r"data\.jsonl:1 is longer than 1000 bytes"):
        read(tmp_path)


# Parquet.


def parquet(path: Path, columns: dict[str, list[object]], row_group_size: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="extra hf is not installed")
    tables = pytest.importorskip("pyarrow.parquet", reason="extra hf is not installed")
    tables.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "data.parquet", {"text": ["a", None, "语言"], "id": [1, 2, 3]})
    tally = Tally()
    found = read(path, tally=tally)
    assert [(one.text, one.origin) for one in found] == [("a", f"{path}:1"), ("语言", f"{path}:3")]
    assert tally.dropped == {"no text": 1}


def test_parquet_mistakes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "data.parquet", {"content": ["a"], "id": [1]})
    with pytest.raises(DataError, match="has no field 'text'; its fields are content, id"):
        read(path)
    with pytest.raises(DataError, match=r"parquet:1: field 'id' holds int, not text"):
        read(path, options=ReadOptions(text_field="id"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"data\.parquet is damaged or no Parquet file"):
        read(path)
