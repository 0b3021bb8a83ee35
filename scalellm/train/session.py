"""What one start of a run cost as a whole: start-up, waiting for saves, memory of every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from scalellm.config import Config
from scalellm.dist import World, gather_over_ranks
from scalellm.metrics import Row, peak_device_bytes, peak_rss_bytes, process_age_s, rss_bytes
from scalellm.model import count_parameters, flops_per_token


class Session:
    """From the start of this process to the end of its training; make it before the model."""

    def __init__(self) -> None:
        self.baseline_rss_bytes = rss_bytes()
        self._startup_s: float | None = None
        self._first_step_s: float | None = None
        self._tokens_before = 0
        self._save_stall_s = 0.0
        self.eval_s = 0.0

    def begin(self, tokens: int) -> None:
        """Training begins; `tokens` were trained by earlier starts of the run."""
        self._startup_s, self._tokens_before = process_age_s(), tokens

    def observe(self, step_time_s: float) -> None:
        """A step has ended; the first one holds what is compiled or allocated once."""
        if self._first_step_s is None:
            self._first_step_s = step_time_s

    @property
    def has_trained(self) -> bool:
        return self._first_step_s is not None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts what training waits for a save, of which the rest may go on behind it."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._save_stall_s += time.perf_counter() - started_s

    def row(self, config: Config, world: World, step: int, tokens: int, reason: str) -> Row:
        """Returns the last row of `metrics.jsonl`; all ranks call it.

        `goodput_tokens_per_s` are the tokens of this start over all its time since the process
        began; lists have an entry per rank.
        """
        held = [self.baseline_rss_bytes, peak_rss_bytes(), peak_device_bytes(world.device)]
        baseline, peak, device = zip(*gather_over_ranks(held, world), strict=True)
        wall_s = process_age_s()
        return {
            "kind": "end",
            "step": step,
            "reason": reason,
            "strategy": config.strategy.name,
            "precision": config.train.precision,
            "world_size": world.world_size,
            "parameters": count_parameters(config.model),
            "flops_per_token": flops_per_token(config.model),
            "startup_s": self._startup_s,
            "first_step_s": self._first_step_s,
            "save_stall_s": self._save_stall_s,
            "eval_s": self.eval_s,
            "wall_s": wall_s,
            "goodput_tokens_per_s": (tokens - self._tokens_before) / wall_s,
            "baseline_rss_bytes": [int(value) for value in baseline],
            "peak_rss_bytes": [int(value) for value in peak],
            "peak_device_bytes": [int(value) for value in device],
        }
