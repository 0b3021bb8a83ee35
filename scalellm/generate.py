"""Continuing a prompt: sampling, the key/value cache, and text that streams in whole characters.

Shapes: B batch (1 here), T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scalellm.errors import UserError
from scalellm.model import Decoder, KVCache

REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character is at most 3 bytes, each of which decodes to one U+FFFD at most.
_LONGEST_UNFINISHED = 3


class TextCodec(Protocol):
    """What text needs of a tokenizer; `scalellm.data.tokenizer.Tokenizer` has it."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; None: all.
        top_p: only the smallest set of tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020); None: all.
        no_repeat_ngram: no sequence of so many tokens occurs twice in prompt and continuation; 0:
            allowed. The continuation ends when no token is left.
        seed: the same continuation every time, on every device; None: another one each time.
        stop_at_eos: the end-of-text token ends the continuation and is not part of it.

    Raises:
        UserError: a value outside its limits.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    no_repeat_ngram: int = 0
    seed: int | None = None
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} tokens: ask for 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature={self.temperature}: use 0 (most likely token) or a positive number"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} tokens: use 1 or more, or leave it out for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: use a probability above 0 and up to 1")
        if self.no_repeat_ngram < 0:
            raise UserError(
                f"no_repeat_ngram={self.no_repeat_ngram} tokens: use 0 (off) or a positive length"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: use a whole number from 0 to 2^63 - 1")


class _SeenNgrams:
    """Which tokens would complete an n-gram that has occurred already."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._tail: deque[int] = deque(maxlen=max(size - 1, 0))

    def add(self, token: int) -> None:
        if self._size and len(self._tail) == self._size - 1:
            self._next[tuple(self._tail)].add(token)
        self._tail.append(token)

    def banned(self) -> set[int]:
        return self._next.get(tuple(self._tail), set())


class _Reader:
    """Lets the model read a growing history, each token once while the context has room.

    A full context slides: the cache is cleared and the last half of the context read again, so a
    continuation may be longer than `seq_len` and no position is beyond what was trained.
    """

    def __init__(self, model: Decoder, num_tokens: int) -> None:
        weight = next(model.parameters())
        self._model, self._device = model, weight.device
        room = min(num_tokens, model.config.seq_len)
        self._cache = KVCache(model.config, 1, room, weight.device, weight.dtype)
        self._num_read = 0

    def logits_after(self, history: Sequence[int]) -> Tensor:
        """Returns the logits (V,) of the token that follows, on the CPU."""
        unread, room = history[self._num_read :], self._cache.max_tokens
        if self._cache.length + len(unread) > room:
            self._cache.clear()
            unread = history[-max(room // 2, 1) :]
        self._num_read = len(history)
        tokens_BT = torch.tensor([unread], device=self._device)
        with _inference(self._model):
            logits_BTV = self._model(tokens_BT, cache=self._cache, last_only=True)
        # A copy, since what inference mode made cannot be written outside it.
        return logits_BTV[0, -1].to("cpu", torch.float64, copy=True)


@contextmanager
def _inference(model: Decoder) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule has its own mode again.

    Compiled blocks run eagerly: they would be compiled anew for every length of the cache.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    compiler_loaded = "torch._dynamo" in sys.modules  # importing it only to switch it off takes 2 s
    eager = torch.compiler.set_stance("force_eager") if compiler_loaded else nullcontext()
    try:
        with torch.inference_mode(), eager:
            yield
    finally:
        for module in training:
            module.training = True


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int | None:
    """Draws a token from `logits_V`; None if every token is at minus infinity.

    Raises:
        UserError: the logits hold NaN or infinity.
    """
    if logits_V.isnan().any() or logits_V.isposinf().any():
        raise UserError("the model gives NaN or infinity: its training diverged, take another one")
    likeliest = int(logits_V.argmax())
    if logits_V[likeliest].isneginf():
        return None
    if sampling.temperature == 0:
        return likeliest
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    scaled_V = (logits_V - logits_V[likeliest]) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return int(torch.multinomial(scaled_V.softmax(0), 1, generator=generator))
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    probabilities_K = sorted_V[: sampling.top_k].softmax(0)
    if sampling.top_p is not None:
        before_K = probabilities_K.cumsum(0) - probabilities_K
        probabilities_K = probabilities_K.where(before_K < sampling.top_p, 0.0)
    return int(order_V[torch.multinomial(probabilities_K, 1, generator=generator)])


def generate_tokens(
    model: Decoder, prompt_ids: Sequence[int], sampling: Sampling, eos_id: int | None
) -> Iterator[int]:
    """Yields the tokens that continue `prompt_ids`, one as soon as it is drawn.

    The drawing happens on the CPU from fp64 probabilities. The model is in evaluation mode only
    while a token is computed. A continuation beyond `seq_len` slides the context by half.

    Args:
        prompt_ids: what to continue; empty: a new text, that is, what follows `eos_id`.
        eos_id: the end-of-text token; None: the vocabulary has none.

    Raises:
        UserError: nothing to start from, a token outside the vocabulary, or a diverged model.
    """
    vocab_size = model.config.vocab_size or 0
    history = [int(token) for token in prompt_ids]
    if not history:
        if eos_id is None:
            raise UserError("an empty prompt, and no end-of-text token to start from; give a text")
        history = [eos_id]
    for token in history:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"token {token} of the prompt is outside the model's vocabulary of {vocab_size} "
                "tokens; use the tokenizer the model was trained with"
            )
    return _generate(model, history, sampling, eos_id)


def _generate(
    model: Decoder, history: list[int], sampling: Sampling, eos_id: int | None
) -> Iterator[int]:
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    reader = _Reader(model, len(history) + sampling.max_new_tokens)
    seen = _SeenNgrams(sampling.no_repeat_ngram)
    for token in history:
        seen.add(token)
    for _ in range(sampling.max_new_tokens):
        logits_V = reader.logits_after(history)
        banned = seen.banned() - ({eos_id} if sampling.stop_at_eos else set())
        if banned:
            logits_V[list(banned)] = -torch.inf
        chosen = choose_token(logits_V, sampling, generator)
        if chosen is None or (sampling.stop_at_eos and chosen == eos_id):
            return
        history.append(chosen)
        seen.add(chosen)
        yield chosen


def stream_text(
    model: Decoder, tokenizer: TextCodec, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of whole characters, without the prompt.

    Raises:
        UserError: see `generate_tokens`.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    tokens = generate_tokens(model, prompt_ids, sampling, tokenizer.eos_id)
    return whole_characters(tokenizer, prompt_ids, tokens)


def whole_characters(
    tokenizer: TextCodec, prompt_ids: Sequence[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Decodes a stream of tokens that follow `prompt_ids`, never splitting a character.

    Tokens are decoded together with those before them, back to the last clean boundary but one:
    alone, a token may lose its space or hold only some bytes of a character. Text that ends in
    U+FFFD waits for the rest of its character, or for the end.
    """
    ids = list(prompt_ids)
    start, boundary = 0, len(ids)  # decoded from `start`; `boundary` is clean
    emitted = len(tokenizer.decode(ids))
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids[start:])
        waiting = len(text) - len(text.rstrip(REPLACEMENT))
        end = len(text) - min(waiting, _LONGEST_UNFINISHED)
        if end > emitted:
            yield text[emitted:end]
            emitted = end
        if waiting == 0:
            start, boundary = boundary, len(ids)
            emitted = len(tokenizer.decode(ids[start:]))
            text = ""
    if text[emitted:]:
        yield text[emitted:]
