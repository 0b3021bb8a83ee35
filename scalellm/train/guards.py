"""What may end a run before its last step: a signal, no more improvement, no finite gradients."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from scalellm.errors import DivergedError


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag; a later second one ends the process at once.

    Later means by `REPEAT_S`: Ctrl-C in a terminal reaches a rank twice within milliseconds, from
    the terminal and from the launcher that passes it on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    REPEAT_S = 2.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_s > self.REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@dataclass
class NonFiniteGuard:
    """Counts skipped steps in a row; all ranks see the same norm, so they agree without asking."""

    limit: int
    in_a_row: int = 0

    def observe(self, step: int, skipped: bool, grad_norm: float) -> None:
        """Raises DivergedError at the `limit`-th skipped step in a row."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"the gradient norm was {grad_norm} in the {self.in_a_row} steps up to {step}: the "
                "run has diverged; lower train.learning_rate, lengthen train.warmup_steps, or "
                "resume from an earlier checkpoint"
            )


@dataclass
class EarlyStopping:
    """Stops after `patience` evaluations that were not `min_delta` better than the best one."""

    patience: int
    min_delta: float
    best_loss: float = math.inf
    bad_evaluations: int = 0

    def observe(self, loss: float) -> None:
        if loss < self.best_loss - self.min_delta:
            self.best_loss = loss
            self.bad_evaluations = 0
        else:
            self.bad_evaluations += 1

    @property
    def should_stop(self) -> bool:
        return bool(self.patience) and self.bad_evaluations >= self.patience

    def state(self) -> dict[str, Any]:
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "bad_evaluations": self.bad_evaluations}

    def load(self, state: dict[str, Any]) -> None:
        best = state["best_loss"]
        self.best_loss = math.inf if best is None else float(best)
        self.bad_evaluations = int(state["bad_evaluations"])
