"""Who starts the ranks, and how many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from scalellm.config.section import Section, setting


def _or_a_number(schema: dict[str, Any]) -> None:
    bounds = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "integer", "minimum": 1}, bounds]


class WorkerRange(Section):
    """As many ranks as the cluster has room for, between two bounds."""

    model_config = ConfigDict(json_schema_extra=_or_a_number)

    min: int = setting(1, "fewest ranks; with fewer the run waits", unit="ranks", ge=1, le=2**16)
    max: int = setting(1, "most ranks", unit="ranks", ge=1, le=2**16)

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, given: Any) -> Any:
        """A plain number is a range of one."""
        if isinstance(given, int) and not isinstance(given, bool):
            return {"min": given, "max": given}
        if isinstance(given, WorkerRange) or (isinstance(given, dict) and "max" in given):
            return given
        if isinstance(given, dict) and not given.keys() <= {"min"}:
            return given  # a misspelt key, which is named later
        raise ValueError(f"{given!r} is no number of ranks; say 2, or {{min: 1, max: 4}}")

    @model_validator(mode="after")
    def _check_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min={self.min} ranks is above max={self.max}; lower it")
        return self


class ClusterConfig(Section):
    """Who starts the ranks. All but `name` is for `name: ray`."""

    name: Literal["local", "ray"] = setting(
        "local", "who starts the ranks: you or a launcher (local), or Ray Train (ray)"
    )
    nodes: int | None = setting(
        None, "each holds workers_per_node ranks; null: say workers", unit="nodes", ge=1, le=2**16
    )
    workers_per_node: int = setting(1, "ranks on each of nodes", unit="ranks", ge=1, le=1024)
    workers: WorkerRange | None = setting(
        None, "ranks wherever there is room; {min: 1, max: 4}: elastic; null: say nodes"
    )
    cpus_per_worker: float = setting(1.0, "reserved for a rank", unit="CPUs", gt=0, le=4096)
    gpus_per_worker: float = setting(0.0, "reserved for a rank", unit="GPUs", ge=0, le=1024)
    resources_per_worker: dict[str, float] = setting(
        {}, "other Ray resources reserved for a rank, such as memory in bytes"
    )
    placement: Literal["pack", "spread"] = setting("pack", "fill a node first, or use many")
    address: str | None = setting(
        None,
        "host:port of a Ray cluster; null: the one at hand, else one on this machine; "
        "local: always one on this machine",
    )
    storage_path: Path | None = setting(
        None,
        "folder that all nodes share; a relative run.dir or data.path lies in it; null: the "
        "working directory",
    )
    max_failures: int = setting(
        3, "deaths of ranks or nodes to go on after; -1: any number", unit="failures", ge=-1
    )
    resize_every_s: float = setting(
        60.0, "how often an elastic run looks for more room", unit="s", ge=0.1
    )
    wait_for_nodes_s: float = setting(
        1800.0, "how long to wait for room before giving up", unit="s", gt=0
    )

    @model_validator(mode="after")
    def _check_workers(self) -> ClusterConfig:
        # Who writes name=local over a config for Ray means it, and need not remove the rest.
        if "name" not in self.model_fields_set and self.model_fields_set:
            raise ValueError(f"{min(self.model_fields_set)} needs cluster.name=ray beside it")
        if self.name == "ray" and self.workers is not None and self.nodes is not None:
            raise ValueError("workers and nodes both say how many ranks; set one of them to null")
        if self.name == "ray" and self.workers is None and self.nodes is None:
            raise ValueError(
                "ray needs to know how many ranks: either cluster.workers=2 (or {min: 1, max: 4}), "
                "or cluster.nodes=2 and cluster.workers_per_node=1"
            )
        for what, amount in self.resources_per_worker.items():
            if amount < 0:
                raise ValueError(f"resources_per_worker.{what}={amount:g} must be 0 or more")
        if self.nodes is None and self.workers_per_node != 1:
            raise ValueError(
                f"workers_per_node={self.workers_per_node} ranks needs cluster.nodes beside it, in "
                "the place of cluster.workers"
            )
        return self

    @property
    def ranks(self) -> WorkerRange:
        """How many ranks may run: at least as many as at most, if the number is fixed."""
        fixed = (self.nodes or 1) * self.workers_per_node
        return self.workers or WorkerRange(min=fixed, max=fixed)

    @property
    def is_elastic(self) -> bool:
        return self.ranks.min < self.ranks.max
