"""What a device can do: named ones from their data sheets, one of your own, or this CPU, measured.

`devices.yaml` holds the figures and where each comes from. What of them a training step reaches is
said by `Efficiency`: round numbers, until `scalellm plan --calibrate` has fitted them to runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from scalellm.config import Section, read_yaml, setting
from scalellm.config.explain import explain
from scalellm.errors import ConfigError, did_you_mean
from scalellm.model import cpu_multiplies_bf16
from scalellm.products import fast_fp32

THIS_CPU = "this-cpu"
_FILE = Path(__file__).with_name("devices.yaml")
_FP16_ALTERNATIVES = ("bf16", "fp16", "fp32")


class Rates(Section):
    """Matrix products, dense, in FLOP/s; null: the device has no units for it."""

    fp64: float | None = setting(None, "double precision", unit="FLOP/s", gt=0)
    fp32: float = setting(..., "single precision, no TF32", unit="FLOP/s", gt=0)
    tf32: float | None = setting(None, "not used by scalellm, for reference", unit="FLOP/s", gt=0)
    bf16: float | None = setting(None, "bfloat16, fp32 sums", unit="FLOP/s", gt=0)
    fp16: float | None = setting(None, "half precision, fp32 sums", unit="FLOP/s", gt=0)
    fp8: float | None = setting(None, "not used by scalellm, for reference", unit="FLOP/s", gt=0)


class Efficiency(Section):
    """Shares of a device's rates that a step reaches. The defaults are assumed, not measured.

    matrix: large bf16 products of cuBLAS reach 60 to 80% of the sheet on A100 and H100. Attention
    counts at the same rate with all keys, of which its kernel skips half and reaches half.
    memory: large copies and element-wise kernels reach 80 to 90%. link: NCCL's large collectives
    reach about 80% of NVLink and of the network.
    """

    matrix: float = setting(0.7, "of `rates`, by matrix products", gt=0)
    memory: float = setting(0.8, "of `memory_bytes_per_s`, by all other operators", gt=0)
    link: float = setting(0.8, "of the links and the network, by collectives", gt=0)
    host: float = setting(0.8, "of the host's memory and the link to it, by offloading", gt=0)
    launch: float = setting(1.0, "of the operators launched in `launch_s` each", gt=0)
    fused: float = setting(
        0.5, "of bytes and operators, what `train.compile` leaves; the least certain", gt=0
    )


class Device(Section):
    name: str = setting("", "how it is called; the file's name for one of your own")
    memory_bytes: int = setting(..., "what the driver reports", unit="bytes", gt=0)
    usable_share: float = setting(0.95, "of it, for a run's tensors", gt=0, le=1)
    rates: Rates
    memory_bytes_per_s: float = setting(..., "reading and writing", unit="bytes/s", gt=0)
    node_link_bytes_per_s: float = setting(
        ..., "of one device to the others of its node, one direction", unit="bytes/s", gt=0
    )
    devices_per_node: int = setting(..., "that share that link", unit="devices", ge=1)
    network_bytes_per_s: float = setting(
        ..., "a device's share of what its node sends to others", unit="bytes/s", gt=0
    )
    host_link_bytes_per_s: float = setting(..., "to the host, one direction", unit="bytes/s", gt=0)
    host_memory_bytes_per_s: float = setting(
        ..., "a device's share of the host's memory", unit="bytes/s", gt=0
    )
    # NCCL's own table for its LL128 protocol (src/graph/tuning.cc): rings over NVLink and network.
    collective_s: float = setting(14e-6, "to start one collective", unit="s", ge=0)
    node_hop_s: float = setting(1.9e-6, "from one rank to the next in a node", unit="s", ge=0)
    network_hop_s: float = setting(4e-6, "from one node to the next", unit="s", ge=0)
    launch_s: float = setting(5e-6, "to launch one operator; a guess", unit="s", ge=0)
    is_cpu: bool = setting(
        False, "the ranks compute in the host's own memory, and share it and its rates"
    )
    efficiency: Efficiency = setting(Efficiency(), "what a step reaches of all this")

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.usable_share)

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of `train.precision`. Raises ConfigError if the device has no units for it."""
        rate: float | None = getattr(self.rates, precision)
        if rate is None:
            has = [name for name in _FP16_ALTERNATIVES if getattr(self.rates, name) is not None]
            raise ConfigError(
                f"train.precision={precision}: {self.name} has no {precision} matrix units; "
                f"use {' or '.join(has)}"
            )
        return rate

    def divided(self, num_ranks: int, share: float = 1.0) -> Device:
        """What each of `num_ranks` has of a CPU that all of them share.

        Args:
            share: of its own part of the cores, if it has fewer threads than that.
        """
        part = share / num_ranks
        rates = {name: rate and rate * part for name, rate in self.rates.model_dump().items()}
        kinds = ("memory_bytes_per_s", "host_link_bytes_per_s", "host_memory_bytes_per_s")
        shared: dict[str, Any] = {kind: getattr(self, kind) / num_ranks for kind in kinds}
        shared |= {"rates": Rates.model_validate(rates), "devices_per_node": num_ranks}
        return self.model_copy(update={**shared, "memory_bytes": self.memory_bytes // num_ranks})


def names() -> list[str]:
    """What `--device` takes besides a file's path."""
    return [*_table(), THIS_CPU]


def find_device(name: str, num_ranks: int = 1) -> Device:
    """Returns a device by name or by the path of a YAML file of one.

    Args:
        num_ranks: how many share the machine, for `this-cpu`, which is measured here and now, and
            for the file of a CPU.

    Raises:
        ConfigError: no such name or file, or a file that is not a device.
    """
    if name == THIS_CPU:
        return measure_this_cpu().divided(num_ranks)
    if name.endswith((".yaml", ".yml")):
        device = _parse({"name": Path(name).stem, **read_yaml(Path(name))}, name)
        return device.divided(num_ranks) if device.is_cpu else device
    table = _table()
    if name not in table:
        raise ConfigError(
            f"--device={name} is unknown{did_you_mean(name, names())}; devices: "
            f"{', '.join(names())}, or the path of a YAML file"
        )
    return table[name]


@cache
def _table() -> dict[str, Device]:
    values = read_yaml(_FILE)
    return {name: _parse({"name": name, **fields}, _FILE.name) for name, fields in values.items()}


def _parse(values: dict[str, object], source: str) -> Device:
    try:
        return Device.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Device, source)) from None


