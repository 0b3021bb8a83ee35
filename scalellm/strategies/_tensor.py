"""Tensor parallelism: the ranks of a group hold parts of every matrix and work on one token's sum.

Matrices that read the residual stream are divided by their outputs (columns of what they compute:
heads, MLP features, words), those that write to it by their inputs, so that a block needs one sum
over the group for its attention and one for its MLP. Sources: Shoeybi et al. 2019, "Megatron-LM",
section 3; Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
section 4.2.2 (sequence parallelism: between the sums each rank keeps a part of the tokens).

Shapes: B batch, T tokens of a row, t of them on this rank, C features, V words, v of them here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as tdist
import torch.nn.functional as F
from torch import Tensor, nn

from scalellm.model import IGNORED_TARGET, Decoder
from scalellm.strategies._collectives import TokenGather, TokenScatter, TokenSplit, all_reduce

# By the last two words of a parameter's name; what is not named here is whole on every rank.
_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_INPUT = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Cut:
    """Which part of a parameter a rank holds: from `begin` along `dim` of the whole of `shape`."""

    dim: int
    begin: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that divide matrices among them. `divides_tokens`: sequence parallelism."""

    group: tdist.ProcessGroup
    rank: int
    size: int
    divides_tokens: bool = True

    def range_of(self, size: int) -> tuple[int, int]:
        """As even as can be, the first ranks have one more; of as many as ranks each has one."""
        return -(-size * self.rank // self.size), -(-size * (self.rank + 1) // self.size)


def divide(decoder: Decoder, ranks: TensorGroup) -> dict[str, Cut]:
    """Cuts a decoder's matrices to this rank's part and puts the sums between, in place.

    Returns:
        What was cut, by FQN. A parameter on the meta device stays there.
    """
    cuts = {}
    for name, module in list(decoder.named_modules()):
        kind = name.rpartition(".")[2]
        if kind in _BY_OUTPUT or kind in _BY_INPUT:
            for cut_name, cut in _cut_module(module, kind in _BY_OUTPUT, ranks):
                cuts[f"{name}.{cut_name}"] = cut
        if kind in _BY_INPUT:
            _replace(decoder, name, SummedLinear(cast(nn.Linear, module), ranks))
        elif kind in ("self_attn", "mlp"):
            module.register_forward_pre_hook(_Whole(ranks))
    if hasattr(decoder, "embed_tokens"):
        _replace(decoder, "embed_tokens", DividedEmbedding(decoder.embed_tokens, ranks))
        if ranks.divides_tokens and hasattr(decoder, "dropout"):  # the last thing `embed` does
            decoder.dropout.register_forward_hook(_Split(ranks))
    if hasattr(decoder, "output"):
        num_words = decoder.config.vocab_size or 0
        _replace(decoder, "output", DividedOutput(num_words, ranks))
    return cuts


def has_partial_gradient(name: str, cuts: Collection[str], ranks: TensorGroup) -> bool:
    """Whether a rank has a parameter's gradient of its own tokens only.

    Where tokens are divided that is what is whole and stands between the embedding and the loss.
    """
    return ranks.divides_tokens and name not in cuts and name.startswith(("layers.", "norm."))


def _cut_module(
    module: nn.Module, by_output: bool, ranks: TensorGroup
) -> Iterator[tuple[str, Cut]]:
    for name, parameter in list(module.named_parameters(recurse=False)):
        dim = 0 if by_output else 1
        if parameter.dim() <= dim:
            continue  # the bias of a sum is added once, whole
        begin, end = ranks.range_of(parameter.shape[dim])
        part = parameter.detach().narrow(dim, begin, end - begin).clone()
        setattr(module, name, nn.Parameter(part, parameter.requires_grad))
        yield name, Cut(dim, begin, tuple(parameter.shape))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


class _Whole:
    """Before attention or an MLP: every rank needs all tokens, and they need every rank's part."""

    def __init__(self, ranks: TensorGroup) -> None:
        self.ranks = ranks

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (_whole(args[0], self.ranks), *args[1:])


class _Split:
    """After the embedding: each rank goes on with its tokens."""

    def __init__(self, ranks: TensorGroup) -> None:
        self.ranks = ranks

    def __call__(self, module: nn.Module, args: Any, x_BTC: Tensor) -> Tensor:
        del module, args
        return _apply(TokenSplit, x_BTC, self.ranks)


def _whole(x: Tensor, ranks: TensorGroup) -> Tensor:
    return _apply(TokenGather if ranks.divides_tokens else _Copy, x, ranks)


def _apply(function: type[torch.autograd.Function], x: Tensor, ranks: TensorGroup) -> Tensor:
    result: Tensor = function.apply(x, ranks.group)
    return result


class _Copy(torch.autograd.Function):
    """The same on every rank; what the ranks' parts made of it is summed in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, which each of them has then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        del ctx
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None


class SummedLinear(nn.Linear):
    """A product of which each rank has some of the inputs; the bias comes after the sum."""

    def __init__(self, linear: nn.Linear, ranks: TensorGroup) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.weight.shape[1], linear.out_features
        self.weight, self.bias, self.ranks = linear.weight, linear.bias, ranks

    def forward(self, x_BTC: Tensor) -> Tensor:
        part_BTC = F.linear(x_BTC, self.weight)
        sum_BTC = _apply(TokenScatter if self.ranks.divides_tokens else _Sum, part_BTC, self.ranks)
        return sum_BTC if self.bias is None else sum_BTC + self.bias.to(sum_BTC.dtype)


class DividedEmbedding(nn.Embedding):
    """Each rank knows some of the words; the others' are zeros to it."""

    def __init__(self, embedding: nn.Embedding, ranks: TensorGroup) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.weight, self.ranks = embedding.weight, ranks

    def forward(self, tokens_BT: Tensor) -> Tensor:
        begin, end = self.ranks.range_of(self.num_embeddings)
        is_here_BT = (tokens_BT >= begin) & (tokens_BT < end)
        found_BTC = F.embedding((tokens_BT - begin) * is_here_BT, self.weight)
        return _apply(_Sum, found_BTC * is_here_BT.unsqueeze(-1), self.ranks)


class DividedOutput(nn.Module):
    """The loss of each token from logits that no rank has all of; takes `Output`'s place."""

    def __init__(self, num_words: int, ranks: TensorGroup) -> None:
        super().__init__()
        self.ranks, self.first_word = ranks, ranks.range_of(num_words)[0]

    def forward(self, x_BTC: Tensor, weight_vC: Tensor, targets_BT: Tensor | None) -> Tensor:
        if targets_BT is None:
            raise ValueError("a divided decoder gives the loss, not the logits")
        logits_BTv = F.linear(_whole(x_BTC, self.ranks), weight_vC)
        wide = torch.promote_types(logits_BTv.dtype, torch.float32)
        loss: Tensor = _DividedLoss.apply(
            logits_BTv.to(wide), targets_BT, self.first_word, self.ranks.group
        )
        return loss


class _DividedLoss(torch.autograd.Function):
    """Cross-entropy over words that are divided: three numbers a token travel (section 3 there)."""

    @staticmethod
    def forward(ctx: Any, logits_BTv: Tensor, targets_BT: Tensor, begin: int, group: Any) -> Tensor:
        is_here_BT = (targets_BT >= begin) & (targets_BT < begin + logits_BTv.shape[-1])
        index_BT1 = ((targets_BT - begin) * is_here_BT).unsqueeze(-1)
        highest_BT1 = all_reduce(logits_BTv.amax(-1, keepdim=True), group, "max")
        shifted_BTv = logits_BTv - highest_BT1
        target_BT = shifted_BTv.gather(-1, index_BT1).squeeze(-1) * is_here_BT
        exp_BTv = shifted_BTv.exp_()
        sum_BT, target_BT = all_reduce(torch.stack((exp_BTv.sum(-1), target_BT)), group)
        ctx.save_for_backward(exp_BTv.div_(sum_BT.unsqueeze(-1)), index_BT1, is_here_BT, targets_BT)
        return (sum_BT.log() - target_BT).masked_fill(targets_BT == IGNORED_TARGET, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_BTv, index_BT1, is_here_BT, targets_BT = ctx.saved_tensors
        here_BT1 = is_here_BT.unsqueeze(-1).to(softmax_BTv.dtype)
        grad_BTv = softmax_BTv.scatter_add(-1, index_BT1, -here_BT1)
        grad_BT = grad_BT.masked_fill(targets_BT == IGNORED_TARGET, 0.0)
        return grad_BTv.mul_(grad_BT.unsqueeze(-1)), None, None, None
