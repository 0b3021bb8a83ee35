"""Best-fit packing: nothing lost, nothing doubled, hardly a gap, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.token_datasets import forge_manifest, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data import DatasetWriter, TokenDataset, TokenStream, evaluation_batches
from scalellm.data.format import MANIFEST
from scalellm.data.packing import MAX_WASTE, Packer
from scalellm.data.tools.inspect import InspectOptions, inspect_dataset
from scalellm.data.tools.verify import verify_dataset
from scalellm.errors import DataError

EOS = 0
Packed = list[tuple[np.ndarray, list[int]]]


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Each id tells its document and place, the last one is EOS."""
    out = []
    for number, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int64) + 1_000_000 * (number + 1)
        ids[-1] = EOS
        out.append(ids)
    return out


def pack(lengths: list[int], seq_len: int, window_tokens: int = 1 << 20) -> tuple[Packer, Packed]:
    packer = Packer(seq_len, EOS, window_tokens)
    rows = [row for ids in documents(lengths) for row in packer.add(ids)]
    return packer, rows + list(packer.finish())


def pieces(rows: Packed) -> list[list[int]]:
    return [
        tokens[start:end].tolist()
        for tokens, ends in rows
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=120),
    st.sampled_from([8, 31, 64]),
    st.sampled_from([64, 300, 1 << 20]),
)
def test_every_token_is_in_exactly_one_place(
    lengths: list[int], seq_len: int, window_tokens: int
) -> None:
    packer, rows = pack(lengths, seq_len, window_tokens)
    for tokens, ends in rows:
        assert len(tokens) == seq_len
        assert ends == sorted(set(ends)) and ends[0] > 0 and ends[-1] <= seq_len
        assert (tokens[ends[-1] :] == EOS).all()
    found: list[int] = sorted(token for piece in pieces(rows) for token in piece)
    assert found == sorted(token for ids in documents(lengths) for token in ids.tolist())
    for piece in pieces(rows):  # what is in a piece stood so in a document
        body = piece[:-1] if piece[-1] == EOS else piece
        assert EOS not in body and np.diff(body).tolist() == [1] * max(0, len(body) - 1)
    report = packer.report()
    assert report["rows"] == len(rows) and report["pieces"] == len(pieces(rows))
    assert report["padding_tokens"] == len(rows) * seq_len - sum(lengths)
    # All but the last window's emptiest row are full but for the limit.
    assert report["padding_tokens"] <= MAX_WASTE * len(rows) * seq_len + seq_len


def test_documents_that_fit_are_never_cut_where_they_go_together() -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(4.5, 1.0, 20_000).astype(int) + 2, 900).tolist()
    packer, rows = pack(lengths, 1024, 1 << 18)
    report = packer.report()
    assert report["cut_documents"] == 0
    assert report["pieces"] == report["documents"] == 20_000
    assert report["padding_share"] < 0.003
    assert len(rows) < sum(lengths) / 1024 * 1.003 + 1


def test_a_long_document_fills_rows_and_leaves_its_rest_to_share() -> None:
    packer, rows = pack([2500, 548], 1024)
    assert [ends for _, ends in rows] == [[1024], [1024], [452, 1000]]
    assert rows[0][0].tolist() == list(range(1_000_000, 1_001_024))
    assert packer.report()["cut_documents"] == 1


@pytest.mark.parametrize("share", [0.6, 0.51, 0.34])
def test_lengths_that_do_not_go_together_are_cut_rather_than_padded(share: float) -> None:
    size = int(1000 * share)
    packer, rows = pack([size] * 2000, 1000)
    assert packer.report()["padding_share"] <= MAX_WASTE
    assert len(rows) <= 2000 * size / 1000 * 1.011 + 1
    # Only as many cuts as there are gaps to fill.
    assert 0 < packer.report()["cut_documents"] <= len(rows)


