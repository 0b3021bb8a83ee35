"""A user's own strategy, found by its dotted name: ddp or single, with NaN losses on demand."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from scalellm.batches import Batch
from scalellm.strategies import Strategy
from scalellm.strategies.ddp import DDP, DDPOptions


class PoisonOptions(DDPOptions):
    steps: list[int]
    rank: int


class Poisoned(DDP):
    options_class = PoisonOptions

    def setup(self, *arguments: Any) -> None:
        super().setup(*arguments)
        self.next_step = 1

    def forward(self, batch: Batch) -> Tensor:
        loss_sum = super().forward(batch)
        options = cast(PoisonOptions, self.options)
        if self.next_step in options.steps and self.world.rank == options.rank:
            return loss_sum * float("nan")
        return loss_sum

    def step(self, learning_rate: float) -> Any:
        self.next_step += 1
        return Strategy.step(self, learning_rate)
