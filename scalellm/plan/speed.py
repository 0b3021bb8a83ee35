"""How long a step takes: rooflines of products, memory and links, and what hides behind what.

    step = max(matrix products + bytes moved, operators launched) + communication not hidden
           + optimizer + a pipeline's bubble

(on a CPU products, bytes and launches add up). Each is work over a data sheet's rate times a share
of it that is reached (`Efficiency`): a round number, or fitted to runs (`calibrate`). Not known
here: a slow rank, a busy network, the data's loading, checkpoints, evaluation, and what
communication takes from the products beside it.

Sources: Williams et al. 2009, "Roofline"; Thakur et al. 2005, "Optimization of Collective
Communication Operations in MPICH" (ring costs); Zhao et al. 2023, "PyTorch FSDP" (overlap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from scalellm.config import Config
from scalellm.model import count_parameters, flops_per_token
from scalellm.plan._mesh_share import share_of
from scalellm.plan._transfers import Transfer
from scalellm.plan.devices import Device, Efficiency
from scalellm.plan.operators import Work, measure_work
from scalellm.plan.traffic import Setup, set_up, traffic, unit_shapes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; the parts add up to `total_s`.

    `launch_s` is what launching operators takes, on a GPU longer than running them.
    `bubble_s` is what a pipeline's ranks wait for each other.
    `communication_s`, all of it, hidden or not, is beside the sum. `tokens` are those of the global
    batch, `model_flops` what they need of one device, with nothing computed twice.
    """

    compute_s: float
    memory_s: float
    launch_s: float
    exposed_communication_s: float
    optimizer_s: float
    communication_s: float
    tokens: int
    model_flops: float
    peak_flops: float
    bubble_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.compute_s
            + self.memory_s
            + self.launch_s
            + self.exposed_communication_s
            + self.optimizer_s
            + self.bubble_s
        )

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of the data sheet's peak (PaLM, Chowdhery et al. 2022)."""
        return self.model_flops / self.total_s / self.peak_flops

    def days(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_s / 86_400

    def cost(self, num_tokens: float, world_size: int, price_per_hour: float) -> float:
        """In the currency of the price of one device."""
        return self.days(num_tokens) * 24 * world_size * price_per_hour


def step_time(
    config: Config,
    world_size: int,
    device: Device,
    efficiency: Efficiency | None = None,
    work: Work | None = None,
) -> StepTime:
    """Returns the time of one optimizer step.

    Args:
        efficiency: None: the device's own.
        work: what `measure_work` says of one micro-batch; None: measured here.

    Raises:
        ConfigError: as training would, or the device lacks `train.precision`.
    """
    return timing(config, world_size, device, work)(efficiency or device.efficiency)


def timing(
    config: Config, world_size: int, device: Device, work: Work | None = None
) -> Callable[[Efficiency], StepTime]:
    """Returns the time of a step by the efficiencies; all else is found once, here."""
    setup = set_up(config, world_size)
    model, rows = on_device(config, device).model, setup.batches.micro_batch_size
    kind = "cpu" if device.is_cpu else "cuda"
    half = setup.computes_in_half
    work = work or measure_work(model, config.train, rows, half=half, device_type=kind)
    return partial(_time, config, world_size, device, setup, work, traffic(config, world_size))


def _time(
    config: Config,
    world_size: int,
    device: Device,
    setup: Setup,
    work: Work,
    transfers: list[Transfer],
    share: Efficiency,
) -> StepTime:
    micro_batches, rows = setup.batches.grad_accumulation, setup.batches.micro_batch_size
    rate = device.matrix_rate(config.train.precision) * share.matrix
    bandwidth = device.memory_bytes_per_s * share.memory
    left = share.fused if config.train.compile else 1.0
    mine = share_of(config, setup, world_size)
    forward_flops, backward_flops = (
        flops * mine.products for flops in _flops(config, rows * config.model.seq_len)
    )
    compute_s = micro_batches * (forward_flops + backward_flops) / rate
    forward_bytes, backward_bytes = (
        left * mine.memory * moved for moved in (work.forward_bytes, work.backward_bytes)
    )
    memory_s = micro_batches * (forward_bytes + backward_bytes) / bandwidth
    operators = left * mine.operators * work.num_operators
    launched_s = micro_batches * operators * device.launch_s / share.launch
    times = [transfer_s(one, setup, device, share) for one in transfers]
    windows = {
        "forward": forward_flops / rate + forward_bytes / bandwidth,
        "backward": backward_flops / rate + backward_bytes / bandwidth,
    }
    units = config.model.num_layers * mine.operators + 1
    exposed_s = sum(
        _exposed_s(transfers, times, phase, window_s * (1 - 1 / units), micro_batches)
        for phase, window_s in [*windows.items(), ("step", 0.0)]
    )
    tokens = config.train.global_batch_size * config.model.seq_len
    # A GPU is told what to do while it works; a CPU tells itself, before each operator.
    hidden_s = 0.0 if device.is_cpu else compute_s + memory_s
    late_s = max(0.0, launched_s - hidden_s)
    # What each micro-batch waits for counts as its stage's time.
    waits_s = sum(
        time_s
        for one, time_s in zip(transfers, times, strict=True)
        if one.micro_batches == micro_batches and one.kind not in ("send", "receive")
    )
    busy_s = compute_s + memory_s + late_s + waits_s
    return StepTime(
        compute_s,
        memory_s,
        late_s,
        exposed_s,
        _optimizer_s(config, setup, device, share),
        sum(times),
        tokens,
        tokens / world_size * flops_per_token(config.model),
        device.matrix_rate(config.train.precision),
        busy_s * mine.bubble / (1 - mine.bubble),
    )


def on_device(config: Config, device: Device) -> Config:
    """The config with the attention kernel that the device would take."""
    if device.is_cpu or config.model.attention != "auto":
        return config
    model = config.model.model_copy(update={"attention": "sdpa"})
    return config.model_copy(update={"model": model})


def _flops(config: Config, num_tokens: int) -> tuple[float, float]:
    """FLOP of one micro-batch's forward and backward, with what is computed twice."""
    forward = num_tokens * flops_per_token(config.model) / 3
    backward = 2 * forward
    if config.train.activation_checkpointing == "alternate":
        # A block's matrices in the order of their use: every second product is computed again.
        matrices = [math.prod(s) for s in unit_shapes(config.model)[0] if len(s) == 2]
        backward += 2 * num_tokens * config.model.num_layers * sum(matrices[1::2])
    if config.train.activation_checkpointing == "full":
        # Only blocks are computed again, not the output projection.
        head = 2 * num_tokens * (config.model.vocab_size or 0) * config.model.hidden_size
        backward += forward - head
    return forward, backward


# -- communication ------------------------------------------------------------------------------


def transfer_s(transfer: Transfer, setup: Setup, device: Device, share: Efficiency) -> float:
    """Seconds of all collectives of a transfer, one after the other, and of the host's link."""
    return _ring_s(transfer, device, share) + _host_s(transfer, setup, device, share)


def _ring_s(transfer: Transfer, device: Device, share: Efficiency) -> float:
    """Each rank sends (N-1)/N of the whole tensor, for an all-reduce twice; a message is whole.

    A group that spans nodes is as fast as the slower of the two links. The groups of a node share
    what it sends: a group with all its devices has all of it, one with a device its share.
    """
    ranks = transfer.ranks
    if ranks == 1:
        return 0.0
    in_node = min(ranks, max(1, device.devices_per_node // transfer.stride))
    nodes = math.ceil(ranks / in_node)
    links = [device.node_link_bytes_per_s] if in_node > 1 else []
    links += [device.network_bytes_per_s * in_node] if nodes > 1 else []
    rounds = 2 if transfer.kind == "all_reduce" else 1
    is_message = transfer.kind in ("send", "receive")
    hops_s = (in_node - 1) * nodes * device.node_hop_s + (nodes - 1) * device.network_hop_s
    if transfer.kind == "all_reduce":  # NCCL crosses nodes by trees
        hops_s = (in_node - 1) * device.node_hop_s + math.log2(nodes) * device.network_hop_s
    sent_bytes = rounds * transfer.payload_bytes * (1.0 if is_message else (ranks - 1) / ranks)
    latency_s = device.collective_s + rounds * hops_s
    return sent_bytes / (min(links) * share.link) + transfer.count * latency_s


def _host_s(transfer: Transfer, setup: Setup, device: Device, share: Efficiency) -> float:
    """Offloaded shards come from the host before a gather and go there after a reduction."""
    kind = "parameters" if transfer.kind == "all_gather" else "gradients"
    if device.is_cpu or kind not in setup.sharding.offloaded:
        return 0.0
    # What `stride` ranks have reduced is a shard already: only once it goes to the host.
    shard_bytes = transfer.payload_bytes / transfer.ranks if transfer.stride == 1 else 0.0
    return shard_bytes / (device.host_link_bytes_per_s * share.host)


def _exposed_s(
    transfers: Sequence[Transfer],
    times: Sequence[float],
    phase: str,
    window_s: float,
    micro_batches: int,
) -> float:
    """What of a phase's communication is longer than what hides it, `window_s` a micro-batch."""
    here = [
        (one, time_s) for one, time_s in zip(transfers, times, strict=True) if one.phase == phase
    ]
    open_s = sum(time_s for one, time_s in here if not one.overlaps)
    always_s = sum(
        time_s / one.micro_batches
        for one, time_s in here
        if one.overlaps and one.micro_batches == micro_batches
    )
    at_last_s = sum(
        time_s for one, time_s in here if one.overlaps and one.micro_batches != micro_batches
    )
    before_s = (micro_batches - 1) * max(0.0, always_s - window_s)
    return open_s + before_s + max(0.0, always_s + at_last_s - window_s)


# -- optimizer ----------------------------------------------------------------------------------


def _optimizer_s(config: Config, setup: Setup, device: Device, share: Efficiency) -> float:
    """AdamW reads four numbers a parameter and writes three, the norm reads one, clipping two."""
    parameters = count_parameters(config.model) / setup.sharding.optimizer
    element_bytes = 8 if config.train.precision == "fp64" else 4
    numbers = 4 + 3 + 1 + (2 if config.train.grad_clip else 0)
    moved_bytes = numbers * element_bytes * parameters
    if device.is_cpu or "optimizer" not in setup.sharding.offloaded:
        return moved_bytes / (device.memory_bytes_per_s * share.memory)
    update_s = moved_bytes / (device.host_memory_bytes_per_s * share.host)
    if "parameters" in setup.sharding.offloaded:
        return update_s
    working_bytes = (setup.sharding.working_bytes or element_bytes) * parameters
    return update_s + working_bytes / (device.host_link_bytes_per_s * share.host)
