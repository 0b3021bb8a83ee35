"""What a person sees while it trains: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from scalellm.metrics.writers import Row

LOG_INTERVAL_S = 10.0


class Progress:
    """A `Writer` that shows loss, tokens/s, memory and the time left. Silent unless `shown`."""

    def __init__(
        self, first_step: int, steps: int, *, shown: bool, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._steps = steps
        self._shown = shown
        self._seconds_per_step = 0.0  # smoothed
        self._last_line_s = 0.0
        on_terminal = shown and self._stream.isatty()
        self._bar: Any = None
        if on_terminal:
            self._bar = tqdm(
                initial=first_step,
                total=steps,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def write(self, row: Row) -> None:
        if not self._shown:
            return
        if row["kind"] == "eval":
            self.say(_eval_words(row))
        elif row["kind"] != "train":
            return
        elif self._bar is not None:
            self._bar.set_postfix_str(_train_words(row), refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        else:
            self._log(row)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._shown:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _log(self, row: Row) -> None:
        before, now_s = self._seconds_per_step, time.monotonic()
        self._seconds_per_step = (
            0.9 * before + 0.1 * row["step_time_s"] if before else row["step_time_s"]
        )
        is_last = row["step"] == self._steps
        if is_last or now_s - self._last_line_s >= LOG_INTERVAL_S:
            self._last_line_s = now_s
            left_s = (self._steps - row["step"]) * self._seconds_per_step
            print(
                f"step {row['step']}/{self._steps}  {_train_words(row)}  {left_s:.0f} s left",
                file=self._stream,
                flush=True,
            )


def _train_words(row: Row) -> str:
    memory_bytes = row.get("peak_device_bytes") or row["peak_rss_bytes"]
    return (
        f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s  "
        f"{memory_bytes / 2**30:.2f} GiB"
    )


def _eval_words(row: Row) -> str:
    parts = (f"{name} {loss:.4f}" for name, loss in row.get("loss_by_source", {}).items())
    of_each = ", ".join(parts)
    return (
        f"step {row['step']}  validation loss {row['loss']:.4f} nats/token  "
        f"perplexity {row['perplexity']:.2f}" + (f"  ({of_each})" if of_each else "")
    )
