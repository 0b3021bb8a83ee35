"""Hugging Face datasets: local ones are read, a missing hub or package is one sentence."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from helpers.reading import read, texts

from scalellm.data import hub
from scalellm.data.documents import ReadOptions, Tally
from scalellm.data.hub import PRESETS, HubSource
from scalellm.data.sources import open_sources
from scalellm.errors import DataError, UserError


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    module = pytest.importorskip("datasets", reason="extra hf is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def test_a_saved_dataset(tmp_path: Path, datasets: types.ModuleType) -> None:
    train = datasets.Dataset.from_dict({"text": ["a", None, "语言"]})
    test = datasets.Dataset.from_dict({"text": ["held out"]})
    train.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": train, "test": test})
    both.save_to_disk(str(tmp_path / "both"))
    tally = Tally()
    assert texts(f"hf:{tmp_path / 'one'}", tally=tally) == ["a", "语言"]
    assert tally.dropped == {"no text": 1}
    assert texts(f"hf:{tmp_path / 'both'}") == ["a", "语言"]
    assert texts(f"hf:{tmp_path / 'both'}@test") == ["held out"]
    with pytest.raises(DataError, match="has no field 'body'; its fields are text"):
        read(f"hf:{tmp_path / 'one'}", options=ReadOptions(text_field="body"))
    with pytest.raises(DataError, match=r"\(split 'dev'\)"):
        read(f"hf:{tmp_path / 'both'}@dev")


def test_a_folder_in_a_format_of_the_hub(tmp_path: Path, datasets: types.ModuleType) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines({"text": "a"}, {"text": "b"}))
    name = f"hf:{folder}"
    assert texts(name) == ["a", "b"]
    (source,) = open_sources((name,), ReadOptions())
    first = source.fingerprint()
    (folder / "train.jsonl").write_bytes(json_lines({"text": "changed"}))
    assert source.fingerprint() != first


def test_without_a_hub_the_user_learns_what_to_do(
    monkeypatch: pytest.MonkeyPatch, datasets: types.ModuleType
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load hf:nobody/nothing .*give hf:FOLDER"):
        read("hf:nobody/nothing")


def test_without_the_package_the_user_learns_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets; .*scalellm\[hf\]"):
        read("hf:wikitext-2")


def test_names_of_datasets(tmp_path: Path) -> None:
    def parse(name: str) -> tuple[str, str | None, str]:
        source = HubSource.parse(name, "text")
        return source.dataset, source.config, source.split

    assert parse("hf:wikitext-2") == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
    assert parse("hf:WikiText-2@test")[2] == "test"
    assert parse("hf:TinyStories") == ("roneneldan/TinyStories", None, "train")
    assert parse("hf:openwebtext")[0] == "Skylion007/openwebtext"
    assert parse("hf:a/b:config@dev") == ("a/b", "config", "dev")
    with pytest.raises(UserError, match="there is no folder"):
        parse(f"hf:{tmp_path}/none")
    with pytest.raises(UserError, match="names no dataset"):
        parse("hf:")


def test_rows_that_are_lines_become_one_text_cut_at_blank_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert PRESETS["wikitext-2"].rows_are_lines
    rows = [{"text": line} for line in ("", " = Title = \n", "", " words " * 3000 + "\n") * 30]
    monkeypatch.setattr(hub.HubSource, "_rows", lambda self: rows)
    source = HubSource.parse("hf:wikitext-2", "text")
    pieces = [one.text for one in source.documents(Tally())]
    assert "".join(pieces) == "".join(row["text"] or "\n" for row in rows)
    assert len(pieces) > 5
