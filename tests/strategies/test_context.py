"""A row divided among ranks: the sum of their losses and gradients is the whole decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from torch import Tensor

from scalellm.batches import Batch
from scalellm.config import ModelConfig, TrainConfig
from scalellm.dist import detect
from scalellm.model import IGNORED_TARGET, Decoder
from scalellm.strategies._context import Context, Method, apply
from scalellm.strategies._part import Part
from scalellm.strategies._transforms import apply_transforms, canonical_fqn

T = 32
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=61,
    seq_len=T,
    init_std=0.2,
    attention="sdpa",
)
PACKED = {"documents": True}
LEARNED = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
Result = tuple[float, dict[str, Tensor]]


def make_batch(*, documents: bool = False) -> Batch:
    """Two rows, the second one padded; with documents that cross every border of chunks."""
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(61, (2, T + 1), generator=generator)
    targets_BT = tokens_BS[:, 1:].clone()
    targets_BT[1, T - 7 :] = IGNORED_TARGET
    targets_BT[0, 3] = IGNORED_TARGET
    if not documents:
        return Batch(tokens_BS[:, :-1], targets_BT)
    lengths = ([5, 13, 1, 13], [30, 2])
    documents_BT = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return Batch(tokens_BS[:, :-1], targets_BT, positions_BT, documents_BT)


def make_decoder(changes: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(MODEL.model_copy(update=changes)).double()


def whole(changes: dict[str, Any], documents: bool, dtype: torch.dtype | None = None) -> Result:
    """The plain decoder, on the whole batch."""
    decoder, batch = make_decoder(changes), make_batch(documents=documents)
    loss = decoder(
        batch.tokens_BT,
        batch.targets_BT,
        positions_BT=batch.positions_BT,
        documents_BT=batch.documents_BT,
    )
    loss.backward()
    return loss.item(), gradients_of(decoder)


def gradients_of(decoder: Decoder) -> dict[str, Tensor]:
    return {
        canonical_fqn(name): p.grad for name, p in decoder.named_parameters() if p.grad is not None
    }


def divided(
    method: Method, changes: dict[str, Any], documents: bool, train: dict[str, Any]
) -> Result:
    """The same by all ranks together, and once more without gradients."""
    world = detect()
    context = Context(None, world.rank, world.world_size, method)
    decoder = make_decoder(changes)
    apply(decoder, context)
    if train.get("compile"):
        for block in decoder.layers:
            block.compile(backend="aot_eager")
    else:
        apply_transforms(decoder, TrainConfig.model_validate(train))
    batch, mask = context.local(make_batch(documents=documents))
    part = Part(decoder)

    def share() -> Tensor:
        share: Tensor = part(
            batch.tokens_BT, batch.targets_BT, positions_BT=batch.positions_BT, mask_B1TS=mask
        )
        return share

    loss = share()
    with torch.no_grad():
        assert torch.equal(share(), loss)
    loss.backward()
    for parameter in decoder.parameters():
        tdist.all_reduce(parameter.grad)
    tdist.all_reduce(total := loss.detach().clone())
    return total.item(), gradients_of(decoder)


def worst(found: Result, expected: Result) -> float:
    """The largest error of the loss and of each gradient, relative to the gradient's largest.

    The true gradient of a bias of the keys is 0: what is far below the others is noise.
    """
    assert found[1].keys() == expected[1].keys()
    noise = 1e-3 * max(gradient.abs().max().item() for gradient in expected[1].values())
    errors = [abs(found[0] - expected[0]) / abs(expected[0])]
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).abs().max().item()
        errors.append(error / max(gradient.abs().max().item(), noise))
    return max(errors)


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("size", "method"), [(2, "gather"), (4, "gather"), (2, "ulysses")], ids=str
)
@pytest.mark.parametrize(
    ("changes", "train"),
    [
        ({}, {}),
        (LEARNED, {}),
        ({"loss_chunk_tokens": 5}, {"activation_checkpointing": "full"}),
        ({}, {"activation_checkpointing": "selective"}),
        ({"attention": "explicit"}, {"compile": True}),
    ],
    ids=["rope", "learned", "checkpointed", "selective", "compiled"],
)
def test_shares_add_up_to_the_whole(
    ranks: Callable[..., list[Result]],
    size: int,
    method: Method,
    changes: dict[str, Any],
    train: dict[str, Any],
    documents: bool,
) -> None:
    expected = whole(changes, documents)
    for found in ranks(divided, size, method, changes, documents, train):
        error = worst(found, expected)
        print(f"{error:.1e}")
        assert error < 1e-11
