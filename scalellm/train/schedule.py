"""Learning rates as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from scalellm.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (1 is the first).

    Linear warm-up, then `constant`, `cosine` (Loshchilov & Hutter 2017), `linear`, or `wsd`
    (warm-up, stable, decay: Hu et al. 2024, MiniCPM) down to `min_learning_rate`.
    """
    peak, floor = train.learning_rate, train.min_learning_rate
    if step <= train.warmup_steps:
        return peak * step / train.warmup_steps
    decay_steps = train.steps - train.warmup_steps
    if train.schedule == "wsd":
        decay_steps = train.wsd_decay_steps
    if train.schedule == "constant" or decay_steps == 0:
        return peak
    left = min(1.0, max(0.0, (train.steps - step) / decay_steps))
    share = 0.5 * (1 - math.cos(math.pi * left)) if train.schedule == "cosine" else left
    return floor + (peak - floor) * share
