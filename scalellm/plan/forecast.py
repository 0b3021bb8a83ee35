"""The peak memory of a run, predicted by a process beside it: `python -m scalellm.plan.forecast`.

A rank cannot run dry itself, since it is in a process group already, and the seconds that it takes
would be lost to training. The process is as nice as can be and reads the config on stdin.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress

from scalellm.config import Config, parse_config
from scalellm.config.yaml_text import parse_yaml
from scalellm.plan.types import Memory
from scalellm.train import dump_config

_log = logging.getLogger(__name__)


def predicted_peak_bytes(config: Config, world_size: int, device_type: str) -> int:
    """Returns what `train.forecast.MemoryWatch` measures of rank 0: of the device, or of a process.

    Raises:
        UserError: see `memory.estimate`.
    """
    from scalellm.plan.memory import estimate

    memory = estimate(config, world_size, device_type)
    return memory.peak_bytes + beside_bytes(config, world_size, memory, device_type)


def beside_bytes(config: Config, world_size: int, memory: Memory, device_type: str) -> int:
    """What a rank's process has beside its tensors: on a CPU the heap is the same memory."""
    if device_type != "cpu":
        return 0
    from scalellm.plan.cpu import beside_tensors

    return memory.host_bytes + beside_tensors(config, world_size, memory)


class BackgroundForecast:
    """A `train.forecast.Forecast` that a process of its own computes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_bytes: int | None = None

    def begin(self, config: Config, world_size: int, device_type: str) -> None:
        question = {"config": dump_config(config), "world_size": world_size, "device": device_type}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scalellm.plan.forecast"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
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
    os.nice(19)
    question = json.load(sys.stdin)
    values = parse_yaml(question["config"], "the run's config")
    print(predicted_peak_bytes(parse_config(values), question["world_size"], question["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
