"""What DDP's reducer does to memory and sends, for a dry run; the C++ itself reads data.

Read of torch 2.13's reducer.cpp with `gradient_as_bucket_view`: the buckets live as long as the
module, and a gradient that is ready is copied into its bucket and replaced by a view of it. Without
synchronisation (all micro-batches but the last) gradients are tensors of their own, beside the
buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from scalellm.plan.live import LiveBytes
from scalellm.strategies.ddp import DDPOptions

_FIRST_BUCKET_BYTES = 1 << 20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
# torch/nn/parallel/distributed.py's, and how many broadcasts torch has under way (reducer.cpp).
_BROADCAST_BYTES, _BROADCASTS_AT_ONCE = 250 << 20, 2


class Buckets:
    """Buckets of all parameters that train, filled by hooks on them; make it in fake mode."""

    def __init__(self, parameters: list[nn.Parameter], options: DDPOptions) -> None:
        self.is_syncing = True
        self.live: LiveBytes | None = None
        self._compression = options.compression
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        parts = _assign(parameters, options)
        self.flats = [_flat(parameters, part) for part in parts]
        self._errors: list[Tensor] = []
        if options.compression == "powersgd":  # what the approximation left out
            self._errors = [torch.empty_like(flat) for flat in self.flats]
        self._missing = [0] * len(parts)
        self._lengths = [len(part) for part in parts]
        for bucket, part in enumerate(parts):
            at = 0
            for index in part:
                parameter = parameters[index]
                view = self.flats[bucket][at : at + parameter.numel()].view(parameter.shape)
                at += parameter.numel()
                self._watch(parameter, view, bucket)

    @property
    def tensors(self) -> list[Tensor]:
        """What is there between steps."""
        return [*self.flats, *self._errors]

    @property
    def copies(self) -> int:
        """How often a parameter's gradient is held between steps."""
        return 2 if self._errors else 1

    def begin(self, *, is_syncing: bool) -> None:
        """A micro-batch begins; gradients go into the buckets only if it synchronises."""
        self.is_syncing = is_syncing
        self._missing = list(self._lengths)

    def _watch(self, parameter: nn.Parameter, view: Tensor, bucket: int) -> None:
        def ready(parameter: Tensor) -> None:
            if not self.is_syncing or parameter.grad is None:
                return
            view.copy_(parameter.grad)
            parameter.grad = view
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                self._reduce(bucket)

        parameter.register_post_accumulate_grad_hook(ready)

    def _reduce(self, bucket: int) -> None:
        flat = self.flats[bucket]
        if self._compression == "powersgd":
            flat.clone()  # its own working copy
        wire = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._compression)
        sent = flat if wire is None else flat.to(wire)
        if self.live is not None:
            self.live.count_collective("all_reduce", sent.nbytes)


def broadcast_buffers(tensors: list[Tensor]) -> None:
    """What DDP makes at its start and gives up again: all is sent by rank 0, flat."""
    parts, _ = _compute_assignment(tensors, [_BROADCAST_BYTES])
    flats: list[Tensor] = []
    for part in parts:
        flats.append(_flat(tensors, part))
        del flats[:-_BROADCASTS_AT_ONCE]


def _assign(parameters: list[nn.Parameter], options: DDPOptions) -> list[list[int]]:
    """Indices by bucket, the last parameters' first.

    Where unused parameters are looked for, buckets stay what they were at the start. Else they are
    made anew in the order in which gradients got ready, about the reverse of the parameters'.
    """
    cap_bytes = options.bucket_mb << 20
    if options.compression == "powersgd":
        return [list(range(len(parameters)))[::-1]]
    if options.find_unused_parameters:
        parts, _ = _compute_assignment(list(parameters), [cap_bytes])
        return parts[::-1]
    reversed_ones: list[Tensor] = list(parameters[::-1])
    parts, _ = _compute_assignment(reversed_ones, [_FIRST_BUCKET_BYTES, cap_bytes])
    return [[len(parameters) - 1 - index for index in part] for part in parts]


def _compute_assignment(tensors: list[Tensor], limits: list[int]) -> Any:
    assign: Any = tdist._compute_bucket_assignment_by_size  # type: ignore[attr-defined]
    return assign(tensors, limits)


def _flat(parameters: Sequence[Tensor], part: list[int]) -> Tensor:
    first = parameters[part[0]]
    size = sum(parameters[index].numel() for index in part)
    return torch.empty(size, dtype=first.dtype, device=first.device)
