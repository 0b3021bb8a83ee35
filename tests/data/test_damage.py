"""Real damage to real files, and lies with right signatures: one sentence, never a wrong token."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from helpers.token_datasets import forge_index, forge_manifest, random_documents, write_documents

from scalellm.data import TokenDataset, TokenStream
from scalellm.data.format import INDEX_HEADER, INDEX_RECORD
from scalellm.errors import DataError

NUM_TOKENS = 64 * 5 + 10
DOCUMENTS = random_documents(NUM_TOKENS)
TOKENS = np.concatenate(DOCUMENTS)
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 tokens: two shards of three frames, the last one short."""
    return write_documents(tmp_path_factory.mktemp("damage") / "data", DOCUMENTS)


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def read_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    dataset = TokenDataset.open(path)
    return dataset.read(0, dataset.num_tokens), dataset.document_ends(0, dataset.num_tokens)


def refuses(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "train/00000.tokens.zst", "train/00001.docs.zst", "train/00000.index"],
)
def test_a_flipped_bit_is_found_or_harmless(path: Path, name: str) -> None:
    file = path / name
    whole = file.read_bytes()
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    found = 0
    for bit in generator.choice(len(whole) * 8, 60, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            tokens, ends = read_all(path)
        except DataError:
            found += 1
            with pytest.raises(DataError):
                TokenDataset.open(path).verify()
            continue
        np.testing.assert_array_equal(tokens, TOKENS)
        np.testing.assert_array_equal(ends, ENDS)
        with pytest.raises(DataError):
            TokenDataset.open(path).verify()
    # Only the seek table, which no reader of ours uses, may be damaged without being noticed.
    assert found == 60 or name.endswith("tokens.zst")
    assert found > 30


def test_a_flipped_bit_in_a_carry_is_found_before_it_is_used(path: Path) -> None:
    file = path / "train" / "00000.index"
    damaged = bytearray(file.read_bytes())
    damaged[INDEX_HEADER.itemsize + INDEX_RECORD.fields["carry"][1]] ^= 1
    file.write_bytes(damaged)
    # The 65th token comes from the carry alone: no second frame is there to compare with.
    with pytest.raises(DataError, match=r"00000\.index: does not match its sha256"):
        TokenDataset.open(path).read(0, 65)


@pytest.mark.parametrize("name", ["00000.tokens.zst", "00001.docs.zst", "00000.index"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(path: Path, name: str, keep: float) -> None:
    file = path / "train" / name
    os.truncate(file, int(file.stat().st_size * keep))
    refuses(path, rf"{name} has \d+ bytes, the manifest says")


def test_a_file_truncated_after_opening_is_named(path: Path) -> None:
    dataset = TokenDataset.open(path)
    dataset.read(0, 10)
    os.truncate(path / "train" / "00000.tokens.zst", 50)
    with pytest.raises(DataError, match=r"00000\.tokens\.zst: frame \d is cut off"):
        dataset.read(0, 192)


@pytest.mark.parametrize("name", ["00000.tokens.zst", "00001.docs.zst", "00000.index"])
@pytest.mark.parametrize("how", ["missing", "directory", "pipe", "link out"])
def test_what_is_no_file_inside_is_named_and_never_hangs(path: Path, name: str, how: str) -> None:
    file = path / "train" / name
    moved = file.rename(path.parent / name)
    if how == "directory":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link out":
        file.symlink_to(moved)
    words = "leads out of the dataset" if how == "link out" else "cannot be opened|regular file"
    refuses(path, rf"{name} .*({words})")


@pytest.mark.parametrize(
    ("field", "frame", "value"),
    [
        ("offset", 1, 0),
        ("offset", 1, 2**63),
        ("offset", 2, 2**64 - 1),
        ("size_bytes", 0, 0),
        ("size_bytes", 2, 2**32 - 1),
        ("tokens", 0, 2**31),
        ("tokens", 1, 63),
        ("carry", 0, 1000),
        ("carry", 1, 0xFFFF_FFFF),
        ("docs_offset", 2, 2**63),
        ("docs_size_bytes", 1, 10**9),
    ],
)
def test_a_lying_index_is_named(path: Path, field: str, frame: int, value: int) -> None:
    def lie(records: np.ndarray) -> None:
        records[field][frame] = value

    forge_index(path, lie)
    refuses(path, r"00000\.index: frame \d has a wrong")


def test_an_index_that_repeats_a_frame_is_named(path: Path) -> None:
    def lie(records: np.ndarray) -> None:
        records[1] = records[0]

    forge_index(path, lie)
    refuses(path, r"00000\.index: frame 1 has a wrong offset")


def test_a_wrong_carry_is_named(path: Path) -> None:
    def lie(records: np.ndarray) -> None:
        records["carry"][0] ^= 1

    forge_index(path, lie)
    refuses(path, r"frame 1 does not start with the carry token")


def swap_frame(path: Path, content: bytes, **options: bool) -> None:
    """Replaces the last frame of shard 0 by one of this content, with everything signed."""
    options = {"write_checksum": True, "write_content_size": True, **options}
    frame = zstandard.ZstdCompressor(level=3, **options).compress(content)
    write_last_frame(path, frame)


def write_last_frame(path: Path, frame: bytes) -> None:
    file = path / "train" / "00000.tokens.zst"

    def lie(records: np.ndarray) -> None:
        data = file.read_bytes()[: int(records["offset"][2])] + frame
        file.write_bytes(data)
        records["size_bytes"][2] = len(frame)
        records["crc32"][2] = zlib.crc32(frame)

    forge_index(path, lie)

    def resize(fields: dict[str, Any]) -> None:
        fields["splits"]["train"]["shards"][0]["size_bytes"] = file.stat().st_size

    forge_manifest(path, resize)


def test_zstd_s_own_checksum_finds_what_crc32_is_told_to_accept(path: Path) -> None:
    ids = TOKENS[128:192].astype(np.uint16)
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(ids.tobytes())
    bits = range(0, len(frame) * 8, 7)
    found = 0
    for bit in bits:
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        write_last_frame(path, bytes(damaged))
        try:
            np.testing.assert_array_equal(read_all(path)[0], TOKENS)
        except DataError:
            found += 1
    assert found >= len(bits) - 2


def test_an_id_beyond_the_vocabulary_is_named(path: Path) -> None:
    ids = TOKENS[128:192].astype(np.uint16)
    swap_frame(path, ids.tobytes())
    np.testing.assert_array_equal(read_all(path)[0], TOKENS)
    ids[7] = 1000
    swap_frame(path, ids.tobytes())
    refuses(path, "00000.tokens.zst: frame 2 holds token id 1000, the vocabulary ends below 1000")


def test_a_zstd_bomb_is_refused_before_decoding(path: Path) -> None:
    swap_frame(path, bytes(64 << 20))
    refuses(path, "declares 67108864 bytes of content, the limit is 128")


def test_a_frame_that_declares_less_than_it_holds_is_refused(path: Path) -> None:
    frame = bytearray(
        zstandard.ZstdCompressor(level=3, write_checksum=True).compress(bytes(64 << 10))
    )
    header = zstandard.get_frame_parameters(bytes(frame))
    assert header.content_size == 64 << 10
    # Single-segment header of one byte of size; then the blocks of the large frame.
    size = zstandard.frame_header_size(bytes(frame))
    write_last_frame(path, b"\x28\xb5\x2f\xfd\x24\x80" + bytes(frame[size:]))
    refuses(path, "frame 2 (cannot be decoded|does not hold)")


READ_WITHIN = """
import resource, sys
from pathlib import Path
from scalellm.data import TokenDataset
from scalellm.errors import DataError

dataset = TokenDataset.open(Path(sys.argv[1]))
used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (64 << 20),) * 2)
try:
    dataset.read(0, dataset.num_tokens)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_zstd_bomb_takes_no_memory(path: Path, is_declared: bool) -> None:
    size_bytes = 1 << 30
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=size_bytes)
    part = bytes(1 << 20)
    frame = b"".join(compressor.compress(part) for _ in range(size_bytes // len(part)))
    frame += compressor.flush()
    assert len(frame) < 1 << 20
    if not is_declared:  # a header of one byte of size, 128, before the blocks of the large frame
        frame = b"\x28\xb5\x2f\xfd\x24\x80" + frame[zstandard.frame_header_size(frame) :]
    write_last_frame(path, frame)
    done = subprocess.run(
        [sys.executable, "-c", READ_WITHIN, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = "declares 1073741824 bytes" if is_declared else "cannot be decoded|does not hold"
    assert re.search(rf"frame 2 .*({words})", done.stdout)


@pytest.mark.parametrize("options", [{"write_checksum": False}, {"write_content_size": False}])
def test_a_frame_without_checksum_or_size_is_refused(path: Path, options: dict[str, bool]) -> None:
    swap_frame(path, TOKENS[128:192].astype(np.uint16).tobytes(), **options)
    refuses(path, "frame 2 (declares|has no content checksum)")


def test_two_zstd_frames_for_one_are_refused(path: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    halves = (TOKENS[128:160].astype(np.uint16), TOKENS[160:192].astype(np.uint16))
    write_last_frame(path, b"".join(compressor.compress(half.tobytes()) for half in halves))
    refuses(path, "frame 2 declares 64 bytes")


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_damage_reaches_the_consumer_of_a_stream(path: Path, threads: int) -> None:
    file = path / "train" / "00001.tokens.zst"
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    with TokenStream(
        TokenDataset.open(path), seq_len=16, global_batch_size=1, lanes=2, decode_threads=threads
    ) as stream:
        with pytest.raises(DataError, match=r"00001\.tokens\.zst: frame 0 .*crc32"):
            for _ in range(100):
                next(stream)
        with pytest.raises(DataError, match="crc32"):
            next(stream)
