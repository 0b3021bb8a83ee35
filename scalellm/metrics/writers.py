"""Where rows go: `metrics.jsonl` is the truth, TensorBoard and W&B are views of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from scalellm.config import Config
from scalellm.errors import ConfigError, UserError

JSONL_NAME = "metrics.jsonl"

# {"kind": "train" | "eval" | "end", "step": 7, ...}: plain numbers, strings, lists of numbers, and
# numbers by name.
Row = dict[str, Any]


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def check_writers(config: Config) -> None:
    """Refuses before anything is written what `open_writers` could not open."""
    if config.metrics.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.wandb is set, but the package wandb is not installed: "
            "pip install 'scalellm[wandb]', or remove metrics.wandb"
        )


def open_writers(config: Config, run_dir: Path, resumed_step: int) -> list[Writer]:
    """Opens what the config asks for; rows after `resumed_step` are dropped: they come again."""
    writers: list[Writer] = [JsonlWriter(run_dir / JSONL_NAME, resumed_step)]
    if config.metrics.tensorboard:
        writers.append(TensorBoardWriter(run_dir / "tensorboard", resumed_step))
    if config.metrics.wandb is not None:
        writers.append(WandbWriter(config, run_dir))
    return writers


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a `metrics.jsonl`; a last line cut short by a kill is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                row["kind"], row["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} line {number} is damaged; delete that line") from None
            yield row


class JsonlWriter:
    """One JSON object a line, flushed line by line; a number that is not finite becomes null."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= resumed_step]
        temporary = path.with_suffix(".jsonl.writing")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Row) -> str:
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter:
    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, row: Row) -> None:
        for key, value in row.items():
            if key not in ("kind", "step") and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])
            if isinstance(value, dict):
                for name, part in value.items():
                    self._writer.add_scalar(f"{row['kind']}/{key}/{name}", part, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        settings = config.metrics.wandb
        assert settings is not None
        self._run: Any = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_dir.name,
            mode=settings.mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            # The same folder is the same W&B run, also after a restart.
            id=hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest(),
            resume="allow",
        )

    def write(self, row: Row) -> None:
        values = {f"{row['kind']}/{key}": value for key, value in row.items() if key != "kind"}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()
