"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, "Mixed Precision Training", 3.2)."""

from __future__ import annotations

INITIAL = 65536.0
GROWTH_INTERVAL_STEPS = 2000


class LossScale:
    """Halved when a step overflows, doubled after 2,000 good ones; stays 1 when not enabled.

    torch's GradScaler keeps its verdict per device; here the verdict is the global gradient norm,
    which is the same on every rank of every strategy.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = INITIAL if enabled else 1.0
        self.good_steps = 0

    def update(self, overflowed: bool) -> None:
        if not self.enabled:
            return
        if overflowed:
            self.value = max(self.value / 2, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL_STEPS:
            self.value *= 2
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.value = float(state["value"])
            self.good_steps = int(state["good_steps"])
