"""What a run is trained on: one dataset, or several by weight, in stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import model_validator

from scalellm.config.location import Location, RemoteOptions
from scalellm.config.section import Section, setting
from scalellm.errors import did_you_mean

# The one dataset of a run without a mixture.
ALONE = ""


class MixedDataset(Section):
    """One dataset of a mixture."""

    path: Location = setting(..., "dataset folder written by `scalellm prepare`, or its URL")
    weight: float = setting(1.0, "share of the rows, relative to the others'", ge=0, le=1e9)


class StageConfig(Section):
    """What changes at a step of the run; the rest stays as it was in the stage before."""

    from_step: int = setting(..., "first optimizer step of the stage, from 1", unit="steps", ge=1)
    weights: dict[str, float] | None = setting(
        None, "by name in data.mix, who is not named gets none; null: as before"
    )
    seq_len: int | None = setting(
        None,
        "length of a sample, at most model.seq_len; null: as before",
        unit="tokens",
        ge=1,
        le=2**24,
    )


class DataConfig(Section):
    path: Location = setting(
        Path("data/stdlib"),
        "dataset folder written by `scalellm prepare`, or its URL: http, https, s3, gs, hf",
    )
    mix: dict[str, MixedDataset] | None = setting(
        None, "datasets by name, each with path and weight, instead of data.path"
    )
    stages: list[StageConfig] = setting(
        [], "other weights of data.mix, or another length of samples, from a step on"
    )
    lanes: int = setting(
        64, "blocks of samples interleaved by the shuffle", unit="blocks", ge=1, le=65536
    )
    decode_threads: int = setting(
        1, "decode-ahead threads per dataset", unit="threads", ge=0, le=64
    )
    document_mask: bool = setting(False, "keep attention and positions inside each document")
    cache_dir: Path | None = setting(
        None, "folder on this host for what comes from a URL; null: in memory, little"
    )
    cache_bytes: int = setting(
        10 << 30, "most that cache_dir may hold", unit="bytes", ge=1 << 20, le=2**60
    )
    retries: int = setting(
        5, "tries of a request to a URL, the first included", unit="tries", ge=1, le=100
    )
    timeout_s: float = setting(
        30.0, "a request to a URL that takes longer is tried again", unit="seconds", gt=0, le=3600
    )

    @model_validator(mode="after")
    def _check_mix(self) -> DataConfig:
        if self.mix is not None and not self.mix:
            raise ValueError("mix names no dataset; give at least one, or set data.path instead")
        for name in self.mix or ():
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"mix: {name!r} is no plain name; use letters, digits and _")
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages: from_step must rise from stage to stage, got {steps}")
        for stage in self.stages:
            for name in stage.weights or ():
                if name not in (self.mix or ()):
                    near = did_you_mean(name, self.mix or ())
                    known = ", ".join(self.mix or ()) or "none: data.mix is not set"
                    raise ValueError(f"stages: {name!r} is not in data.mix{near} (it has {known})")
        return self

    @property
    def paths(self) -> dict[str, Path | str]:
        """The datasets by name: folders, or URLs as str."""
        if self.mix is None:
            return {ALONE: self.path}
        return {name: dataset.path for name, dataset in self.mix.items()}

    def with_paths(self, change: Callable[[Path], Path]) -> DataConfig:
        """Returns a copy whose paths are what `change` makes of them; URLs stay."""
        changed: dict[str, Any] = {"path": _changed(self.path, change)}
        if self.cache_dir is not None:
            changed["cache_dir"] = change(self.cache_dir)
        if self.mix is not None:
            changed["mix"] = {
                name: dataset.model_copy(update={"path": _changed(dataset.path, change)})
                for name, dataset in self.mix.items()
            }
        return self.model_copy(update=changed)

    @property
    def remote(self) -> RemoteOptions:
        """How URLs are read."""
        return RemoteOptions(self.cache_dir, self.cache_bytes, self.retries, self.timeout_s)

    @property
    def where(self) -> str:
        """The datasets in words."""
        return ", ".join(map(str, self.paths.values()))


def _changed(path: Path | str, change: Callable[[Path], Path]) -> Path | str:
    return path if isinstance(path, str) else change(path)
