"""The chunked loss: the same numbers without ever holding all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_decoders import GPT2, LLAMA, build, draw_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalellm.model import IGNORED_TARGET, Decoder
from scalellm.model.loss import chunked_sum_of_losses, token_losses

ROWS, LENGTH = 3, 12


def targets() -> Tensor:
    """Ragged, one row without any target."""
    targets_BT = draw_tokens(ROWS, LENGTH, seed=1)
    targets_BT[0, 7:] = IGNORED_TARGET
    targets_BT[2] = IGNORED_TARGET
    return targets_BT


def results(model: Decoder, scale: float = 0.25) -> list[Tensor]:
    """The loss and all gradients of a part of it, as a strategy takes them."""
    model.zero_grad()
    loss = model(draw_tokens(ROWS, LENGTH), targets())
    (loss * scale).backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 1000])
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["own projection", "tied"])
def test_loss_and_gradients_are_those_of_the_whole(
    shape: dict[str, Any], chunk_tokens: int
) -> None:
    whole = results(build(shape))
    chunked = results(build(shape, loss_chunk_tokens=chunk_tokens))
    assert len(whole) == len(chunked) > 10
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_evaluation_and_logits_are_untouched() -> None:
    whole, chunked = build(LLAMA), build(LLAMA, loss_chunk_tokens=5)
    with torch.no_grad():
        losses = [model(draw_tokens(ROWS, LENGTH), targets()) for model in (whole, chunked)]
        logits = [model(draw_tokens(ROWS, LENGTH)) for model in (whole, chunked)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    assert torch.equal(*logits)


@pytest.mark.parametrize("frozen", ["lm_head.weight", "norm.weight"])
def test_with_a_frozen_parameter(frozen: str) -> None:
    found = []
    for chunk_tokens in (0, 5):
        model = build(LLAMA, loss_chunk_tokens=chunk_tokens)
        model.get_parameter(frozen).requires_grad_(False)
        found.append(results(model))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_under_autocast_the_loss_is_summed_in_fp32() -> None:
    """The products are rounded alike; only the gradients are summed in more chunks."""
    found = []
    for chunk_tokens in (0, 5):
        model = build(LLAMA, loss_chunk_tokens=chunk_tokens).float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(draw_tokens(ROWS, LENGTH), targets())
        loss.backward()
        assert loss.dtype == torch.float32
        gradient = model.lm_head.weight.grad
        assert gradient is not None and gradient.dtype == torch.float32
        found.append((loss.detach(), gradient))
    (whole, whole_gradient), (chunked, chunked_gradient) = found
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    assert (chunked_gradient - whole_gradient).norm() < 0.01 * whole_gradient.norm()


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_the_logits_never_exist_all_at_once() -> None:
    tokens, features, vocabulary, chunk_tokens = 64, 8, 512, 16
    x_BTC = torch.randn(1, tokens, features, requires_grad=True)
    weight_VC = torch.randn(vocabulary, features, requires_grad=True)
    targets_BT = torch.randint(vocabulary, (1, tokens))
    with Largest() as whole:
        token_losses(x_BTC @ weight_VC.T, targets_BT).sum().backward()
    with Largest() as chunked:
        chunked_sum_of_losses(x_BTC, weight_VC, targets_BT, chunk_tokens).backward()
    assert whole.elements == tokens * vocabulary
    assert chunked.elements == chunk_tokens * vocabulary


def test_a_second_backward_is_refused() -> None:
    model = build(LLAMA, loss_chunk_tokens=5)
    loss = model(draw_tokens(ROWS, LENGTH), targets())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once only"):
        loss.backward()
