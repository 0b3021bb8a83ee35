"""Every kind of source gives the same documents in the same order, or one sentence that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.reading import read, texts

from scalellm.data import documents
from scalellm.data.documents import PIECE_CHARS, ReadOptions, Tally, cut_pieces
from scalellm.data.sources import open_sources
from scalellm.errors import DataError, UserError


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# The running Python's library.


def test_the_library_is_real_text_in_one_order() -> None:
    tally = Tally()
    found = read("stdlib", tally=tally)
    origins = [document.origin for document in found]
    assert found == read("stdlib")
    assert "stdlib:argparse.py" in origins
    assert "pydoc:assert" in origins
    assert not [one for one in origins if "site-packages" in one or "pydoc_data" in one]
    assert sum(len(document.text) for document in found) > 5_000_000
    assert origins[: origins.index("pydoc:assert")].count("stdlib:argparse.py") == 1


def test_a_limit_takes_a_sample_of_the_library_not_its_head() -> None:
    whole = {document.origin for document in read("stdlib")}
    few = read("stdlib", limit_bytes=1_000_000)
    size = sum(len(document.text.encode()) for document in few)
    assert 1_000_000 <= size < 2_000_000
    assert few == read("stdlib", limit_bytes=1_000_000)
    assert {document.origin for document in few} <= whole
    names = [document.origin.removeprefix("stdlib:")[0] for document in few]
    assert names != sorted(names)
    assert len(set(names)) > 5


def test_a_library_without_tests_or_with_broken_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\ny = '\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: klingon\n")
    (tmp_path / "wrong.py").write_bytes(b"z = '\xe9'\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("never")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    tally = Tally()
    found = [one for one in read("stdlib", tally=tally) if one.origin.startswith("stdlib:")]
    assert [one.origin for one in found] == ["stdlib:good.py", "stdlib:latin.py"]
    assert found[1].text.endswith("y = 'é'\n")
    assert tally.dropped["undecodable"] == 2


def test_a_python_without_library_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere/python.zip")
    with pytest.raises(UserError, match=r"keeps no library sources .*give a path"):
        read("stdlib")


# Files and folders.


def test_a_folder_is_read_sorted_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", "a/b/d.rst", "a.PY", "z.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_lines({"text": name}) if name == "z.jsonl" else name.encode())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("no")
    tally = Tally()
    found = texts(tmp_path, tally=tally)
    assert found == ["a.PY", "b.txt", "z.jsonl", "a/c.md", "a/b/d.rst"]
    assert +tally.dropped == {"files of unknown suffix": 1, "hidden files": 1, "hidden folders": 1}
    assert tally.encodings == {"utf-8": 5}


def test_a_folder_of_nothing_useful_lists_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(DataError, match=r"no file of a known suffix.*\.txt, \.md.*\.parquet"):
        read(tmp_path)


def test_a_binary_file_named_as_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(UserError, match=r"picture\.txt is not a text file: it has NUL bytes"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_given_encoding_does_not_let_binary_in(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "picture.txt").write_bytes(b"a\0\0\0b\0\0\0")
    with pytest.raises(UserError, match="not a text file: it has NUL characters"):
        read(tmp_path, options=ReadOptions(encoding=encoding))


def test_encodings_are_mixed_and_counted(tmp_path: Path) -> None:
    chinese, french = "我们在这里学习中文。每天都有进步。", "Le garçon était déjà à l'école."
    (tmp_path / "1.txt").write_bytes(chinese.encode("gbk"))
    (tmp_path / "2.txt").write_bytes(french.encode("latin-1"))
    (tmp_path / "3.txt").write_bytes(b"\xef\xbb\xbf" + chinese.encode())
    (tmp_path / "4.txt").write_bytes(french.encode("utf-16"))
    (tmp_path / "5.py").write_bytes(b"# coding: gbk\n# " + "囧槑".encode("gbk"))
    tally = Tally()
    found = texts(tmp_path, tally=tally)
    assert found == [chinese, french, chinese, french, "# coding: gbk\n# 囧槑"]
    assert tally.encodings == {"gb18030": 1, "cp1252": 1, "utf-8": 1, "utf-16": 1, "gbk": 1}


def test_a_given_encoding_is_strict(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("语言".encode("gbk"))
    assert texts(tmp_path, options=ReadOptions(encoding="gb18030")) == ["语言"]
    with pytest.raises(UserError, match=r"a\.txt is not utf-8: byte 0xd3: .*--encoding"):
        read(tmp_path, options=ReadOptions(encoding="utf-8-sig"))


def test_line_ends_become_one_kind(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\rc\n")
    assert texts(tmp_path) == ["a\nb\nc\n"]


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n}. " + "Some words. " * 40 + "\n\n" for n in range(3000)]
    text = "".join(paragraphs)
    (tmp_path / "short.txt").write_text(text[: documents.MAX_TEXT_FILE_BYTES])
    (tmp_path / "long.txt").write_text(text)
    *pieces, short = texts(tmp_path)
    assert short == text[: documents.MAX_TEXT_FILE_BYTES]
    assert "".join(pieces) == text
    assert all(piece.startswith("Paragraph ") for piece in pieces)
    assert all(PIECE_CHARS // 2 < len(piece) <= PIECE_CHARS for piece in pieces[:-1])
    assert read(tmp_path)[1].origin.endswith("long.txt (piece 2)")


@pytest.mark.parametrize("text", ["x" * 200_000, "word " * 40_000, "line\n" * 40_000])
def test_pieces_without_blank_lines_lose_nothing(text: str) -> None:
    blocks = [text[start : start + 999] for start in range(0, len(text), 999)]
    pieces = list(cut_pieces(blocks))
    assert "".join(pieces) == text
    assert all(PIECE_CHARS - 10 < len(piece) <= PIECE_CHARS for piece in pieces[:-1])


def test_wrong_names_help(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(UserError, match=r"does not exist; did you mean 'corpus\.txt'"):
        read(tmp_path / "corpsu.txt")
    with pytest.raises(UserError, match="'stdlb' does not exist; did you mean 'stdlib'"):
        read("stdlb")
    with pytest.raises(UserError, match="does not exist; use stdlib, a path, or hf:NAME"):
        read(tmp_path / "no" / "such" / "folder")
    with pytest.raises(UserError, match="a source is empty"):
        read("")
    with pytest.raises(UserError, match="no source given"):
        read()
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"data\.csv has no known suffix; .*\.jsonl"):
        read(tmp_path / "data.csv")


def test_fingerprints_change_with_the_files(tmp_path: Path) -> None:
    def fingerprint(name: str | Path) -> str:
        return open_sources((str(name),), ReadOptions())[0].fingerprint()

    (tmp_path / "a.txt").write_text("one")
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    (tmp_path / "a.txt").write_text("three")
    second = fingerprint(tmp_path)
    (tmp_path / "b.txt").write_text("more")
    assert len({first, second, fingerprint(tmp_path)}) == 3
    assert fingerprint("stdlib") == fingerprint("stdlib")
