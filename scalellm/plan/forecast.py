"""The peak memory of a run, predicted by a process beside it: `python -m scalellm.plan.forecast`.

A rank cannot run dry itself once it is in a process group, and before it would lose the seconds
that it takes. The process is nicer than the ranks and reads the config on stdin.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress

from scalellm.config import Config, parse_config
from scalellm.dist import World
from scalellm.plan.types import Memory

_log = logging.getLogger(__name__)
# A prediction takes a few seconds: a shorter run would be over before it.
LEAST_STEPS = 50
_NICENESS = 5


def predicted_peak_bytes(config: Config, world_size: int, device_type: str) -> int:
    """Returns what `train.forecast.MemoryWatch` measures of rank 0: of the device, or of a process.

    Raises:
        UserError: see `memory.estimate`.
    """
    from scalellm.plan.memory import estimate

    memory = estimate(config, world_size, device_type)
    return memory.peak_bytes + beside_bytes(config, world_size, memory, device_type)


def on_gpu(config: Config) -> bool:
    """Whether a run of this config computes on a GPU here."""
    import torch

    return config.run.device != "cpu" and torch.cuda.is_available()


def beside_bytes(config: Config, world_size: int, memory: Memory, device_type: str) -> int:
    """What a rank's process has beside its tensors: on a CPU the heap is the same memory."""
    if device_type != "cpu":
        return 0
    from scalellm.plan.cpu import beside_tensors

    return memory.host_bytes + beside_tensors(config, world_size, memory)


class BackgroundForecast:
    """A `train.forecast.Forecast` that a process of its own computes, from now on.

    Begun as early as can be, so that both load their libraries at the same time.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_bytes: int | None = None
        is_worth_it = config.metrics.predict_memory and config.train.steps >= LEAST_STEPS
        if not (world.is_main and is_worth_it):
            return
        question = {"config": config.model_dump(mode="json"), "world_size": world.world_size}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scalellm.plan.forecast"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(json.dumps(question).encode())
        except OSError as error:
            _log.debug("no memory forecast: %s", error)
            self.close()

    def peak_bytes(self) -> int | None:
        process = self._process
        if process is None or process.poll() is None:
            return self._peak_bytes
        self._process = None
        assert process.stdout is not None
        with process.stdout as stdout:
            answer = stdout.read()
        if process.returncode == 0 and answer.strip().isdigit():
            self._peak_bytes = int(answer)
        else:
            _log.debug("no memory forecast: exit code %s", process.returncode)
        return self._peak_bytes

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def main() -> int:
    """Answers the question on stdin with a number of bytes."""
    from scalellm.train.datasets import open_mixture, with_vocabulary

    os.nice(_NICENESS)
    question = json.load(sys.stdin)
    config = parse_config(question["config"])
    config = with_vocabulary(config, open_mixture(config))
    device_type = "cuda" if on_gpu(config) else "cpu"
    print(predicted_peak_bytes(config, question["world_size"], device_type))
    return 0


if __name__ == "__main__":
    sys.exit(main())
