"""Document masks, evaluation, and the end of threads."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from helpers.token_datasets import (
    expected_rows,
    random_documents,
    take,
    write_counting,
    write_documents,
)

from scalellm.data import TokenDataset, TokenStream, evaluation_batches
from scalellm.data.decode_ahead import Block, BlockDecoder
from scalellm.data.order import SampleOrder
from scalellm.errors import ConfigError

NUM_TOKENS = 5003


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Ids 1, 2, 3, ...: a row tells where it comes from."""
    return TokenDataset.open(write_counting(tmp_path_factory.mktemp("c") / "d", NUM_TOKENS))


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return random_documents(NUM_TOKENS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, documents: list[np.ndarray]) -> TokenDataset:
    return TokenDataset.open(write_documents(tmp_path_factory.mktemp("t") / "d", documents))


@pytest.mark.parametrize(("seq_len", "threads"), [(16, 0), (50, 0), (50, 2)])
def test_document_numbers_and_positions(
    texts: TokenDataset, documents: list[np.ndarray], seq_len: int, threads: int
) -> None:
    number = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    order = SampleOrder(NUM_TOKENS, seq_len, 0, 64, texts.frame_tokens)
    consumed = 0
    for batch, _ in take(
        texts, 60, seq_len=seq_len, global_batch_size=3, document_mask=True, decode_threads=threads
    ):
        assert batch.positions_BT is not None
        assert batch.documents_BT is not None
        assert batch.positions_BT.dtype == batch.documents_BT.dtype == np.int32
        for row in range(3):
            epoch, within = divmod(consumed + row, order.num_samples)
            start = int(order.samples(np.array([within]), epoch)[0]) * seq_len
            real = int(batch.num_targets_B[row])
            inside = number[start : start + real]
            np.testing.assert_array_equal(batch.documents_BT[row, :real], inside - inside[0])
            want = [inside[: i + 1].tolist().count(inside[i]) - 1 for i in range(real)]
            np.testing.assert_array_equal(batch.positions_BT[row, :real], want)
            assert batch.positions_BT[row].max() < seq_len
        consumed += 3


@pytest.mark.parametrize("limit", [None, 1, 8, 40, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_sample_once_in_order(
    texts: TokenDataset, world_size: int, limit: int | None
) -> None:
    order = SampleOrder(NUM_TOKENS, 64, 0, 0)
    ranks = [
        list(
            evaluation_batches(
                texts,
                seq_len=64,
                batch_size=4,
                rank=rank,
                world_size=world_size,
                limit_samples=limit,
                document_mask=True,
            )
        )
        for rank in range(world_size)
    ]
    size = min(order.num_samples, limit or order.num_samples)
    assert {len(batches) for batches in ranks} == {-(-size // (4 * world_size))}
    tokens, targets = [], []
    for batches in zip(*ranks, strict=True):
        for batch in batches:
            assert batch.tokens_BS.shape == (4, 65)
            assert batch.documents_BT is not None
            assert batch.documents_BT.shape == (4, 64)
            tokens.append(batch.tokens_BS)
            targets.append(batch.num_targets_B)
        total = sum(int(batch.num_targets_B.sum()) for batch in batches)
        assert {batch.global_target_tokens for batch in batches} == {total}
    want_tokens, want_targets = expected_rows(texts, order, range(size))
    np.testing.assert_array_equal(np.concatenate(tokens)[:size], want_tokens)
    np.testing.assert_array_equal(np.concatenate(targets)[:size], want_targets)
    assert (np.concatenate(targets)[size:] == 0).all()
    assert (np.concatenate(tokens)[size:] == texts.eos_id).all()


def test_evaluation_refuses_impossible_sizes(texts: TokenDataset) -> None:
    with pytest.raises(ConfigError, match="limit_samples=0"):
        evaluation_batches(texts, seq_len=8, batch_size=1, limit_samples=0)
    with pytest.raises(ConfigError, match="global_batch_size=0"):
        evaluation_batches(texts, seq_len=8, batch_size=0)


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]


def test_close_ends_the_threads_and_the_stream(counting: TokenDataset) -> None:
    stream = TokenStream(counting, seq_len=16, global_batch_size=4, decode_threads=2)
    next(stream)
    assert len(decode_threads()) == 2
    stream.close()
    stream.close()
    assert decode_threads() == []
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)


def test_a_forgotten_stream_ends_its_threads(counting: TokenDataset) -> None:
    stream = TokenStream(counting, seq_len=16, global_batch_size=4, decode_threads=2)
    next(stream)
    threads = decode_threads()
    del stream
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert decode_threads() == []


def test_close_while_another_thread_waits(
    counting: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(TokenDataset, "read_into", lambda *_: release.wait(30))
    stream = TokenStream(counting, seq_len=16, global_batch_size=4, lanes=4, decode_threads=1)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            next(stream)
        except ValueError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    closer = threading.Thread(target=stream.close, daemon=True)
    closer.start()
    release.set()
    for thread in (consumer, closer):
        thread.join(20)
        assert not thread.is_alive()
    assert decode_threads() == []


@pytest.mark.parametrize("threads", [0, 1])
def test_a_block_submitted_after_the_end_fails_at_once(
    counting: TokenDataset, threads: int
) -> None:
    order = SampleOrder(NUM_TOKENS, 16, 0, 4, counting.frame_tokens)
    decoder = BlockDecoder(counting, order, documents=False, threads=threads)
    decoder.stop()
    block = Block(number=0, half=0, place=0)
    decoder.submit(block)
    with pytest.raises(ValueError, match="the stream is closed"):
        decoder.wait(block)
    decoder.join()
    assert decode_threads() == []
