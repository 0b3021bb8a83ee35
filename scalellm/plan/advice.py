"""What a run that ran out of memory is told: where its memory went, and three ways out."""

from __future__ import annotations

import logging
import resource
from functools import partial

import torch
import yaml

from scalellm.config import Config
from scalellm.dist import World
from scalellm.plan.candidates import Candidate
from scalellm.plan.choose import Chooser
from scalellm.plan.devices import Device, Rates, machine_bytes
from scalellm.plan.forecast import beside_bytes, on_gpu
from scalellm.plan.memory import estimate
from scalellm.train import dump_config
from scalellm.train.datasets import open_mixture, with_vocabulary

_log = logging.getLogger(__name__)
_GIB = 1 << 30
_KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary")


def advice(config: Config, world_size: int, device_type: str, limit_bytes: int) -> str:
    """Returns the predicted breakdown of a rank, and changes with the peaks they would have.

    Args:
        config: with its vocabulary, as it was trained.
        limit_bytes: of memory that a rank could have had.

    Raises:
        UserError: the planner does not know the strategy, or this process is still a rank.
    """
    device = _some_device(limit_bytes, device_type)
    estimator = partial(estimate, device_type=device_type)
    chooser = Chooser(yaml.safe_load(dump_config(config)), device, estimator)
    given, ways = chooser.ways_out(world_size)
    if given.memory is None:
        return ""
    kinds = {kind: getattr(given.memory, f"{kind}_bytes") for kind in _KINDS}
    kinds["process and heap"] = beside_bytes(config, world_size, given.memory, device_type)
    parts = ", ".join(f"{kind} {_gib(size)}" for kind, size in kinds.items() if size)
    lines = [f"predicted peak of a rank: {_gib(_peak_bytes(given, device_type))} GiB ({parts})"]
    lines += [f"  {way.label}: {_gib(_peak_bytes(way, device_type))} GiB" for way in ways]
    if ways:
        lines.insert(1, "what helps, one by one, and the peak it would have:")
    return "\n".join(lines)


def _peak_bytes(candidate: Candidate, device_type: str) -> int:
    assert candidate.config is not None and candidate.memory is not None
    memory, world_size = candidate.memory, candidate.world_size
    return memory.peak_bytes + beside_bytes(candidate.config, world_size, memory, device_type)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / _GIB:.2f}"


def explain(config: Config, world: World) -> str:
    """Returns the advice for a run that has failed in this process; "" if there is none.

    Call it when the run's tensors and its process group are gone.
    """
    try:
        config = with_vocabulary(config, open_mixture(config))
        device_type = "cuda" if on_gpu(config) else "cpu"
        return advice(config, world.world_size, device_type, _limit_bytes(world, device_type))
    except Exception as error:  # a second failure must not hide the first
        _log.debug("no advice: %s", error)
        return ""


def _limit_bytes(world: World, device_type: str) -> int:
    """Memory of a GPU; or of this machine, or what a process may have, for each of its ranks."""
    if device_type == "cuda":
        return int(torch.cuda.get_device_properties(world.local_rank).total_memory)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    whole_bytes = machine_bytes() // world.local_world_size
    return whole_bytes if limit == resource.RLIM_INFINITY else min(limit, whole_bytes)


def _some_device(limit_bytes: int, device_type: str) -> Device:
    """One with that memory; how fast it is does not matter here."""
    return Device(
        name="here",
        memory_bytes=limit_bytes,
        rates=Rates(fp64=1e12, fp32=1e12, bf16=1e12, fp16=1e12),
        memory_bytes_per_s=1e12,
        node_link_bytes_per_s=1e11,
        devices_per_node=8,
        network_bytes_per_s=1e10,
        host_link_bytes_per_s=1e10,
        host_memory_bytes_per_s=1e10,
        is_cpu=device_type == "cpu",
    )
