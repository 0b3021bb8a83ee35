"""A run's weights as other tools read them: plain safetensors, config.json, the tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalellm import checkpoint
from scalellm.checkpoint.layout import bare_name
from scalellm.checkpoint.safetensors_file import write_safetensors
from scalellm.durable import fsync_path
from scalellm.errors import CheckpointError, UserError
from scalellm.train import check_own_tokenizer

FORMAT = "scalellm-decoder"
WEIGHTS = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A larger model is split into files of about this size, with an index as Hugging Face lays it out.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportReport:
    out: Path
    step: int
    num_parameters: int
    size_bytes: int
    num_files: int

    def __str__(self) -> str:
        files = f"{self.num_files} file{'s' if self.num_files > 1 else ''}"
        return (
            f"{self.out}: {self.num_parameters:,} parameters of step {self.step}, "
            f"{self.size_bytes:,} bytes in {files}"
        )


def export_run(path: Path, out: Path, dtype: str) -> ExportReport:
    """Writes the weights of a run's newest checkpoint (or of the one given) to the folder `out`.

    Keys are the names in the bare model, each tensor whole; one tensor is in memory at a time.

    Args:
        dtype: a key of `DTYPES`; the checkpoint's own numbers are fp32, or fp64 of an fp64 run.

    Raises:
        UserError: no sound checkpoint, a damaged tokenizer, or `out` holds something.
    """
    source = checkpoint.open_checkpoint(path)
    if "model" not in source.meta:
        raise CheckpointError(f"{source.path} does not say which model it is of: export needs that")
    run_dir = source.path.resolve().parent.parent
    check_own_tokenizer(run_dir, source.meta.get("tokenizer_sha256"))
    out = out.resolve()
    _refuse_content(out)
    temporary = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        report = _write(source, run_dir, temporary, out, DTYPES[dtype])
        temporary.rename(out)  # also onto an empty folder
        fsync_path(out.parent)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {error.strerror}; free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _refuse_content(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty; choose another folder or empty it first")


def _write(
    source: checkpoint.Checkpoint, run_dir: Path, folder: Path, out: Path, dtype: torch.dtype
) -> ExportReport:
    shapes = {
        bare_name(name): source.shape(name)
        for name in sorted(source.names())
        if name.startswith("model.")
    }
    files = _spread(shapes, dtype.itemsize)
    for name, keys in files.items():
        write_safetensors(
            folder / name,
            {key: (dtype, shapes[key]) for key in keys},
            lambda key: source.read(f"model.{key}", (0,) * len(shapes[key]), shapes[key]).to(dtype),
        )
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    size_bytes = num_parameters * dtype.itemsize
    if len(files) > 1:
        weight_map = {key: name for name, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        _write_json(folder / f"{WEIGHTS}.index.json", index)
    described = {
        "format": FORMAT,
        "step": source.step,
        "dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", described | source.meta["model"])
    for tokenizer in run_dir.glob("tokenizer.*"):
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    return ExportReport(out, source.step, num_parameters, size_bytes, len(files))


def _spread(shapes: dict[str, tuple[int, ...]], element_bytes: int) -> dict[str, list[str]]:
    """Returns the keys of each file, in order; a tensor is never split."""
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for key, shape in shapes.items():
        size_bytes = element_bytes * math.prod(shape)
        if groups[-1] and filled_bytes + size_bytes > MAX_FILE_BYTES:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(key)
        filled_bytes += size_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": keys
        for number, keys in enumerate(groups, start=1)
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
