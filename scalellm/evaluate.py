"""Loss of a model over a whole split, every token once, at any world size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from scalellm import data
from scalellm.batches import to_device
from scalellm.dist import sum_over_ranks
from scalellm.strategies import Strategy


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token. Words are split at white space, bytes are UTF-8 text.

    `loss_by_source` has the loss of each of several datasets, by name.
    """

    loss: float
    num_tokens: int
    loss_by_source: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_all(cls, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The loss over all tokens of several datasets."""
        num_tokens = sum(part.num_tokens for part in parts.values())
        nats = math.fsum(part.loss * part.num_tokens for part in parts.values())
        losses = {name: part.loss for name, part in parts.items()}
        return cls(nats / max(1, num_tokens), num_tokens, losses)

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    def perplexity_per_word(self, num_words: int) -> float:
        """Comparable between tokenizers: the same nats, shared out over words."""
        return _exp(self.loss * self.num_tokens / max(1, num_words))

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.loss * self.num_tokens / max(1, num_bytes) / math.log(2)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def evaluate(strategy: Strategy, batches: Iterable[data.Batch]) -> Evaluation:
    """Runs the strategy's forward over `batches`; all ranks call it with equally many.

    The sum is taken in fp64, so that it does not depend on the order of a million tokens.
    """
    device = strategy.world.device
    loss_sum, num_tokens = 0.0, 0
    was_training = strategy.module.training
    strategy.module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                rows = slice(0, len(batch.tokens_BS))
                loss_sum += float(strategy.forward(to_device(batch, rows, device)))
                num_tokens += int(batch.num_targets_B.sum()) * strategy.data.counts
    finally:
        strategy.module.train(was_training)
    total, count = sum_over_ranks([loss_sum, float(num_tokens)], device)
    return Evaluation(total / max(1, count), int(count))
