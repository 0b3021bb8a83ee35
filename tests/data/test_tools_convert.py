"""Token files of other tools: the same documents, ids and bounds, whichever tool they come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.foreign_files import ndarray_bytes, write_llm_c, write_mds, write_megatron

from scalellm.cli import main
from scalellm.data import TokenDataset
from scalellm.data.tools import _whole
from scalellm.data.tools._foreign import ReadForeign
from scalellm.data.tools.convert import ConvertOptions, convert
from scalellm.data.tools.verify import verify_dataset

EOS = 0
# Every second document ends with EOS already; the third is EOS alone.
DOCUMENTS = [[5, 6, 7, EOS], [8, 9], [EOS], [700, 800, 900, 65_535], [3] * 400]
CLOSED = [[5, 6, 7, EOS], [8, 9, EOS], [EOS], [700, 800, 900, 65_535, EOS], [3] * 400 + [EOS]]
MDS_COLUMNS = {"note": ("str", None), "tokens": ("ndarray:uint16", None)}


def run(*sources: Path, out: Path, **options: Any) -> Path:
    options = {"eos_id": EOS, "vocab_size": 65_536, **options}
    convert(ConvertOptions(sources=sources, out=out, **options), progress=False)
    assert verify_dataset(out, progress=False).damage == ()
    return out


def documents_of(path: Path, split: str = "train") -> list[list[int]]:
    dataset = TokenDataset.open(path, split)
    ids = dataset.read(0, dataset.num_tokens)
    ends = dataset.document_ends(0, dataset.num_tokens)
    return [part.tolist() for part in np.split(ids, ends)[:-1]]


def hashes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mds_rows(documents: list[list[int]]) -> list[list[bytes]]:
    return [[b"x" * len(one), ndarray_bytes(np.array(one, np.uint16))] for one in documents]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_megatron(tmp_path: Path, dtype: str, suffix: str) -> None:
    prefix = write_megatron(tmp_path / "my.text_document", [[one] for one in DOCUMENTS], dtype)
    out = run(prefix.with_name(prefix.name + suffix), out=tmp_path / "out")
    assert documents_of(out) == CLOSED


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("int8", 127), ("int16", 32_767)])
def test_megatron_of_small_integers(tmp_path: Path, dtype: str, top: int) -> None:
    # EOS does not fit into int8 or uint8: it is added in the dataset's own type.
    source = write_megatron(tmp_path / "small", [[[1, top]]], dtype)
    assert documents_of(run(source, out=tmp_path / "out", eos_id=40_000)) == [[1, top, 40_000]]


def test_megatron_sentences_make_documents(tmp_path: Path) -> None:
    sentences = [[[1, 2], [3], [4, EOS]], [], [[5], [], [6]], [[7]]]
    source = write_megatron(tmp_path / "split", sentences, modes=[0] * 7)
    out = run(source, out=tmp_path / "out")
    assert documents_of(out) == [[1, 2, 3, 4, EOS], [5, 6, EOS], [7, EOS]]
    assert TokenDataset.open(out).manifest.extra["dropped"] == {"empty": 1}


def test_megatron_without_bounds_has_a_document_per_sequence(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "items", [[[1, 2], [3]], [[4]]], bounds=[0])
    assert documents_of(run(source, out=tmp_path / "out")) == [[1, 2, EOS], [3, EOS], [4, EOS]]


def test_nanogpt_folder_is_cut_at_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.array([1, 2, EOS, EOS, 3], "<u2").tofile(tmp_path / "in" / "train.bin")
    np.array([4, EOS], "<u2").tofile(tmp_path / "in" / "val.bin")
    out = run(tmp_path / "in", out=tmp_path / "out")
    assert documents_of(out) == [[1, 2, EOS], [EOS], [3, EOS]]
    assert documents_of(out, "validation") == [[4, EOS]]


def test_nanogpt_without_an_end_of_text_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 5_000).astype("<u2")
    ids[-1] = 49
    ids.tofile(tmp_path / "stream.bin")
    for name, limit in (("memory", 1 << 24), ("file", 1_000)):
        monkeypatch.setattr(_whole, "_IN_MEMORY_TOKENS", limit)
        out = run(tmp_path / "stream.bin", out=tmp_path / name, eos_id=None, vocab_size=None)
        assert documents_of(out) == [[*ids.tolist(), 50]]
        assert TokenDataset.open(out).vocab_size == 51
    assert hashes_of(tmp_path / "memory") == hashes_of(tmp_path / "file")
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_llm_c_documents_run_on_in_the_next_file(
    tmp_path: Path, magic: int, version: int, dtype: str
) -> None:
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    # As llm.c writes: the end of text comes first, and a file ends in mid-document.
    for name, ids in (
        ("fineweb_train_000001.bin", [EOS, 1, 2, EOS, 3]),
        ("fineweb_train_000002.bin", [4, EOS, 5]),
        ("fineweb_val_000000.bin", [EOS, 9]),
    ):
        write_llm_c(folder / name, np.array(ids, dtype), magic, version)
    out = run(folder, out=tmp_path / "out", vocab_size=100_000)
    assert documents_of(out) == [[EOS], [1, 2, EOS], [3, 4, EOS], [5, EOS]]
    assert documents_of(out, "validation") == [[EOS], [9, EOS]]


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7"])
def test_mds(tmp_path: Path, compression: str | None) -> None:
    shards = [mds_rows(DOCUMENTS[:3]), mds_rows(DOCUMENTS[3:])]
    source = write_mds(tmp_path / "in", shards, MDS_COLUMNS, compression=compression)
    assert documents_of(run(source, out=tmp_path / "out")) == CLOSED


def test_mds_arrays_that_say_their_type_and_fixed_columns(tmp_path: Path) -> None:
    rows = [
        [len(one).to_bytes(8, "little"), ndarray_bytes(np.array(one, np.int64), dtype=True)]
        for one in DOCUMENTS
    ]
    columns = {"count": ("int", 8), "ids": ("ndarray", None)}
    source = write_mds(tmp_path / "in", [rows], columns, hashes=["md5", "sha256"])
    out = run(source, out=tmp_path / "out", read=ReadForeign(column="ids"))
    assert documents_of(out) == CLOSED


def test_mds_of_fixed_shape_and_of_bytes(tmp_path: Path) -> None:
    rows = [[np.array(one, "<u2").tobytes()] for one in ([1, 2, 3], [4, 5, 6])]
    fixed = write_mds(tmp_path / "fixed", [rows], {"tokens": ("ndarray:uint16:3", 6)})
    plain = write_mds(tmp_path / "plain", [rows], {"tokens": ("bytes", None)})
    wanted = [[1, 2, 3, EOS], [4, 5, 6, EOS]]
    assert documents_of(run(fixed, out=tmp_path / "a")) == wanted
    read = ReadForeign(dtype="uint16")
    assert documents_of(run(plain, out=tmp_path / "b", read=read)) == wanted


def test_mds_folder_of_splits(tmp_path: Path) -> None:
    for name, part in (("train", DOCUMENTS[:4]), ("val", DOCUMENTS[4:])):
        write_mds(tmp_path / "in" / name, [mds_rows(part)], MDS_COLUMNS)
    out = run(tmp_path / "in", out=tmp_path / "out")
    assert documents_of(out) == CLOSED[:4]
    assert documents_of(out, "validation") == CLOSED[4:]


def test_hugging_face_folders_as_the_library_saves_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"input_ids": DOCUMENTS, "n": list(map(len, DOCUMENTS))})
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    assert documents_of(run(tmp_path / "one", out=tmp_path / "a")) == CLOSED
    splits = {"train": whole.select(range(3)), "test": whole.select(range(3, 5))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    out = run(tmp_path / "two", out=tmp_path / "b")
    assert documents_of(out) == CLOSED[:3]
    assert documents_of(out, "test") == CLOSED[3:]
    (tmp_path / "files").mkdir()
    whole.to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    splits["test"].to_parquet(tmp_path / "files" / "validation-00000-of-00001.parquet")
    out = run(tmp_path / "files", out=tmp_path / "c")
    assert (documents_of(out), documents_of(out, "validation")) == (CLOSED, CLOSED[3:])


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("container", ["stream.arrow", "file.arrow", "one.parquet"])
def test_arrow_and_parquet_columns(tmp_path: Path, kind: str, container: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    documents = [[1, 2, 3], [4, 5, 6], [7, 8, EOS]] * 300
    types = {
        "list": pa.list_(pa.int32()),
        "large_list": pa.large_list(pa.uint16()),
        "fixed": pa.list_(pa.int64(), 3),
    }
    table = pa.table({"text": ["x"] * 900, "ids": pa.array(documents, types[kind])})
    path = tmp_path / container
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if container.startswith("stream") else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table.slice(1), max_chunksize=70)
        documents = documents[1:]
    out = run(path, out=tmp_path / "out", read=ReadForeign(column="ids"))
    assert documents_of(out) == [one if one[-1] == EOS else [*one, EOS] for one in documents]


def test_the_end_of_text_is_found(tmp_path: Path) -> None:
    closed = write_megatron(tmp_path / "closed", [[[1, 2, 9]], [[3, 9]]])
    out = run(closed, out=tmp_path / "a", eos_id=None, vocab_size=None)
    assert documents_of(out) == [[1, 2, 9], [3, 9]]
    assert (TokenDataset.open(out).eos_id, TokenDataset.open(out).vocab_size) == (9, 10)
    # 9 is inside a document too, so it ends none; the one document of 7 ends with it by chance.
    for name, documents in (("b", [[[1, 9, 9]], [[3, 9]]]), ("c", [[[1, 7]]])):
        source = write_megatron(tmp_path / f"open-{name}", documents)
        out = run(source, out=tmp_path / name, eos_id=None, vocab_size=50)
        assert documents_of(out) == [[*one[0], 50] for one in documents]
        assert TokenDataset.open(out).vocab_size == 51


def test_a_tokenizer_tells_vocabulary_end_and_text(tmp_path: Path, tiny_dataset: Path) -> None:
    made = TokenDataset.open(tiny_dataset)
    originals = documents_of(tiny_dataset)
    source = write_megatron(tmp_path / "in", [[one[:-1]] for one in originals])
    options = ConvertOptions(sources=(source,), out=tmp_path / "out", tokenizer=tiny_dataset)
    convert(options, progress=False)
    out = TokenDataset.open(tmp_path / "out")
    assert documents_of(tmp_path / "out") == originals
    assert out.fingerprint == made.fingerprint
    assert (out.num_bytes_text, out.num_words_text) == (made.num_bytes_text, made.num_words_text)


def test_validation_is_drawn_by_the_documents_themselves(tmp_path: Path) -> None:
    documents = [[number, number + 1, EOS] for number in range(1, 400)]
    sources = [
        write_megatron(tmp_path / "a", [[one] for one in documents]),
        write_megatron(tmp_path / "b", [[one] for one in reversed(documents)]),
    ]
    outs = [run(one, out=one.with_name(f"{one.name}-out"), val_fraction=0.1) for one in sources]
    drawn = [documents_of(out, "validation") for out in outs]
    assert 20 < len(drawn[0]) < 60
    assert drawn[1] == drawn[0][::-1]
    assert sorted(drawn[0] + documents_of(outs[0])) == sorted(documents)


def test_the_same_sources_give_the_same_bytes_and_are_not_touched(tmp_path: Path) -> None:
    source = write_mds(tmp_path / "in", [mds_rows(DOCUMENTS)], MDS_COLUMNS, compression="zstd")
    before = hashes_of(source)
    run(source, out=tmp_path / "a")
    run(source, out=tmp_path / "b")
    run(source, out=tmp_path / "b", overwrite=True)
    assert hashes_of(tmp_path / "a") == hashes_of(tmp_path / "b")
    assert hashes_of(source) == before


def test_where_it_came_from_is_recorded(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "in", [[one] for one in DOCUMENTS])
    made_from = TokenDataset.open(run(source, out=tmp_path / "out")).manifest.extra["made_from"]
    [entry] = made_from["sources"]
    assert (entry["kind"], entry["path"]) == ("megatron", str(source))
    data = source.with_name("in.bin").read_bytes()
    file = next(one for one in entry["files"] if one["name"] == "in.bin")
    assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert file["size_bytes"] == len(data)
    assert made_from["options"]["eos_id"] == EOS


def test_the_command_line_trains_on_what_it_converts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.random.default_rng(0).integers(1, 60, 4_000).astype("<u2")
    ids[99::100] = EOS
    (tmp_path / "in").mkdir()
    ids.tofile(tmp_path / "in" / "train.bin")
    ids[:1_000].tofile(tmp_path / "in" / "val.bin")
    out, run_dir, figures = tmp_path / "out", tmp_path / "run", tmp_path / "eval.json"
    assert main(["data", "convert", f"{tmp_path / 'in'}", "--out", str(out), "--eos-id", "0"]) == 0
    assert "converted nanogpt" in capsys.readouterr().out
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "data": {"path": str(out)},
                "run": {"dir": str(run_dir), "threads": 1},
                "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_len": 16},
                "train": {"steps": 3, "global_batch_size": 4, "warmup_steps": 1},
                "metrics": {"tensorboard": False},
            }
        )
    )
    assert main(["train", str(config)]) == 0
    assert main(["eval", str(run_dir), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["tokens"] == 999
    assert main(["generate", "--run", str(run_dir), "hi"]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
