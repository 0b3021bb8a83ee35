"""Runs the stages of a pipeline that one rank holds, by torch.distributed.pipelining.

Every rank of a pipeline reads the same rows; only activations and their gradients travel.

Shapes: B rows of a micro-batch, T tokens of a row, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor

from scalellm.batches import Batch
from scalellm.strategies._part import Part
from scalellm.strategies._pipeline_cut import tied_ends
from scalellm.strategies._pipeline_schedule import Action, make_schedule, owner_of
from scalellm.strategies._pipeline_stage import (
    Clock,
    Stage,
    Step,
    autocast,
    check_sent,
    keywords_of,
)


class StepTime:
    """Where the time of a rank's last step went; on a GPU, reading it waits for the step's end.

    What FSDP gathers inside a forward or backward counts as computing.
    """

    def __init__(self, step: Step, start: Any, end: Any) -> None:
        self._clock, self._spans, self._start, self._end = step.clock, step.spans, start, end

    @property
    def wall_s(self) -> float:
        return self._clock.seconds(self._start, self._end)

    @property
    def computations(self) -> list[tuple[Action, float]]:
        """Computations in their order, with the seconds each took."""
        return [(action, self._clock.seconds(*span)) for action, *span in self._spans]

    @property
    def bubble(self) -> float:
        """The part of the step in which the rank did not compute."""
        return 1.0 - sum(seconds for _, seconds in self.computations) / self.wall_s


class Pipeline:
    """The stages that one rank holds, in a group of the ranks that hold one model together.

    Args:
        parts: (stage index, part) in ascending order: those that `stages_of` names. They may be
            FSDP modules: what they gather for a step is kept to its end, when they reduce
            gradients once (zero bubble would lose gradients otherwise).
        group: the pipeline's ranks; stage s is on rank `owner_of(schedule, s, ranks)` of it.
        tokens_divided: ranks that have each a part of the tokens between blocks.
        activation_dtype: of what goes from stage to stage; None: that of the parameters, which is
            right under autocast too, where residual streams stay wide.
        autocast_dtype: computes each forward under autocast; None: as it is.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, Part]],
        num_stages: int,
        group: ProcessGroup,
        device: torch.device,
        schedule: str,
        *,
        tokens_divided: int = 1,
        activation_dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.parts = dict(parts)
        self.num_stages, self.group, self.device = num_stages, group, device
        self.schedule, self.ranks = schedule, group.size()
        [parameter, *_] = self.parts[parts[0][0]].parameters()
        self.parameter_dtype = parameter.dtype
        self.activation_dtype = activation_dtype or parameter.dtype
        self.tokens_divided = tokens_divided
        self.autocast_dtype = autocast_dtype
        for part in self.parts.values():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(False)
        self.time: StepTime | None = None
        self._stages: list[Stage] = []
        self._runner: _PipelineSchedule | None = None
        self._built_for: tuple[int, torch.Size] | None = None
        self._scale = 1.0

    @property
    def holds_last(self) -> bool:
        return self.num_stages - 1 in self.parts

    def close(self) -> None:
        """Lets go of the group: torch's schedule and this object refer to each other."""
        self._runner, self._built_for, self._stages = None, None, []

    # -- one optimizer step -----------------------------------------------------------------

    def run(self, batches: Sequence[Batch], scale: float) -> list[Tensor]:
        """Accumulates gradients of `scale` times the sum of all token losses of the batches.

        Args:
            batches: the step's micro-batches, all of one shape.

        Returns:
            Their loss sums, unscaled, on the rank of the last stage; zeros elsewhere.

        Raises:
            ValueError: micro-batches of different shapes.
        """
        shapes = {batch.tokens_BT.shape for batch in batches}
        if len(shapes) != 1:
            raise ValueError(f"micro-batches of a step must have one shape, not {sorted(shapes)}")
        runner = self._prepare(len(batches), shapes.pop())
        step = Step(Clock(self.device), batches)
        for stage in self._stages:
            stage.step = step
        self._scale = scale
        start = step.clock.now()
        try:
            # The targets of `step` are only numbers of micro-batches: each stage has its own.
            runner.step(target=torch.arange(len(batches)), return_outputs=False)
        except BaseException:
            self.close()  # torch's schedule is in the middle of a step
            raise
        self.time = StepTime(step, start, step.clock.now())
        return [step.losses.get(index, self._zero()) for index in range(len(batches))]

    def _prepare(self, micro_batches: int, shape: torch.Size) -> _PipelineSchedule:
        """Returns the schedule; its stages hold buffers for every micro-batch, of this shape."""
        if self._runner is None or self._built_for != (micro_batches, shape):
            self._stages = [self._stage(index, part, shape) for index, part in self.parts.items()]
            self._runner = make_schedule(self.schedule, self._stages, micro_batches, self._loss)
            self._built_for = (micro_batches, shape)
        return self._runner

    def _stage(self, index: int, part: Part, shape: torch.Size) -> Stage:
        tokens_BT = torch.empty(shape, dtype=torch.int64, device="meta")
        activation = self._activation(shape, torch.device("meta")).requires_grad_()
        return Stage(
            part, index, self.num_stages, self.device, self.group, tokens_BT, activation,
            self.autocast_dtype,
        )  # fmt: skip

    def _activation(self, shape: torch.Size, device: torch.device) -> Tensor:
        [part, *_] = self.parts.values()
        rows, tokens = shape
        whole = (rows, tokens // self.tokens_divided, part.module.config.hidden_size)
        return torch.empty(whole, dtype=self.activation_dtype, device=device)

    def _loss(self, loss_sum: Tensor, target: Any) -> Tensor:
        return loss_sum * self._scale

    def _zero(self) -> Tensor:
        wide = torch.promote_types(self.parameter_dtype, torch.float32)
        return torch.zeros((), dtype=wide, device=self.device)

    # -- evaluation -------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Returns the loss sum of one batch on the rank of the last stage, zero elsewhere.

        Its rows go through the stages one after the other, but a rank may begin with the next
        batch while later ones are still at this.
        """
        loss_sum = self._zero()
        x: Tensor | None = None
        for index, part in self.parts.items():
            if part.is_first:
                x = batch.tokens_BT
            elif index - 1 not in self.parts:
                x = self._activation(batch.tokens_BT.shape, self.device)
                tdist.recv(x, group=self.group, group_src=self._owner(index - 1))
            assert x is not None
            with autocast(self.device, self.autocast_dtype):
                x = part(x, **keywords_of(part, batch))
            if part.is_last:
                loss_sum = x
            elif index + 1 not in self.parts:
                told = self._activation(batch.tokens_BT.shape, torch.device("meta"))
                check_sent(index, x, told)
                tdist.send(x, group=self.group, group_dst=self._owner(index + 1))
        for part in self.parts.values():
            _reshard(part)
        return loss_sum

    def _owner(self, stage: int) -> int:
        return owner_of(self.schedule, stage, self.ranks)

    # -- tied embeddings --------------------------------------------------------------------

    def sync_tied(self) -> None:
        """Adds up the gradients of a tied embedding's two copies, so that both change alike.

        To be called once after the step's last `run`, on all ranks; does nothing where there are no
        two copies. Copies that FSDP or tensor parallelism divides must be divided alike.
        """
        ends = [
            part
            for part in tied_ends(list(self.parts.values()))
            if part.module.embed_tokens.weight.requires_grad
        ]
        weights = dict.fromkeys(part.module.embed_tokens.weight for part in ends)
        gradients = [_local_gradient(weight) for weight in weights]
        if len(gradients) == 2:
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])
        elif len(ends) == 1 and self.num_stages > 1:
            [mine] = gradients
            other = self._owner(self.num_stages - 1 if ends[0].is_first else 0)
            mine += self._exchange(mine.contiguous(), other)

    def _exchange(self, mine: Tensor, other: int) -> Tensor:
        theirs = torch.empty_like(mine)
        messages = [
            tdist.P2POp(tdist.isend, mine, group=self.group, group_peer=other),
            tdist.P2POp(tdist.irecv, theirs, group=self.group, group_peer=other),
        ]
        for work in tdist.batch_isend_irecv(messages):
            work.wait()
        return theirs


def _local_gradient(weight: Tensor) -> Tensor:
    """This rank's part of the gradient, which is made if there is none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    gradient = weight.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _reshard(part: Part) -> None:
    """Gives up gathered parameters, which would be stale after the next update."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
