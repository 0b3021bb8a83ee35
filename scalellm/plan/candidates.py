"""Ways to train one config: what each changes, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalellm.config import Config
from scalellm.plan.devices import Device
from scalellm.plan.speed import StepTime
from scalellm.plan.types import Memory

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to train: what it changes in the config, what it needs and how long a step takes.

    `refused` says why it cannot be, in the place of memory and time; `time` is None where it does
    not fit.
    """

    label: str
    world_size: int
    changes: Values
    config: Config | None = None
    memory: Memory | None = None
    time: StepTime | None = None
    over_bytes: int = 0
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.over_bytes <= 0


def variants(world_size: int, device: Device, precision: str) -> dict[str, dict[str, Any]]:
    """Strategies worth comparing on so many ranks, with their options."""
    if world_size == 1:
        return {"single": {"name": "single"}, **offloading()}
    found: dict[str, dict[str, Any]] = {
        "ddp": {"name": "ddp"},
        "ddp zero-1": {"name": "ddp", "shard_optimizer": True},
        "fsdp": {"name": "fsdp"},
        "fsdp no reshard": {"name": "fsdp", "reshard_after_forward": False},
    }
    half = _on_the_wire(precision)
    if half:
        found[f"fsdp {precision}"] = {"name": "fsdp", **half}
    if world_size > device.devices_per_node and world_size % device.devices_per_node == 0:
        one_node = {"shard_ranks": device.devices_per_node}
        found["fsdp hybrid"] = {"name": "fsdp", **one_node, **half}
    for stage in (1, 2, 3):
        found[f"zero-{stage}"] = {"name": "deepspeed", "stage": stage}
    return {**found, **offloading()}


def _on_the_wire(precision: str) -> dict[str, str]:
    """What shards gather and reduce where the model computes in half precision."""
    if precision not in ("bf16", "fp16"):
        return {}
    return {"param_dtype": precision, "reduce_dtype": "fp32"}


_LONG_ROW = 16_384  # tokens from which dividing rows is worth a look


def meshes(
    world_size: int, device: Device, seq_len: int, precision: str
) -> dict[str, dict[str, Any]]:
    """Meshes of ranks that share a model, tensor groups within a node; the rest are shards."""
    few = [size for size in (2, 4, 8) if size <= world_size]
    in_node = [size for size in few if size <= device.devices_per_node]
    found: list[dict[str, int]] = [{"tp": tp} for tp in in_node]
    found += [{"tp": tp, "pp": pp} for tp in in_node[-1:] for pp in few]
    if seq_len >= _LONG_ROW:
        found += [{"cp": cp} for cp in few]
    named = {}
    for mesh in found:
        rest, left = divmod(world_size, math.prod(mesh.values()))
        if left or not rest:
            continue
        whole = {**mesh, "fsdp": rest} if rest > 1 else mesh
        label = " x ".join(f"{name} {size}" for name, size in whole.items())
        wire = _on_the_wire(precision) if rest > 1 else {}
        named[label] = {"name": "parallel", "mesh": whole, **wire}
    return named


def offloading() -> dict[str, dict[str, Any]]:
    """Those that keep something in the host's memory."""
    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    return {
        "fsdp offload": {"name": "fsdp", "cpu_offload": True},
        "zero-2 offload": {"name": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
        "zero-3 offload": {"name": "deepspeed", "stage": 3, **both},
    }


def merged(values: Values, changes: Values) -> dict[str, Any]:
    """The values with the changes in them; a new strategy replaces the old one with its options."""
    result = dict(values)
    for section, fields in changes.items():
        old = {} if section == "strategy" else dict(result.get(section) or {})
        result[section] = {**old, **fields}
    return result
