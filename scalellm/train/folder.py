"""A run's folder: self-contained, held by one run at a time.

config.yaml       the resolved configuration        metrics.jsonl   every row, canonical
environment.json  versions and hardware             tensorboard/    the same, to look at
tokenizer.*       what the ids mean                 checkpoints/    step-00000010/ ...
loss.png          the loss curve                    sample.txt      what it writes
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from scalellm.config import Config, load_config
from scalellm.cores import available_cores
from scalellm.dist import World
from scalellm.errors import CheckpointError, ConfigError
from scalellm.metrics import JSONL_NAME

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
LOCK_NAME = ".lock"
_LOCK_POLL_S = 0.1
_PACKAGES = (
    "scalellm",
    "torch",
    "deepspeed",
    "accelerate",
    "ray",
    "numpy",
    "safetensors",
    "zstandard",
)


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_NAME

    def claim(self, *, resuming: bool, wait_s: float = 0.0) -> None:
        """Creates the folder and locks it; one rank calls it.

        Args:
            wait_s: how long to wait for a process that holds it.

        Raises:
            ConfigError: another process trains into it, or it holds a run and nobody said resume.
        """
        try:
            is_free = self._lock_it(wait_s)
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another"
            ) from None
        if not is_free:
            raise ConfigError(
                f"run.dir={self.path} is in use by another training process; wait for it or choose "
                "another run.dir"
            )
        if not resuming:
            check_holds_no_run(self.path)

    def _lock_it(self, wait_s: float) -> bool:
        deadline_s = time.monotonic() + wait_s
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK_NAME).open("w")
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have removed the folder with this file since.
                if os.path.samestat(os.fstat(lock.fileno()), (self.path / LOCK_NAME).stat()):
                    self._lock = lock
                    return True
            lock.close()
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_LOCK_POLL_S)

    def describe(self, config: Config, world: World, tokenizer: Path | None) -> None:
        """Writes what is needed to understand and reuse the run without anything else."""
        # Absolute, so that `scalellm eval` finds the data from any working directory.
        source = config.data.with_paths(lambda path: path.resolve())
        _write(self.path / CONFIG_NAME, dump_config(config.model_copy(update={"data": source})))
        environment = json.dumps(describe_environment(world), indent=1)
        _write(self.path / "environment.json", environment + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, self.path / tokenizer.name)

    def release(self) -> None:
        """Lets go of the folder; one that holds nothing but the lock is removed again."""
        if self._lock is None:
            return
        if [path.name for path in self.path.iterdir()] == [LOCK_NAME]:
            (self.path / LOCK_NAME).unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None


def check_holds_no_run(run_dir: Path) -> None:
    """Raises ConfigError if a run has begun in this folder."""
    if (run_dir / JSONL_NAME).exists():
        raise ConfigError(
            f"run.dir={run_dir} already holds a run: add --resume auto to go on with it, "
            "or choose another run.dir"
        )


def tokenizer_sha256(run_dir: Path) -> str | None:
    """Hash of the run's own tokenizer file, or None if the ids came without one."""
    file = next(run_dir.glob("tokenizer.*"), None)
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def check_own_tokenizer(run_dir: Path, wanted_sha256: str | None) -> None:
    """Raises CheckpointError if the run's tokenizer is not the one its checkpoint speaks of."""
    if wanted_sha256 != tokenizer_sha256(run_dir):
        raise CheckpointError(
            f"the tokenizer file in {run_dir} is damaged or missing; copy it again from the "
            "dataset the run was trained on"
        )


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_run_config(run_dir: Path) -> Config:
    """Reads the resolved configuration of a run. Raises ConfigError if it is no run folder."""
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no {CONFIG_NAME}")
    return load_config(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def describe_environment(world: World) -> dict[str, Any]:
    """Returns the hardware, the versions and the command that figures of this process hold for."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    device = world.device
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "world_size": world.world_size,
        "launcher": world.launcher,
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
