"""A row divided among ranks: the sum of their losses and gradients is the whole decoder's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from torch import Tensor

from scalellm.batches import Batch
from scalellm.config import ModelConfig, TrainConfig
from scalellm.dist import detect
from scalellm.errors import ConfigError
from scalellm.model import IGNORED_TARGET, Decoder
from scalellm.strategies import _context
from scalellm.strategies._context import Context, Method, apply, check_context
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
)
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


def whole(changes: dict[str, Any], documents: bool) -> Result:
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
    batch = context.local(make_batch(documents=documents))
    part = Part(decoder)

    def share() -> Tensor:
        share: Tensor = part(
            batch.tokens_BT,
            batch.targets_BT,
            positions_BT=batch.positions_BT,
            mask_B1TS=batch.mask_B1TS,
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


WAYS = [(2, "gather"), (4, "gather"), (2, "ulysses")]


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("size", "method"), WAYS, ids=str)
@pytest.mark.parametrize(
    ("changes", "train"),
    [
        ({}, {}),
        ({**LEARNED, "attention": "explicit"}, {}),
        ({"loss_chunk_tokens": 5}, {"activation_checkpointing": "full"}),
        ({}, {"activation_checkpointing": "selective"}),
    ],
    ids=["rope", "learned", "checkpointed", "selective"],
)
def test_shares_add_up_to_the_whole(
    ranks: Callable[..., list[Result]],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    method: Method,
    changes: dict[str, Any],
    train: dict[str, Any],
    documents: bool,
) -> None:
    # Several blocks in each chunk, the last of them shorter.
    monkeypatch.setattr(_context, "_QUERIES_AT_ONCE", 3)
    expected = whole(changes, documents)
    for found in ranks(divided, size, method, changes, documents, train):
        assert worst(found, expected) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(("method", "documents"), [("gather", False), ("ulysses", True)], ids=str)
def test_what_stands_around_the_collectives_is_compiled(
    ranks: Callable[..., list[Result]], method: Method, documents: bool
) -> None:
    expected = whole({}, documents)
    for found in ranks(divided, 2, method, {}, documents, {"compile": True}):
        assert worst(found, expected) < 1e-11


def in_bf16(method: Method) -> Result:
    world = detect()
    decoder = make_decoder({}).float()
    context = Context(None, world.rank, world.world_size, method)
    apply(decoder, context)
    batch = context.local(make_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = decoder(batch.tokens_BT, batch.targets_BT, positions_BT=batch.positions_BT)
    loss.backward()
    for parameter in decoder.parameters():
        tdist.all_reduce(parameter.grad)
    tdist.all_reduce(total := loss.detach().clone())
    return total.item(), gradients_of(decoder)


@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_under_autocast_errors_are_those_of_bf16(
    ranks: Callable[..., list[Result]], method: Method
) -> None:
    decoder, batch = make_decoder({}).float(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = decoder(batch.tokens_BT, batch.targets_BT)
    loss.backward()
    exact = whole({}, documents=False)
    usual = distance(gradients_of(decoder), exact[1])
    for found in ranks(in_bf16, 2, method):
        assert found[0] == pytest.approx(exact[0], rel=1e-2)
        assert 0 < distance(found[1], exact[1]) < 1.5 * usual


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The 2-norm of all errors together."""
    errors = [(found[name].double() - expected[name]).norm() for name in expected]
    return torch.stack(errors).norm().item()


@pytest.mark.parametrize("size", [2, 4])
def test_every_position_is_of_one_rank_and_all_have_as_much_to_see(size: int) -> None:
    batch = replace(make_batch(), documents_BT=torch.zeros(2, T, dtype=torch.long))
    owned, seen = [], set()
    for rank in range(size):
        local = Context(None, rank, size, "gather").local(batch)
        mask = local.mask_B1TS
        assert mask is not None
        assert local.positions_BT is not None
        assert mask.shape == (2, 1, T // size, T)
        owned += local.positions_BT.flatten().tolist()
        seen.add(int(mask[0].sum()))
    assert sorted(owned) == list(range(T))
    assert seen == {T * (T + 1) // 2 // size}


def test_contiguous_positions_would_not_be_balanced() -> None:
    spans = [Context(None, rank, 2, "ulysses").positions(T) for rank in range(2)]
    assert spans == [[range(16)], [range(16, 32)]]
    assert Context(None, 1, 2, "gather").positions(T) == [range(8, 16), range(16, 24)]


@pytest.mark.parametrize(
    ("method", "changes", "size", "tp", "message"),
    [
        ("gather", {"seq_len": 30}, 2, 1, r"model\.seq_len=30 tokens .* 4 chunks .*=28 or 32"),
        ("gather", {"seq_len": 3}, 2, 1, r"model\.seq_len=3 tokens .* try model\.seq_len=4$"),
        ("ulysses", {"seq_len": 31}, 2, 1, r"model\.seq_len=31 .* 2 chunks .*=30 or 32"),
        ("ulysses", {}, 4, 1, r"num_kv_heads=2 heads .* 4 context-parallel .* method gather"),
        ("ulysses", {}, 2, 2, r"num_kv_heads=2 .* 2 tensor-parallel times 2 context.* gather"),
        ("ulysses", {"num_heads": 6}, 4, 1, r"model\.num_heads=6 heads .* use the method gather"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    method: Method, changes: dict[str, Any], size: int, tp: int, message: str
) -> None:
    model = MODEL.model_copy(update=changes)
    with pytest.raises(ConfigError, match=message):
        check_context(model, size, method, tp)
    check_context(model, 1, method, tp)
    check_context(MODEL, 2, method)
