"""A manifest that lies, with right signatures or without: one sentence that names the lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.token_datasets import forge_manifest, random_documents, write_documents

from scalellm.data import TokenDataset
from scalellm.errors import DataError

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 tokens: two shards of three frames of 64, the last one short."""
    return write_documents(tmp_path_factory.mktemp("manifest") / "data", random_documents(330))


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to be forged."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def refuses(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        TokenDataset.open(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def _shard(fields: Fields) -> Fields:
    shard: Fields = fields["splits"]["train"]["shards"][0]
    return shard


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("plain path", lambda fields: _shard(fields).update(file="../00000.tokens.zst")),
        ("plain path", lambda fields: _shard(fields).update(index="/etc/passwd")),
        ("plain path", lambda fields: _shard(fields).update(documents="train/../../x")),
        ("plain path", lambda fields: _shard(fields).update(file="train\\..\\x")),
        ("plain path", lambda fields: _shard(fields).update(file="a\x00b")),
        ("plain path", lambda fields: _shard(fields).update(file="")),
        ("listed twice", lambda fields: _shard(fields).update(file="train/00001.tokens.zst")),
        ("num_tokens", lambda fields: _shard(fields).update(num_tokens=-1)),
        ("num_tokens", lambda fields: _shard(fields).update(num_tokens=2**63)),
        ("num_tokens", lambda fields: _shard(fields).update(num_tokens=True)),
        ("num_tokens", lambda fields: _shard(fields).update(num_tokens=192.0)),
        ("num_frames", lambda fields: _shard(fields).update(num_frames=4)),
        ("short frame", lambda fields: _shard(fields).update(num_tokens=191)),
        ("num_documents", lambda fields: _shard(fields).update(num_documents=1)),
        ("sha256", lambda fields: _shard(fields).update(sha256="0" * 63 + "G")),
        ("sum of its shards", lambda fields: fields["splits"]["train"].update(num_tokens=331)),
        ("shards", lambda fields: fields["splits"]["train"].update(shards=[])),
        ("split name", lambda fields: fields["splits"].update({"../x": fields["splits"]["train"]})),
        ("dtype", lambda fields: fields.update(dtype="uint32")),
        ("dtype", lambda fields: fields.update(dtype="float64")),
        ("vocab_size", lambda fields: fields.update(vocab_size=0)),
        ("vocab_size", lambda fields: fields.update(vocab_size="1000")),
        ("eos_id", lambda fields: fields.update(eos_id=1000)),
        ("frame_tokens", lambda fields: fields.update(frame_tokens=2**40)),
        ("not permitted", lambda fields: fields.update(surprise=1)),
        ("required", lambda fields: fields.pop("eos_id")),
        ("version 3", lambda fields: fields.update(version=3)),
        ("no split is packed", lambda fields: fields.update(version=2)),
        ("version True", lambda fields: fields.update(version=True)),
        ("not of a scalellm-tokens", lambda fields: fields.update(format="other")),
    ],
)
def test_a_lying_manifest_is_named(path: Path, words: str, change: Callable[[Fields], Any]) -> None:
    forge_manifest(path, change)
    refuses(path, words)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("valid JSON", "{"),
        ("valid JSON", ""),
        ("valid JSON", "\xff\xfe"),
        ("valid JSON", '{"a": NaN}'),
        ("valid JSON", '{"a": 1e999}'),
        ("valid JSON", '{"a": 1, "a": 2}'),
        ("valid JSON", "[" * 100_000),
        ("valid JSON", '{"a": ' + "9" * 10_000 + "}"),
        ("not of a scalellm-tokens", "[]"),
        ("not of a scalellm-tokens", "null"),
    ],
)
def test_json_that_is_none_is_named(path: Path, words: str, text: str) -> None:
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    refuses(path, words)


def test_a_huge_manifest_is_not_read(path: Path) -> None:
    os.truncate(path / "manifest.json", 1 << 40)
    refuses(path, "the limit is 67108864 bytes")


def test_a_manifest_that_is_a_pipe_does_not_hang(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    refuses(path, "not a regular file")


def test_an_edited_manifest_is_noticed(path: Path) -> None:
    forge_manifest(path, lambda fields: fields["splits"]["train"].update(num_words_text=5))
    TokenDataset.open(path).verify()
    forge_manifest(path, lambda fields: fields["extra"].update(note="x"), sign=False)
    refuses(path, "does not match its own manifest_sha256")


def test_verify_finds_documents_that_do_not_add_up(path: Path) -> None:
    def lie(fields: Fields) -> None:
        fields["splits"]["train"]["num_documents"] += 1
        _shard(fields)["num_documents"] += 1

    forge_manifest(path, lie)
    with pytest.raises(DataError, match="document ends, the last at token 330"):
        TokenDataset.open(path).verify()


def test_the_manifest_is_plain_sorted_json(original: Path) -> None:
    text = (original / "manifest.json").read_text()
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert fields["format"] == "scalellm-tokens"
    assert fields["version"] == 1
