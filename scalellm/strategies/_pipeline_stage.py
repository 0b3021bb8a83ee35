"""One stage of a pipeline: torch's, told which micro-batch it has, and timed.

Shapes: B rows of a micro-batch, T tokens of a row, S keys that a query may see, C features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage

from scalellm.batches import Batch
from scalellm.strategies._part import Part
from scalellm.strategies._pipeline_schedule import Action


class Clock:
    """Moments of the device's work: on a GPU, when the work queued so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@dataclass
class Step:
    """What the stages of a rank share during an optimizer step, and leave behind."""

    clock: Clock
    batches: Sequence[Batch]
    losses: dict[int, Tensor] = field(default_factory=dict)
    spans: list[tuple[Action, Any, Any]] = field(default_factory=list)


def keywords_of(part: Part, batch: Batch) -> dict[str, Any]:
    """What a part's forward is given besides the tokens or activations."""
    keywords: dict[str, Any] = {
        "positions_BT": batch.positions_BT,
        "documents_BT": batch.documents_BT,
        "mask_B1TS": batch.mask_B1TS,
    }
    if part.is_last:
        keywords |= {"targets_BT": batch.targets_BT, "row_losses": batch.row_losses}
    return keywords


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Stage(PipelineStage):
    """Takes its inputs from `step`, which is set anew for each optimizer step.

    The schedule would cut one batch into equal pieces, masks and collectors of losses too. Shapes
    are told: to find them out, torch would run the model once more.
    """

    step: Step

    def __init__(
        self,
        part: Part,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        group: ProcessGroup,
        tokens_BT: Tensor,
        activation: Tensor,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        """`tokens_BT` and `activation` are on the meta device: what goes in first, and between."""
        wide = torch.promote_types(activation.dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        super().__init__(
            part,
            stage_index,
            num_stages,
            device,
            input_args=tokens_BT if part.is_first else activation,
            output_args=loss if part.is_last else activation,
            group=group,
        )
        self.part, self.activation, self.autocast_dtype = part, activation, autocast_dtype

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        batch = self.step.batches[fwd_chunk_id]
        inputs = (batch.tokens_BT,) if self.is_first else ()
        keywords = keywords_of(self.part, batch)
        with self._timed("F", fwd_chunk_id), autocast(self.device, self.autocast_dtype):
            output = super().forward_one_chunk(fwd_chunk_id, inputs, keywords, save_forward_output)
        if self.is_last:
            self.step.losses[fwd_chunk_id] = output.detach()
        else:
            check_sent(self.stage_index, output, self.activation)
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self._timed("B" if full_backward else "I", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            # Of divided tokens a gradient may be a transposed view, which cannot be sent.
            self.bwd_cache[bwd_chunk_id] = tuple(
                gradient.contiguous() if isinstance(gradient, Tensor) else gradient
                for gradient in self.bwd_cache[bwd_chunk_id]
            )

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._timed("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @contextmanager
    def _timed(self, kind: str, micro_batch: int) -> Iterator[None]:
        clock = self.step.clock
        start = clock.now()
        try:
            yield
        except RuntimeError as error:
            # torch wraps what a forward raises, and what it was would not be told any more.
            raise error.__cause__ or error from None
        action = Action(kind, self.stage_index, micro_batch)
        self.step.spans.append((action, start, clock.now()))


def check_sent(stage: int, output: Tensor, told: Tensor) -> None:
    """The next stage has made room for what it was told: anything else would be garbage."""
    if (output.dtype, output.shape) != (told.dtype, told.shape):
        raise RuntimeError(
            f"stage {stage} of the pipeline returned {output.dtype}, {tuple(output.shape)}, not "
            f"{told.dtype}, {tuple(told.shape)}: tell Pipeline the activation_dtype its parts "
            "compute in"
        )
