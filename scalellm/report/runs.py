"""What a run folder says of itself, read leniently: runs that still go, and runs of older versions.

Rows and keys that are not there are left out; only what is damaged is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from scalellm.errors import UserError
from scalellm.metrics import JSONL_NAME, Row, read_rows
from scalellm.report.document import is_number

PARTS = ("data_wait_s", "forward_s", "backward_s", "optimizer_s")


@dataclass(frozen=True)
class Run:
    """`end` is the row of a run that has ended; its figures are of the last start of the run."""

    label: str
    config: dict[str, Any]
    environment: dict[str, Any]
    train: list[Row]
    evals: list[Row]
    end: Row

    def pairs(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a key of the training rows, those with a number only."""
        return _pairs(self.train, key)

    def eval_losses(self) -> tuple[list[int], list[float]]:
        return _pairs(self.evals, "loss")

    def median(self, key: str) -> float | None:
        values = self.pairs(key)[1]
        return median(values) if values else None

    def per_rank(self, key: str) -> list[float]:
        """Bytes of every rank; of rank 0 alone, from its rows, while the run has not ended."""
        values = self.end.get(key)
        if isinstance(values, list):
            return [float(value) for value in values if is_number(value)]
        found = self.pairs(key)[1]
        return [max(found)] if found else []

    def setting(self, section: str, key: str) -> Any:
        content = self.config.get(section)
        return content.get(key) if isinstance(content, dict) else None


def _pairs(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]
    return [step for step, _ in found], [value for _, value in found]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads every folder once, in the order given.

    Raises:
        UserError: a folder holds no run, a run without a step, or a damaged file.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return [_read_run(folder, label) for folder, label in zip(unique, _labels(unique), strict=True)]


def _labels(folders: list[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells all of them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        labels = [_readable("/".join(parts[-depth:])) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _readable(name: str) -> str:
    """A name as text that can be drawn: bytes that are no UTF-8 become question marks."""
    return name.encode(errors="replace").decode()


def _read_run(folder: Path, label: str) -> Run:
    try:
        return _read(folder, label)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot read {where}: {error.strerror}; check its permissions") from None


def _read(folder: Path, label: str) -> Run:
    path = folder / JSONL_NAME
    if not path.is_file():
        raise UserError(_no_run(folder))
    rows = list(read_rows(path))
    train = [row for row in rows if row["kind"] == "train" and is_number(row["step"])]
    if not train:
        raise UserError(f"{folder} has no training step in {JSONL_NAME} yet: wait for the first")
    return Run(
        label=label,
        config=_mapping(folder / "config.yaml"),
        environment=_mapping(folder / "environment.json"),
        train=train,
        evals=[row for row in rows if row["kind"] == "eval" and is_number(row["step"])],
        # A run that was resumed has the end of an earlier start in the middle.
        end=rows[-1] if rows[-1]["kind"] == "end" else {},
    )


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"there is no run folder {folder}"
    if not folder.is_dir():
        return f"{folder} is a file: give the run's folder, which holds {JSONL_NAME}"
    message = f"{folder} is not a run folder: it has no {JSONL_NAME}"
    if (folder / "sweep.json").exists():
        return f"{message}; it is a sweep, whose page is {folder / 'report.html'}"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{JSONL_NAME}"))
    return f"{message}; runs inside it: {', '.join(inside[:5])}" if inside else message


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file; {} where there is none."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: restore it, or remove it to do without")
    return content


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`, values as they are written in YAML."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False).strip('"')
    return flat
