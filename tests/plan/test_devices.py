"""Devices: figures that belong together, names, files of one's own, this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalellm.errors import ConfigError
from scalellm.plan.devices import THIS_CPU, find_device, names

OWN = """
memory_bytes: 10000000000
rates: {fp32: 1e12, bf16: 2e12}
memory_bytes_per_s: 1e11
node_link_bytes_per_s: 1e10
devices_per_node: 2
network_bytes_per_s: 1e9
host_link_bytes_per_s: 1e10
host_memory_bytes_per_s: 1e10
"""


def test_every_device_of_the_table_is_sound() -> None:
    known = {"h100-80g", "h200-141g", "a100-40g", "a100-80g", "v100-32g", "v100-16g", "l40s"}
    assert known | {"mi300x", "b200", "rtx-4090", THIS_CPU} == set(names())
    for name in names():
        if name == THIS_CPU:
            continue
        device = find_device(name)
        # Dense rates: a sheet's sparse figure would break these ratios of the same tensor cores.
        if device.rates.tf32 and name not in ("rtx-4090", "b200"):
            assert device.rates.bf16 == pytest.approx(2 * device.rates.tf32, rel=0.02)
        if device.rates.fp8 and device.rates.bf16:
            assert device.rates.fp8 == pytest.approx(2 * device.rates.bf16, rel=0.02)
        assert device.network_bytes_per_s <= device.node_link_bytes_per_s
        assert device.usable_bytes < device.memory_bytes


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100-80g'"):
        find_device("h100")


def test_a_precision_that_a_device_lacks() -> None:
    assert find_device("v100-16g").matrix_rate("fp16") == 125e12
    with pytest.raises(ConfigError, match="v100-16g has no bf16 matrix units; use fp16 or fp32"):
        find_device("v100-16g").matrix_rate("bf16")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    device = find_device(str(path))
    assert (device.name, device.matrix_rate("bf16")) == ("mine", 2e12)
    path.write_text(OWN.replace("devices_per_node", "devices_per_nod"))
    with pytest.raises(ConfigError, match="did you mean 'devices_per_node'"):
        find_device(str(path))
    path.write_text(OWN.replace("memory_bytes: 1", "memory_bytes: -1"))
    with pytest.raises(ConfigError, match="more than 0"):
        find_device(str(path))
    with pytest.raises(ConfigError, match="no config file"):
        find_device(str(tmp_path / "other.yaml"))


def test_this_cpu_is_measured_and_shared() -> None:
    device = find_device(THIS_CPU, 4)
    assert device.is_cpu and device.devices_per_node == 4
    assert 1e8 < device.matrix_rate("fp32") < 1e14
    assert 1e7 < device.memory_bytes_per_s < 1e13
    with pytest.raises(ConfigError, match="no fp16"):
        device.matrix_rate("fp16")
