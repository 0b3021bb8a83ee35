"""Cross-entropy, with all logits at once or with those of a few tokens at a time.

Shapes: B batch, T tokens of a row, N = B T tokens, n of them at a time, C features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100


class RowLosses:
    """Takes the losses of a batch's rows as they are computed, for the metrics of a mixture.

    Not a tensor and no container: wrappers of the model (FSDP, DeepSpeed) hand it on as it is.
    """

    def __init__(self) -> None:
        self.losses_B: Tensor | None = None

    def put(self, losses_BT: Tensor) -> None:
        self.losses_B = losses_BT.detach().sum(1)


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Returns the cross-entropies (B, T) in nats, in fp32 or wider; 0 where the target is -100."""
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    losses_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).to(wide),
        targets_BT.flatten().long(),
        ignore_index=IGNORED_TARGET,
        reduction="none",
    )
    return losses_N.view(targets_BT.shape)


def chunked_sum_of_losses(
    x_BTC: Tensor,
    weight_VC: Tensor,
    targets_BT: Tensor,
    chunk_tokens: int,
    row_losses: RowLosses | None = None,
) -> Tensor:
    """Returns the sum of `token_losses` of `x_BTC @ weight_VC.T`, which never exists as a whole.

    The gradients of a chunk are computed while its logits are there, in the forward, so that they
    are needed only once (Liger Kernel, Hsu et al. 2024, section 3.2). The logits, their softmax and
    its gradient, N x V each, become n x V; the weight's gradient, V x C, is held from then on.

    Args:
        chunk_tokens: n, 1 or more.
    """
    losses_N: Tensor | None = None
    if row_losses is not None:
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        losses_N = torch.zeros(targets_BT.numel(), dtype=wide, device=x_BTC.device)
    loss: Tensor = _ChunkedLoss.apply(
        x_BTC.flatten(0, 1), weight_VC, targets_BT.flatten().long(), chunk_tokens, losses_N
    )
    if row_losses is not None and losses_N is not None:
        row_losses.put(losses_N.view(targets_BT.shape))
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        chunk_tokens: int,
        losses_N: Tensor | None,
    ) -> Tensor:
        dtype = _product_type(x_NC)
        with torch.autocast(x_NC.device.type, enabled=False):
            return _forward(ctx, x_NC, weight_VC, targets_N, losses_N, chunk_tokens, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked loss can be taken once only")
        (grad_x_NC, grad_VC), ctx.gradients = ctx.gradients, None
        return grad_x_NC.mul_(grad), grad_VC.mul_(grad), None, None, None


def _forward(
    ctx: Any,
    x_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    losses_N: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """Sums the losses; leaves the gradients of both factors in `ctx`, each loss in `losses_N`."""
    wide = torch.promote_types(dtype, torch.float32)
    matrix_VC = weight_VC.detach().to(dtype)
    is_training = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    grad_x_NC = torch.empty_like(x_NC) if is_training else None
    grad_VC = torch.zeros_like(matrix_VC, dtype=wide) if is_training else None
    loss_sum = torch.zeros((), dtype=wide, device=x_NC.device)
    for start in range(0, len(x_NC), n):
        part = slice(start, start + n)
        x_nC = x_NC[part].detach().to(dtype)
        logits_nV = (x_nC @ matrix_VC.T).to(wide)
        if grad_x_NC is None or grad_VC is None:
            losses_n = F.cross_entropy(
                logits_nV, targets_N[part], ignore_index=IGNORED_TARGET, reduction="none"
            )
        else:
            losses_n, grad_nV = _losses_and_gradient(logits_nV, targets_N[part])
            grad_nV = grad_nV.to(dtype)
            grad_x_NC[part] = grad_nV @ matrix_VC
            grad_VC += grad_nV.T @ x_nC
        loss_sum += losses_n.sum()
        if losses_N is not None:
            losses_N[part] = losses_n
    ctx.gradients = None if grad_VC is None else (grad_x_NC, grad_VC.to(weight_VC.dtype))
    return loss_sum


def _product_type(x: Tensor) -> torch.dtype:
    """What autocast would multiply in; but not fp16: no loss scale protects these gradients."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def _losses_and_gradient(logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the losses and the gradient of their sum, which takes the place of the logits."""
    is_counted_n1 = (targets_n != IGNORED_TARGET).unsqueeze(1)
    # An id out of range must be an error as in the loss of the whole, so no `clamp` here.
    targets_n1 = targets_n.unsqueeze(1).masked_fill(~is_counted_n1, 0)
    log_sum_n1 = logits_nV.logsumexp(1, keepdim=True)
    losses_n1 = log_sum_n1 - logits_nV.gather(1, targets_n1)
    losses_n = losses_n1.masked_fill(~is_counted_n1, 0.0).squeeze(1)
    grad_nV = logits_nV.sub_(log_sum_n1).exp_()
    grad_nV.scatter_add_(1, targets_n1, torch.full_like(losses_n1, -1.0))
    return losses_n, grad_nV.masked_fill_(~is_counted_n1, 0.0)