# -- this machine -------------------------------------------------------------------------------

_SECONDS = 0.3
_SIZE = 1024
_COPIED_BYTES = 64 << 20
# Gloo over shared memory between two ranks of one machine: 1.1 to 1.5 GB/s measured.
_GLOO_BYTES_PER_S = 1.2e9
_GLOO_COLLECTIVE_S = 200e-6
_CPU_OPERATOR_S = 5e-6


def measure_this_cpu() -> Device:
    """Measures matrix products and copies of the whole machine for about a second."""
    bandwidth = _copy_bytes_per_s()
    with fast_fp32():  # as in a run
        rates = {"fp64": _gemm_flops(torch.float64), "fp32": _gemm_flops(torch.float32)}
    if cpu_multiplies_bf16():
        rates["bf16"] = _gemm_flops(torch.bfloat16)
    return Device(
        name=THIS_CPU,
        memory_bytes=machine_bytes(),
        rates=Rates.model_validate(rates),
        memory_bytes_per_s=bandwidth,
        node_link_bytes_per_s=_GLOO_BYTES_PER_S,
        devices_per_node=1,
        network_bytes_per_s=_GLOO_BYTES_PER_S,
        host_link_bytes_per_s=bandwidth,
        host_memory_bytes_per_s=bandwidth,
        collective_s=_GLOO_COLLECTIVE_S,
        launch_s=_CPU_OPERATOR_S,
        is_cpu=True,
    )


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gemm_flops(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    return 2 * _SIZE**3 / _best_s(lambda: torch.mm(a, b))


def _copy_bytes_per_s() -> float:
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
    return 2 * _COPIED_BYTES / _best_s(lambda: target.copy_(source))


def _best_s(work: Callable[[], object]) -> float:
    work()
    best_s, deadline_s = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < deadline_s or best_s == float("inf"):
        started_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s