def test_the_rows_come_in_about_the_order_of_the_documents() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(20, 400, 5000).tolist()
    packer, rows = pack(lengths, 512, 1 << 15)
    first = [int(tokens.max()) // 1_000_000 for tokens, _ in rows]
    assert np.corrcoef(first, np.arange(len(first)))[0, 1] > 0.99
    assert packer.report()["documents"] == 5000


def test_what_waits_is_bounded() -> None:
    packer = Packer(100, EOS, window_tokens=1000)
    for ids in documents([60] * 3000):
        list(packer.add(ids))
        held = sum(100 - row.room for row in packer._open) + packer._waiting_tokens
        assert held <= 2 * 1000


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = np.random.default_rng(2).integers(1, 300, 3000).tolist()
    (_, one), (_, two) = pack(lengths, 128, 4096), pack(lengths, 128, 4096)
    for (a, ends_a), (b, ends_b) in zip(one, two, strict=True):
        assert ends_a == ends_b and (a == b).all()


# -- on disk and in the stream ------------------------------------------------------------------


def write_packed(out: Path, lengths: list[int], seq_len: int, **options: Any) -> TokenDataset:
    packer = Packer(seq_len, EOS)
    documents_ = [np.where(ids == EOS, EOS, ids % 977 + 1) for ids in documents(lengths)]
    with DatasetWriter(
        out,
        vocab_size=1000,
        eos_id=EOS,
        tokenizer_file=None,
        tokenizer_kind="none",
        frame_tokens=4 * seq_len,
        shard_tokens=12 * seq_len,
        **options,
    ) as writer:
        for ids in documents_:
            for tokens_T, ends in packer.add(ids):
                writer.add_row("train", tokens_T, ends, text_bytes=1)
        for tokens_T, ends in packer.finish():
            writer.add_row("train", tokens_T, ends)
        writer.finish()
    return TokenDataset.open(out)


LENGTHS = np.random.default_rng(3).integers(2, 90, 400).tolist()


@pytest.mark.parametrize("threads", [0, 1])
def test_the_stream_gives_whole_rows_and_counts_their_targets(tmp_path: Path, threads: int) -> None:
    dataset = write_packed(tmp_path / "d", LENGTHS, 64)
    dataset.verify()
    assert dataset.packed_seq_len == 64
    _, rows = pack(LENGTHS, 64)
    seen = []
    with TokenStream(
        dataset,
        seq_len=64,
        global_batch_size=8,
        lanes=3,
        document_mask=True,
        decode_threads=threads,
    ) as stream:
        for batch, cursor in stream:
            assert batch.global_target_tokens is None
            for tokens_S, targets, positions_T, documents_T in zip(
                batch.tokens_BS,
                batch.num_targets_B,
                batch.positions_BT,
                batch.documents_BT,
                strict=True,
            ):
                real = tokens_S[: targets + 1]
                seen.append(real.tobytes())
                is_start = np.concatenate([[True], real[:-1] == EOS])
                starts = np.flatnonzero(is_start)
                want_T = np.arange(targets + 1) - starts[np.cumsum(is_start) - 1]
                np.testing.assert_array_equal(positions_T[: targets + 1], want_T)
                np.testing.assert_array_equal(documents_T[: targets + 1], np.cumsum(is_start) - 1)
            if cursor.samples_consumed >= len(rows):
                break
    shown = [np.where(tokens == EOS, EOS, tokens % 977 + 1).astype("<u2") for tokens, _ in rows]
    want = {tokens[: ends[-1]].tobytes() for tokens, (_, ends) in zip(shown, rows, strict=True)}
    assert set(seen) == want


def test_ranks_share_the_rows(tmp_path: Path) -> None:
    dataset = write_packed(tmp_path / "d", LENGTHS, 64)
    found: dict[int, list[np.ndarray]] = {}
    for world_size in (1, 2, 4):
        streams = [
            TokenStream(dataset, seq_len=64, global_batch_size=8, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for _ in range(20):
            batches = [next(stream)[0] for stream in streams]
            tokens = np.concatenate([batch.tokens_BS for batch in batches])
            targets = np.concatenate([batch.num_targets_B for batch in batches])
            found.setdefault(world_size, []).append(np.column_stack([targets, tokens]))
        for stream in streams:
            stream.close()
    for world_size in (2, 4):
        np.testing.assert_array_equal(found[1], found[world_size])


def test_the_tools_know_what_a_row_is(tmp_path: Path) -> None:
    path = Path(write_packed(tmp_path / "d", LENGTHS, 64).path)
    assert verify_dataset(path, progress=False).damage == ()
    figures = inspect_dataset(InspectOptions(str(path)), progress=False).figures
    split = figures["splits"]["train"]
    assert split["packed_seq_len"] == 64 and split["lengths"]["longest"] == 64
    assert split["pieces"] == split["lengths"]["documents"] >= 400


def test_a_row_that_lies_is_found(tmp_path: Path) -> None:
    rows = pack(LENGTHS, 64)[1]
    with DatasetWriter(
        tmp_path / "d",
        vocab_size=1000,
        eos_id=EOS,
        tokenizer_file=None,
        tokenizer_kind="none",
        frame_tokens=256,
        shard_tokens=768,
    ) as writer:
        for number, (tokens, ends) in enumerate(rows):
            tokens = np.where(tokens == EOS, EOS, tokens % 977 + 1)
            if number == 5:
                tokens[-1], ends = 7, [1]
            writer.add_row("train", tokens, ends)
        writer.finish()
    [problem] = verify_dataset(tmp_path / "d", progress=False).damage
    assert "frame 1 has a row at token 64 with ids behind the end of its last document" in problem


def test_another_length_is_refused_with_the_fix(tmp_path: Path) -> None:
    dataset = write_packed(tmp_path / "d", LENGTHS, 64)
    with pytest.raises(DataError, match=r"packed into rows of 64 tokens, not of 32; set model.seq"):
        TokenStream(dataset, seq_len=32, global_batch_size=4)
    with pytest.raises(DataError, match="--pack 32"):
        evaluation_batches(dataset, seq_len=32, batch_size=4)


def test_an_unpacked_dataset_is_written_as_before(tmp_path: Path) -> None:
    fields = json.loads(
        (write_documents(tmp_path / "d", [np.array([5, 6, EOS])]) / MANIFEST).read_text()
    )
    assert fields["version"] == 1 and "packed_seq_len" not in fields["splits"]["train"]
    packed = json.loads((write_packed(tmp_path / "p", [5], 64).path / MANIFEST).read_text())
    assert packed["version"] == 2 and packed["splits"]["train"]["packed_seq_len"] == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields.update(version=1), "is packed, which version 1 knows not"),
        (lambda fields: fields["splits"]["train"].update(packed_seq_len=63), "has a short row"),
        (lambda fields: fields["splits"]["train"].update(packed_seq_len=-64), "packed_seq_len"),
        (lambda fields: fields.update(version=3), "reads versions 1 and 2"),
    ],
)
def test_a_manifest_that_lies_about_packing(tmp_path: Path, change: Any, words: str) -> None:
    dataset = write_packed(tmp_path / "d", LENGTHS, 64)
    forge_manifest(Path(dataset.path), change)
    with pytest.raises(DataError, match=words):
        TokenDataset.open(Path(dataset.path))
