"""Best-fit packing: nothing lost, nothing doubled, hardly a gap, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.data.packing import MAX_WASTE, Packer

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
        assert ends == sorted(set(ends)) and 0 < ends[0] and ends[-1] <= seq_len
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
