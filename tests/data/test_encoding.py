"""Encodings are detected from evidence or refused; a wrong one is never taken silently."""
# ruff: noqa: RUF001

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.data import encoding as module
from scalellm.data.encoding import check_encoding_name, detect_encoding
from scalellm.errors import UserError

CHINESE = {
    "greeting": "你好",
    "clause": "今天天气很好",
    "sentence": "我们的学校在城市的东边，每天都有很多学生来上课。",
    "question": "你知道他为什么没有来吗？",
    "poem": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "news": "据报道，这个项目将在明年三月完成，总投资超过五十亿元。",
    "code": "x = 1  # 这里是一个变量\nprint('hello world')  # 打印出来\n",
    "mixed": "Python 3.11 的发布时间是 2022 年 10 月，性能比上一个版本提高了很多。",
    "paragraph": (
        "语言是人类最重要的交际工具。人们利用语言来交流思想，表达感情，传递信息。"
        "世界上有几千种语言，每一种语言都有自己的历史和文化。\n\n"
        "学习一门新的语言需要时间和耐心，但是只要坚持，就一定会有进步。\n"
    ),
}
WESTERN = {
    "French": "Le garçon était déjà allé à l'école où il apprenait l'histoire de la forêt.",
    "French quotes": "« Où êtes-vous né ? » demanda-t-il – c’était l’été dernier, à Orléans.",
    "German": "Der Bär läuft über die Straße und frißt größere Äpfel als üblich.",
    "Spanish": "¿Cómo está usted mañana? El niño comió piñas en el jardín de su tía.",
    "Portuguese": "Não há razão para a informação estar errada; amanhã será o coração.",
    "Italian": "La città è più bella perché c'è il caffè e la libertà; così va, però.",
    "Swedish": "Flickan åkte båt över sjön och såg en älg på ön när hon åt smörgås.",
    "Finnish": "Hyvää päivää, tämä sää on tänään yötä pimeämpää ja älä mene pöydän ääreen.",
    "Dutch": "De coördinatie van de ruïne was één groot misverstand voor de patiënten.",
    "one word": "caf\u00e9",
    "copyright": "Copyright \u00a9 2020 Some Person, all rights reserved",
}
# Text of other encodings: each must be refused, not taken for Chinese or Western European.
FOREIGN = {
    "euc-kr": "한국어는 한국의 공식 언어이며 많은 사람들이 이 언어를 사용하고 있습니다.",
    "euc-jp": "これは日本語の文章です。今日はとても天気が良いので散歩に行きましょう。",
    "shift_jis": "これは日本語の文章です。今日はとても天気が良いので散歩に行きましょう。",
    "big5": "語言是人類最重要的交際工具，人們利用語言來交流思想，表達感情。",
    "koi8-r": "Это предложение написано по-русски, и его кодировка должна быть указана.",
    "cp1251": "Это предложение написано по-русски, и его кодировка должна быть указана.",
    "iso8859-7": "Αυτή η πρόταση είναι γραμμένη στα ελληνικά και πρέπει να δοθεί η κωδικοποίηση.",
    "cp1255": "המשפט הזה כתוב בעברית ויש לציין את הקידוד שלו במפורש.",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy a včera večer řekl všechno.",
    "iso8859-2": "Zażółć gęślą jaźń, a potem chodź tu szybko, bo będzie już późno.",
    "cp1254": "Bu cümle Türkçe yazılmıştır ve kodlaması açıkça belirtilmelidir; öğretmen ağladı.",
}


def write(folder: Path, data: bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", CHINESE)
@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
def test_chinese_is_gb18030(tmp_path: Path, name: str, encoding: str) -> None:
    path = write(tmp_path, CHINESE[name].encode(encoding))
    assert detect_encoding(path) == "gb18030"


def test_four_byte_characters_are_gb18030(tmp_path: Path) -> None:
    text = CHINESE["paragraph"] + "他姓\U00020bb7，不姓吉。"
    assert detect_encoding(write(tmp_path, text.encode("gb18030"))) == "gb18030"


@pytest.mark.parametrize("language", WESTERN)
def test_western_text_is_cp1252(tmp_path: Path, language: str) -> None:
    path = write(tmp_path, WESTERN[language].encode("cp1252"))
    assert detect_encoding(path) == "cp1252"


@pytest.mark.parametrize("encoding", FOREIGN)
def test_other_encodings_are_refused_with_the_fix(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, FOREIGN[encoding].encode(encoding))
    with pytest.raises(UserError, match=r"text\.txt is not UTF-8 .*--encoding gb18030"):
        detect_encoding(path)


@pytest.mark.parametrize("text", [*CHINESE.values(), *WESTERN.values(), *FOREIGN.values(), ""])
def test_utf8_wins_over_everything(tmp_path: Path, text: str) -> None:
    assert detect_encoding(write(tmp_path, text.encode())) == "utf-8"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, CHINESE["sentence"].encode(encoding))
    assert detect_encoding(path) == encoding
    assert path.read_text(encoding=detect_encoding(path)) == CHINESE["sentence"]


def test_one_broken_byte_in_utf8_is_refused(tmp_path: Path) -> None:
    data = bytearray((WESTERN["French"] * 20).encode())
    data[300] = 0xFF
    with pytest.raises(UserError, match="not UTF-8"):
        detect_encoding(write(tmp_path, bytes(data)))


def test_evidence_is_taken_where_it_is_however_far(tmp_path: Path) -> None:
    plain = b"nothing but ASCII on this line\n" * 100_000
    path = write(tmp_path, plain + CHINESE["paragraph"].encode("gb18030") + plain)
    assert path.stat().st_size > 4 * module._BLOCK_BYTES
    assert detect_encoding(path) == "gb18030"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text\0more", "NUL bytes"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL bytes"),
        ("UTF-16 without a mark".encode("utf-16-le"), "NUL bytes"),
        (b"ok\x01\x02\x03\x04\x05 not ok", "5 control characters in 14 bytes"),
        (os.urandom(4096).replace(b"\0", b"\x01"), "control characters"),
    ],
)
def test_binary_files_are_named(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=f"text.txt is not a text file: it has .*{reason}"):
        detect_encoding(write(tmp_path, data))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=200))
def test_valid_utf8_is_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), text.encode(), "hypothesis.txt")
    assert detect_encoding(path) in ("utf-8", "utf-8-sig")


@given(st.lists(st.sampled_from([*CHINESE.values()]), min_size=1, max_size=4), st.integers(2, 8))
def test_utf8_characters_across_blocks(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], block_bytes: int
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "".join(parts).encode(), "blocks.txt")
    before = module._BLOCK_BYTES
    module._BLOCK_BYTES = block_bytes
    try:
        assert detect_encoding(path) == "utf-8"
    finally:
        module._BLOCK_BYTES = before


def test_names_of_encodings_are_checked() -> None:
    assert check_encoding_name("GBK") == "gbk"
    assert check_encoding_name("utf8") == "utf-8-sig"
    assert check_encoding_name("auto") == "auto"
    for name in ("klingon", "hex"):
        with pytest.raises(UserError, match=f"unknown text encoding '{name}'"):
            check_encoding_name(name)
