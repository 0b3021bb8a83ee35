"""Sampling against its definition, the sliding context, and text that never splits a character."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.tiny_decoders import GPT2, LLAMA, VASWANI, VOCAB, build, draw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.config import ModelConfig
from scalellm.errors import UserError
from scalellm.generate import (
    Sampling,
    choose_token,
    generate_tokens,
    stream_text,
    whole_characters,
)
from scalellm.model import Decoder

PROMPT = [3, 1, 4]


def continuation(model: Decoder, prompt: Sequence[int] = PROMPT, **sampling: Any) -> list[int]:
    return list(generate_tokens(model, prompt, Sampling(**{"seed": 0, **sampling}), eos_id=None))


class ByteCodec:
    """Each UTF-8 byte is a token, as in byte-level tokenizers; 256 ends a text."""

    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


# --- which token ---------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely_token_of_the_full_forward() -> None:
    model = build(LLAMA)
    tokens = list(PROMPT)
    for token in continuation(model, temperature=0.0, max_new_tokens=9):
        with torch.no_grad():
            assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens.append(token)
    assert len(tokens) == 12


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-12}])
def test_narrowest_sampling_is_greedy(narrow: dict[str, Any]) -> None:
    model = build(GPT2)
    greedy = continuation(model, temperature=0.0, max_new_tokens=30)
    assert continuation(model, **{"temperature": 5.0, **narrow}, max_new_tokens=30) == greedy
    assert continuation(model, temperature=5.0, max_new_tokens=30) != greedy


def drawn_frequencies(logits: list[float], sampling: Sampling, draws: int = 5_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.tensor(logits, dtype=torch.float64)
    drawn = [choose_token(logits_V, sampling, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)).double() / draws


# Probabilities of tokens 0 .. 3 at temperature 1; each expected row is worked out by hand.
EIGHTHS = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log().tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),  # odds squared
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_k": 100}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 1.0, "top_p": 0.45}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # 2/3 of the two reach 0.6
    ],
)
def test_tokens_come_as_often_as_they_should(
    options: dict[str, Any], expected: list[float]
) -> None:
    frequencies = drawn_frequencies(EIGHTHS, Sampling(**options))
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (frequencies[wanted == 0] == 0).all()
    # Six standard deviations of 5,000 draws.
    torch.testing.assert_close(frequencies, wanted, rtol=0, atol=6 * 0.5 / 5_000**0.5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_comes_twice(size: int) -> None:
    model = build(LLAMA)
    prompt = [3, 1, 4, 2]
    free = prompt + continuation(model, prompt, temperature=0.5, max_new_tokens=100)
    bound = prompt + continuation(
        model, prompt, temperature=0.5, max_new_tokens=100, no_repeat_ngram=size
    )

    def ngrams(tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]

    assert len(set(ngrams(bound))) == len(ngrams(bound))
    assert len(set(ngrams(free))) < len(ngrams(free))
    assert size > 1 or sorted(bound) == list(range(VOCAB))  # then no token is left


def test_seed_repeats_and_no_seed_varies() -> None:
    model = build(LLAMA)
    hot = {"temperature": 20.0, "max_new_tokens": 40}
    assert continuation(model, seed=5, **hot) == continuation(model, seed=5, **hot)
    assert continuation(model, seed=5, **hot) != continuation(model, seed=6, **hot)
    torch.manual_seed(0)
    first = continuation(model, seed=None, **hot)
    torch.manual_seed(0)
    assert continuation(model, seed=None, **hot) != first


def test_end_of_text_ends_or_is_passed() -> None:
    model = build(LLAMA)
    greedy = continuation(model, temperature=0.0, max_new_tokens=20)
    eos_id = greedy[5]
    first = greedy.index(eos_id)
    for stop, expected in ((True, greedy[:first]), (False, greedy)):
        sampling = Sampling(temperature=0.0, max_new_tokens=20, stop_at_eos=stop)
        assert list(generate_tokens(model, PROMPT, sampling, eos_id)) == expected
    # An end-of-text token in the prompt does not keep the continuation from ending.
    sampling = Sampling(temperature=0.0, max_new_tokens=20, no_repeat_ngram=1)
    model.embed_tokens.weight.data[:] = model.embed_tokens.weight[0].clone()  # all inputs alike
    favourite = continuation(model, temperature=0.0, max_new_tokens=1)[0]
    assert list(generate_tokens(model, [favourite], sampling, eos_id=favourite)) == []


# --- the context ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LLAMA, GPT2, VASWANI])
@pytest.mark.parametrize("prompt_length", [1, 12, 30])
def test_a_full_context_slides_by_half(shape: dict[str, Any], prompt_length: int) -> None:
    model = build(shape)  # seq_len 12
    prompt = draw_tokens(1, prompt_length)[0].tolist()
    ours = continuation(model, prompt, temperature=0.0, max_new_tokens=40)
    history, start = list(prompt), 0
    for token in ours:
        if len(history) - start > 12:
            start = len(history) - 6
        with torch.no_grad():
            logits_BTV = model(torch.tensor([history[start:]]))
        assert token == logits_BTV[0, -1].argmax()
        history.append(token)
    assert len(ours) == 40


def test_context_of_one_token() -> None:
    model = build(LLAMA, seq_len=1)
    assert len(continuation(model, max_new_tokens=5)) == 5


def test_the_model_is_left_as_it_was() -> None:
    model = build(LLAMA, dropout=0.9)
    model.train()
    model.layers[0].dropout.eval()
    modes = [module.training for module in model.modules()]
    stream = generate_tokens(model, PROMPT, Sampling(temperature=0.0), eos_id=None)
    started = [next(stream) for _ in range(8)]
    assert [module.training for module in model.modules()] == modes  # though the stream is open
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert started == continuation(model.eval(), temperature=0.0, max_new_tokens=8)  # no dropout
    tokens_BT = draw_tokens(1, 4)
    model(tokens_BT, tokens_BT).backward()


def test_compiled_blocks_and_autocast_generate_the_same() -> None:
    model = build(LLAMA).float()
    greedy = {"temperature": 0.0, "max_new_tokens": 20}
    eager = continuation(model, **greedy)
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.layers:
        block.compile(backend=record)
    assert continuation(model, **greedy) == eager
    assert graphs == []  # nothing is compiled for a sample
    model(draw_tokens(1, 4))
    assert graphs
    with torch.autocast("cpu", torch.bfloat16):
        assert len(continuation(model, **greedy)) == 20


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"no_repeat_ngram": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_impossible_sampling_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_impossible_prompts_are_refused_at_once() -> None:
    model = build(LLAMA)
    for token in (VOCAB, -1):
        with pytest.raises(UserError, match=f"token {token} .* vocabulary of {VOCAB} tokens"):
            generate_tokens(model, [token], Sampling(), eos_id=0)
    with pytest.raises(UserError, match="empty prompt"):
        generate_tokens(model, [], Sampling(), eos_id=None)
    greedy = Sampling(temperature=0.0, stop_at_eos=False)
    from_eos = list(generate_tokens(model, [], greedy, eos_id=2))
    assert from_eos == list(generate_tokens(model, [2], greedy, eos_id=2))


def test_a_diverged_model_is_refused() -> None:
    model = build(LLAMA)
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        continuation(model)


# --- text ----------------------------------------------------------------------------------------


def test_stream_text_continues_chinese_learned_by_heart() -> None:
    codec, text = ByteCodec(), "春眠不觉晓,处处闻啼鸟。"
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=257, seq_len=64))
    ids = [*codec.encode(text), codec.eos_id]
    tokens_BT = torch.tensor([[codec.eos_id, *ids], [*ids, *ids[:1]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        optimizer.step()
    greedy = Sampling(temperature=0.0, max_new_tokens=100)
    assert list(stream_text(model, codec, "春眠", greedy)) == list("不觉晓,处处闻啼鸟。")
    assert list(stream_text(model, codec, "", greedy)) == list(text)
    cut = Sampling(temperature=0.0, max_new_tokens=4)  # one character and a third
    assert list(stream_text(model, codec, "春眠", cut)) == ["不", "\ufffd"]


@given(prompt=st.text(max_size=8), text=st.text(max_size=30))
@settings(deadline=None, max_examples=50)
def test_pieces_are_whole_characters(prompt: str, text: str) -> None:
    codec = ByteCodec()
    pieces = list(whole_characters(codec, codec.encode(prompt), iter(codec.encode(text))))
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces) or "\ufffd" in text


@given(data=st.binary(max_size=40))
@settings(deadline=None, max_examples=50)
def test_any_bytes_come_out_as_one_decode_would(data: bytes) -> None:
    codec = ByteCodec()
    pieces = whole_characters(codec, codec.encode("é"), iter(data))
    assert "".join(pieces) == data.decode(errors="replace")


class WordCodec(ByteCodec):
    """Tokens carry a leading space that decoding drops at the start, as sentencepiece does."""

    words = ("▁the", "▁cat", "s", "▁sat", ".")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[token] for token in ids).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize("prompt_length", [0, 1, 3])
def test_spaces_between_tokens_survive(prompt_length: int) -> None:
    codec = WordCodec()
    for ids in itertools.product(range(5), repeat=5):
        prompt, rest = ids[:prompt_length], ids[prompt_length:]
        pieces = whole_characters(codec, prompt, iter(rest))
        assert codec.decode(prompt) + "".join(pieces) == codec.decode(ids)


def test_long_streams_decode_short_windows() -> None:
    longest = 0

    class Counting(ByteCodec):
        def decode(self, ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    text = "aé春𝄞" * 500
    assert "".join(whole_characters(Counting(), [], iter(text.encode()))) == text
    assert longest <= 8
