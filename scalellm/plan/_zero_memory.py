"""What DeepSpeed's engine holds, added up: it cannot run dry.

Read of DeepSpeed 0.19.8 (runtime/zero: stage_1_and_2.py, stage3.py and
partitioned_param_coordinator.py) with the settings of `strategies/_deepspeed_config.py`, a user's
own JSON among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch

from scalellm import strategies
from scalellm.config import Config
from scalellm.dist import World
from scalellm.model import count_parameters
from scalellm.plan._record import Passes, Trace
from scalellm.plan.activations import trace_of
from scalellm.plan.dry_run import summarize
from scalellm.plan.live import KINDS
from scalellm.plan.types import Memory
from scalellm.strategies._deepspeed_config import DeepSpeedOptions

_FP32_BYTES = 4
_STAGE_0_BUCKET = 500_000_000  # elements of the engine's own all-reduce
_REUSE, _LIVE = 1_000_000_000, 1_000_000_000  # stage3_max_{reuse_distance,live_parameters}


@dataclass(frozen=True)
class _Engine:
    """Sizes of one engine: elements, and bytes of an element the model computes with."""

    stage: int
    ranks: int
    parameters: int
    largest: int  # the embedding, and the output projection where it is not the same
    is_tied: bool
    working_bytes: int
    accumulates: bool
    zero: dict[str, Any]

    @property
    def share(self) -> int:
        return -(-self.parameters // self.ranks)

    @property
    def bucket(self) -> int:
        return min(int(self.zero["reduce_bucket_size"]), self.parameters)

    def held(self) -> Counter[str]:
        """Bytes between the steps; gradients are there from the first backward on."""
        share, working = self.share, self.working_bytes
        masters = 0 if self.stage == 0 or (self.stage == 3 and working == _FP32_BYTES) else 1
        sizes: Counter[str] = Counter()
        sizes["parameters"] = (share if self.stage == 3 else self.parameters) * working
        divided = share if self.stage else self.parameters
        sizes["optimizer"] = divided * _FP32_BYTES * (2 + masters)
        if self.stage == 2:  # the sum so far, and this micro-batch's
            sizes["gradients"] = share * working * (2 if self.accumulates else 1)
        elif self.stage == 3:
            sizes["gradients"] = share * working
        return sizes

    def passing_bytes(self) -> int:
        """Buffers during forward and backward: buckets, and gathered parameters of stage 3."""
        if self.stage < 2:
            return 0
        # A bucket is copied once more to be reduced. A gradient larger than a bucket is copied
        # alone, and only that of an output projection is there before activations are freed.
        alone = 0 if self.is_tied or self.largest <= self.bucket else self.largest
        elements = self.bucket + max(self.bucket, alone)
        if self.stage == 3:
            elements += self._gathered()
        return elements * self.working_bytes

    def _gathered(self) -> int:
        """What is gathered when the loss is there.

        A parameter is not given up after its forward if its backward is nearer than the reuse
        distance: the last half of that distance stays.
        """
        reuse = int(self.zero.get("stage3_max_reuse_distance", _REUSE))
        live = int(self.zero.get("stage3_max_live_parameters", _LIVE))
        prefetched = int(self.zero.get("stage3_prefetch_bucket_size", 0))
        needed = 2 * self.largest + prefetched
        return min(self.parameters, max(needed, min(live, reuse // 2 + prefetched)))

    def updating_bytes(self) -> int:
        """What the update has beyond what is held: gradients again, flat and in fp32."""
        if self.stage == 0:
            return min(self.parameters, _STAGE_0_BUCKET) * _FP32_BYTES
        return self.share * _FP32_BYTES


def zero_memory(config: Config, world_size: int, device_type: str) -> Memory:
    """Returns the estimate of `deepspeed`, and of `accelerate` with that backend."""
    engine, away, micro_batch = _engine(config, world_size)
    is_half = engine.working_bytes < _FP32_BYTES
    passes = Passes(
        micro_batch,
        times=2 if engine.accumulates else 1,
        keeps_gradients=engine.stage < 2,
        dtype=torch.bfloat16 if is_half else None,
    )
    trace = trace_of(config, passes, device_type)
    passing = _at_peak(trace)
    passing["buffers"] += engine.passing_bytes()
    updating: Counter[str] = Counter(temporary=engine.updating_bytes())
    if engine.stage < 2:  # whole gradients, kept by autograd
        updating["gradients"] = engine.parameters * engine.working_bytes
    host = away if device_type != "cpu" else frozenset()
    if "optimizer" in host:
        updating = Counter()  # the host updates: what that takes more is in its memory
    moments = [engine.held() + moment for moment in (passing, updating)]
    most = max(moments, key=lambda sizes: sum(sizes[kind] for kind in KINDS if kind not in host))
    sizes = {f"{kind}_bytes": 0 if kind in host else most[kind] for kind in KINDS}
    return Memory(**sizes, host_bytes=sum(most[kind] for kind in host))


def _at_peak(trace: Trace) -> Counter[str]:
    memory, _ = summarize(trace)
    return Counter(
        gradients=memory.gradients_bytes,
        activations=memory.activations_bytes,
        temporary=memory.temporary_bytes,
    )


def _engine(config: Config, world_size: int) -> tuple[_Engine, frozenset[str], int]:
    strategy_class = strategies.resolve(config.strategy.name)
    world = World(world_size=world_size, launcher="the planner")
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    plan = config.batches(world_size)
    sharding = strategy_class.sharding(options, world, config.train)
    backend = strategy_class.backend_config(options, config.train, plan, world) or {}
    model = config.model
    engine = _Engine(
        stage=cast(DeepSpeedOptions, options).stage,
        ranks=world_size,
        parameters=count_parameters(model),
        largest=(model.vocab_size or 0) * model.hidden_size,
        is_tied=model.tie_embeddings,
        working_bytes=sharding.working_bytes or _FP32_BYTES,
        accumulates=plan.grad_accumulation > 1,
        zero=backend["zero_optimization"],
    )
    return engine, sharding.offloaded, plan.micro_batch_size
