"""Every text comes back; fast encoding equals sentencepiece's; models are the same bytes."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from scalellm.data.tokenizer_training import EOS_PIECE, train_tokenizer
from scalellm.errors import DataError, UserError

CODE = [inspect.getsource(module) for module in (argparse, inspect, io)]
CHINESE = ["语言是人类最重要的交际工具。人们利用语言来交流思想。\n\n世界上有几千种语言。\n"]
# What breaks tokenizers: marks that stand for spaces and bytes, special pieces, control characters.
AWKWARD = [
    "",
    " ",
    "\n",
    "\t\t\n  \n",
    "a\r\nb\rc",
    "  leading, trailing  ",
    "    def f(x):\n\t\treturn  x\n",
    "\u2581",
    "a\u2581\u2581b \u2581 c",
    "\0",
    "x\0y",
    EOS_PIECE,
    "</s><unk><s><0x0A>",
    "\u2047\u2585\ufffd",
    "e\u0301 \u00e9 \ufb01 \uff21 \u33a7",
    "\U0001f600\U0001f1e9\U0001f1ea",
    "\u00a0\u2028\u3000\ufeff",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Tokenizer:
    return train_tokenizer("bpe", CODE + CHINESE, 600, folder / "bpe.model")


@pytest.fixture(scope="module")
def unigram(folder: Path) -> Tokenizer:
    return train_tokenizer("unigram", CODE[1:2] + CHINESE, 600, folder / "unigram.model")


@pytest.fixture(scope="module")
def char(folder: Path) -> Tokenizer:
    return train_tokenizer("char", CODE + CHINESE, 8192, folder / "char.model")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", [*AWKWARD, *CHINESE, CODE[2]])
def test_every_text_comes_back(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= one < tokenizer.vocab_size for one in ids)
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=200)
@given(text=st.text(st.characters(codec="utf-8")) | st.text(" \n\t\u2581aé中", max_size=30))
def test_every_text_comes_back_by_law(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(st.data())
def test_char_gives_back_its_alphabet(char: Tokenizer, data: st.DataObject) -> None:
    alphabet = "".join(sorted(set("".join(CODE + CHINESE))))
    text = data.draw(st.text(alphabet))
    ids = char.encode(text)
    assert char.decode(ids) == text
    assert len(ids) == len(text)
    assert char.unk_id not in ids


def test_char_marks_what_it_does_not_know(char: Tokenizer) -> None:
    assert char.encode("a\u2581\U0001f600") == [*char.encode("a"), char.unk_id, char.unk_id]
    assert char.decode(char.encode("a\U0001f600b")) == "a\ufffdb"


def test_char_keeps_the_most_frequent_characters(folder: Path) -> None:
    tokenizer = train_tokenizer("char", ["aaaa bbb cc d"], 8, folder / "few.model")
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode(tokenizer.encode("abcd \n\t")) == "abc\ufffd \n\t"
    without_space = train_tokenizer("char", ["aaaabbbccd"], 8, folder / "few.model")
    assert without_space.decode(without_space.encode("abcd \n\t")) == "abc\ufffd \n\t"


def test_a_text_without_a_space_still_learns_one(folder: Path) -> None:
    for kind, size in (("bpe", 320), ("unigram", 320), ("char", 100)):
        tokenizer = train_tokenizer(kind, ["你好世界"] * 3, size, folder / "nospace.model")
        assert tokenizer.decode(tokenizer.encode("你 好")) == "你 好"


@settings(max_examples=100)
@given(text=st.text("self.x (=')\n\té中_0", max_size=60))
def test_word_by_word_equals_sentencepiece(bpe: SentencePieceTokenizer, text: str) -> None:
    assert bpe._cache is not None
    assert bpe.encode(text) == bpe._processor.encode(text)


def test_word_by_word_equals_sentencepiece_on_a_corpus(
    bpe: SentencePieceTokenizer, char: SentencePieceTokenizer
) -> None:
    for tokenizer in (bpe, char):
        for text, ids in zip(CODE, tokenizer.encode_batch(CODE), strict=True):
            assert ids.dtype == np.uint16
            assert ids.tolist() == tokenizer._processor.encode(text)


def test_a_full_memory_of_words_is_dropped_not_kept(
    bpe: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bpe.encode(CODE[0])
    monkeypatch.setattr("scalellm.data.tokenizer._MAX_CACHED_SEGMENTS", 10)
    assert bpe.encode(CODE[0]) == expected
    assert bpe._cache is not None and not bpe._cache._known
    assert bpe.encode(CODE[0]) == expected


def test_indentation_is_one_piece(bpe: Tokenizer) -> None:
    text = "        return self\n"
    assert len(bpe.encode(text)) <= 6


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_the_same_text_gives_the_same_bytes_in_any_process(kind: str, folder: Path) -> None:
    texts, models = CODE[1:2] + CHINESE, []
    script = (
        "import json, os, sys; from pathlib import Path; sys.path[:] = json.loads(sys.argv[3]);"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from scalellm.data.tokenizer_training import train_tokenizer;"
        "texts = json.loads(Path(sys.argv[2]).read_text());"
        f"train_tokenizer({kind!r}, texts, 500, Path(sys.argv[1]))"
    )
    data = folder / "texts.json"
    data.write_text(json.dumps(texts))
    for hash_seed in ("1", "2"):
        out = folder / f"{kind}-{hash_seed}.model"
        subprocess.run(
            [sys.executable, "-c", script, str(out), str(data), json.dumps(sys.path)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
        )
        models.append(out.read_bytes())
    train_tokenizer(kind, texts, 500, folder / "here.model")
    assert models[0] == models[1] == (folder / "here.model").read_bytes()


def test_a_small_text_lowers_the_vocabulary(folder: Path) -> None:
    tokenizer = train_tokenizer("bpe", ["a few words"], 8192, folder / "small.model")
    assert 256 < tokenizer.vocab_size < 400


def test_chinese_with_few_pieces_leaves_room_for_words(folder: Path) -> None:
    # 3,000 different characters do not fit into 640 pieces: the rare ones are written as bytes.
    text = "".join(chr(0x4E00 + n) for n in range(3000)) + CHINESE[0] * 50
    tokenizer = train_tokenizer("bpe", [text], 640, folder / "dense.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("语言是人类")) < 5


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 100, r"vocab_size=100 is too small for bpe: .* at least 320 pieces"),
        ("char", 3, "vocab_size=3 is too small for char"),
        ("bpee", 8192, "unknown tokenizer 'bpee'.*did you mean 'bpe'"),
    ],
)
def test_impossible_vocabularies(kind: str, size: int, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(kind, ["text"], size, folder / "never.model")
    assert not (folder / "never.model").exists()


def test_no_text_no_tokenizer(folder: Path) -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer("bpe", ["\n\n", "\t"], 8192, folder / "never.model")


def foreign_model(path: Path, **options: object) -> Path:
    """A model as other people train them: text rewritten, a space put before it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(CODE).splitlines()),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_foreign_model_is_used_as_it_is(folder: Path) -> None:
    tokenizer = load_tokenizer(foreign_model(folder / "foreign.model", model_type="bpe"))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.kind == "bpe"
    assert tokenizer._cache is None
    text = "Two  words and \ufb01"
    assert tokenizer.encode(text) == tokenizer._processor.encode(text)
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_pieces_over_word_ends_are_noticed(folder: Path) -> None:
    """A model whose pieces hold several words must not be encoded word by word."""
    path = foreign_model(
        folder / "phrases.model",
        model_type="bpe",
        split_by_whitespace=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer._cache is None
    assert tokenizer.encode("in the self") == tokenizer._processor.encode("in the self")


def test_a_model_without_an_end_is_refused(folder: Path) -> None:
    path = foreign_model(folder / "endless.model", model_type="unigram", eos_id=-1)
    with pytest.raises(UserError, match=r"endless\.model has no end-of-text piece"):
        load_tokenizer(path)


@pytest.mark.parametrize("suffix", [".model", ".json"])
def test_damaged_files_are_named(suffix: str, tmp_path: Path, bpe: Tokenizer) -> None:
    for number, data in enumerate((b"", b"not a tokenizer", bpe.file.read_bytes()[:1000])):
        path = tmp_path / f"damaged{number}{suffix}"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"damaged{number}{suffix} is damaged or no"):
            load_tokenizer(path)


