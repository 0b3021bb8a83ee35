"""Data parallelism by hand: every rank holds the model, gradients are summed after the last one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as tdist

from scalellm.strategies import Strategy


class ByHand(Strategy):
    needs_process_group = True

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        yield
        if is_last:
            self.fill_missing_gradients()
            for _, parameter in self.named_parameters():
                if parameter.grad is not None:
                    tdist.all_reduce(parameter.grad)
