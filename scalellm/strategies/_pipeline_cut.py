"""What each stage of a pipeline holds of a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn

from scalellm.config import ModelConfig
from scalellm.model import Decoder, flops_per_token
from scalellm.strategies._part import Part
from scalellm.strategies._transforms import canonical_fqn

TIED = "embed_tokens.weight"


def split_layers(config: ModelConfig, num_stages: int, seq_len: int | None = None) -> list[range]:
    """Divides the layers into consecutive stages, so that the slowest one is as fast as can be.

    A layer costs the operations of its products, the last stage the output projection besides; the
    embedding is a look-up. Of equally good ways the most even one; what is left over goes to later
    stages, since earlier ones keep more micro-batches' activations.

    Args:
        seq_len: tokens of a row; None: the configured `seq_len`.

    Raises:
        ValueError: more stages than layers.
        ConfigError: `config.vocab_size` is not known yet.
    """
    num_layers = config.num_layers
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot be divided into {num_stages} stages")
    total = flops_per_token(config, seq_len)
    head = 6 * (config.vocab_size or 0) * config.hidden_size
    layer = (total - head) // num_layers

    def cost(sizes: list[int]) -> tuple[int, int]:
        costs = [layer * size for size in sizes]
        costs[-1] += head
        return max(costs), sum(cost * cost for cost in costs)

    ways = [
        [*_even(num_layers - last, num_stages - 1), last]
        for last in range(1, num_layers - num_stages + 2)
    ]
    sizes = min(ways, key=cost) if num_stages > 1 else [num_layers]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _even(number: int, parts: int) -> list[int]:
    return [number * (part + 1) // parts - number * part // parts for part in range(parts)]


def cut(decoder: Decoder, layers: range, *, is_first: bool, is_last: bool) -> Part:
    """Removes in place what the stage does not hold; names stay those of the whole decoder.

    A tied embedding stays in the first part and in the last, which projects by it: their copies
    are kept alike by `Pipeline.sync_tied`, or are one, by `share_embedding`. `initial_weights` of
    what is left would draw other values: they are to be taken from a whole decoder's.
    """
    config = decoder.config
    blocks = {str(index): decoder.layers[index] for index in layers}
    cast(Any, decoder).layers = nn.ModuleDict(blocks)
    if not (is_first or (is_last and config.tie_embeddings)):
        del decoder.embed_tokens
    if not is_first and config.positions == "learned":
        del decoder.embed_positions
    if not is_last:
        del decoder.norm, decoder.output
        if not config.tie_embeddings:
            del decoder.lm_head
    return Part(decoder, is_first=is_first, is_last=is_last)


def share_embedding(parts: Sequence[Part]) -> None:
    """Makes the tied embedding one where a rank holds the first part and the last (zero bubble).

    To be called when the parts have memory. Not with parts that FSDP shards: it cannot share a
    parameter between units, so they keep two copies.
    """
    ends = tied_ends(parts)
    if len(ends) == 2:
        first, last = ends
        last.module.embed_tokens = first.module.embed_tokens


def named_parameters(parts: Sequence[Part]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yields (name, parameter, counts) of a rank's parts, each parameter once.

    `counts` is False for the last part's copy of a tied embedding: it is updated as all others
    are, but the first part's copy is the one in gradient norms and checkpoints. If a rank holds
    both, the name comes twice.
    """
    seen: set[nn.Parameter] = set()
    for part in parts:
        for full_name, parameter in part.named_parameters():
            name = canonical_fqn(full_name)
            if parameter not in seen:
                yield name, parameter, name != TIED or part.is_first
            seen.add(parameter)


def tied_ends(parts: Sequence[Part]) -> list[Part]:
    """The first part and the last, as far as they are here and are two."""
    ends = [part for part in parts if part.is_first != part.is_last]
    return [part for part in ends if part.module.config.tie_embeddings]