def test_missing_files_suggest_near_ones(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"did you mean 'tokenizer\.model'"):
        load_tokenizer(tmp_path / "tokeniser.model")
    with pytest.raises(UserError, match=r"neither a \.model .* nor a \.json"):
        (tmp_path / "vocab.txt").write_text("a")
        load_tokenizer(tmp_path / "vocab.txt")


def test_a_directory_gives_its_tokenizer(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(bpe.file.read_bytes())
    assert load_tokenizer(tmp_path).encode("self") == bpe.encode("self")


def hugging_face_file(path: Path, specials: list[str]) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="extra hf is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CODE, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    return path


def test_hugging_face_files(tmp_path: Path) -> None:
    path = hugging_face_file(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    tokenizer = load_tokenizer(path)
    assert (tokenizer.kind, tokenizer.eos_id, tokenizer.vocab_size) == ("hf", 1, 500)
    for text in (CODE[2], *CHINESE, "  a\tb\n"):
        # The file asks for truncation to 5 ids and padding to 7: both are off.
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_batch([text, "a"])[0].tolist() == tokenizer.encode(text)


def test_hugging_face_files_need_an_end(tmp_path: Path) -> None:
    path = hugging_face_file(tmp_path / "tokenizer.json", ["<pad>"])
    with pytest.raises(UserError, match="has no end-of-text token; add one of"):
        load_tokenizer(path)
