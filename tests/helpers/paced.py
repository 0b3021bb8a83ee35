"""`ddp` at a test's pace, so that what the test kills or signals is under way, however fast it is.

Steps up to a number in a file are as fast as they can be; each one after it waits `PACE_S`, or
until the file names a larger number. A run with so many steps left that this takes longer than the
test would wait for anything cannot end before the test lets it go on. Training stays as it is: the
same updates, in the same order, and a signal is obeyed after the step that waits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

from scalellm.config import setting
from scalellm.strategies import StepResult
from scalellm.strategies.ddp import DDP, DDPOptions

# With it ranks find this module.
PYTHONPATH = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
PACE_S = 5.0


class Pace:
    """A test's end of it: how far a run of `steps` steps may go at once."""

    def __init__(self, file: Path, steps: int, waits_s: float) -> None:
        """`waits_s`: the longest time for which the test waits for one thing, in seconds."""
        self._file, self._steps, self._waits_s = file, steps, waits_s
        self.until(0)

    @property
    def strategy(self) -> dict[str, Any]:
        return {"name": __name__, "pace": str(self._file)}

    def until(self, step: int) -> None:
        """Lets steps up to `step` go free. Raises AssertionError if the rest is soon done."""
        assert (self._steps - step) * PACE_S > self._waits_s, "the run may end while it is awaited"
        self._write(step)

    def off(self) -> None:
        """Nothing waits any more: the run goes to its end."""
        self._write(self._steps)

    def _write(self, step: int) -> None:
        written = self._file.with_suffix(".new")
        written.write_text(str(step))
        written.replace(self._file)  # a rank may be reading it


class PacedOptions(DDPOptions):
    pace: str = setting("", "file with the number of steps that are free")


class Paced(DDP):
    options_class = PacedOptions

    def step(self, learning_rate: float) -> StepResult:
        deadline_s = time.monotonic() + PACE_S
        while self._taken() >= self._free() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return super().step(learning_rate)

    def _taken(self) -> int:
        states = self.optimizer.state.values()
        return max((int(state["step"]) for state in states), default=0)

    def _free(self) -> int:
        return int(Path(cast(PacedOptions, self.options).pace).read_text())
