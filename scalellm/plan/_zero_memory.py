"""What DeepSpeed's engine holds on a GPU, added up; for a CPU it runs dry itself (`_zero_steps`).

Read of DeepSpeed 0.19.8 (runtime/zero: stage_1_and_2.py, stage3.py and
partitioned_param_coordinator.py) with the settings of `strategies/_deepspeed_config.py`, a user's
own JSON among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch

from scalellm.config import Config
from scalellm.model import count_parameters
from scalellm.plan._ranks import ranks_of
from scalellm.plan._record import Passes, Trace
from scalellm.plan._steps import LAST
from scalellm.plan.activations import trace_of
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
    block: int
    largest: int  # the embedding, and the output projection where it is not the same
    is_tied: bool
    working_bytes: int
    accumulates: bool
    is_away: bool  # optimizer and gradients are on the host
    zero: dict[str, Any]

    @property
    def share(self) -> int:
        return -(-self.parameters // self.ranks)

    @property
    def bucket(self) -> int:
        return min(int(self.zero["reduce_bucket_size"]), self.parameters)

    @property
    def share_bytes(self) -> int:
        """Of gradients, in the type that the model computes with."""
        return self.share * self.working_bytes

    def held(self) -> Counter[str]:
        """Bytes between the steps."""
        share, working = self.share, self.working_bytes
        masters = 0 if self.stage == 0 or (self.stage == 3 and working == _FP32_BYTES) else 1
        sizes: Counter[str] = Counter()
        sizes["parameters"] = (share if self.stage == 3 else self.parameters) * working
        divided = share if self.stage else self.parameters
        sizes["optimizer"] = divided * _FP32_BYTES * (2 + masters)
        if self.stage == 3 or (self.stage == 2 and self.is_away):
            sizes["gradients"] = self.share_bytes
        return sizes

    def passing(self, label: str, ready: int) -> Counter[str]:
        """Beside the passes themselves, in a segment of that label.

        `ready`: gradients (elements) that blocks have given in this backward; what they are reduced
        into is made with the first full bucket.
        """
        sizes: Counter[str] = Counter()
        is_forward = "backward" not in label and "loss" not in label
        is_reducing = ready > self.bucket
        if self.stage < 2:
            return sizes
        if self.stage == 2:  # the sum so far, and this micro-batch's
            is_again = self.accumulates and label.startswith(LAST)
            times = int(is_again) + int(is_reducing and not self.is_away)
            sizes["gradients"] = times * self.share_bytes
        # A gradient larger than a bucket is copied alone, and only that of an output projection is
        # there before activations are freed. A bucket is copied once more to be reduced.
        alone = 0 if self.is_tied or self.largest <= self.bucket else self.largest
        elements = 0 if self.stage == 2 and is_forward else self.bucket + alone
        if is_reducing:
            elements += max(0, self.bucket - alone)
        if self.stage == 3:
            elements += self._gathered()
        sizes["buffers"] = elements * self.working_bytes
        return sizes

    def reducing(self) -> Counter[str]:
        """After the backward of stage 1: whole gradients, and this rank's share is copied."""
        gradients_bytes = self.parameters * self.working_bytes + self.share_bytes
        return Counter(gradients=gradients_bytes, buffers=self.bucket * self.working_bytes)

    def updating(self) -> Counter[str]:
        """What the update has beyond what is held: gradients, and again flat and in fp32."""
        sizes: Counter[str] = Counter()
        if self.stage == 0:
            sizes["temporary"] = min(self.parameters, _STAGE_0_BUCKET) * _FP32_BYTES
            sizes["gradients"] = self.parameters * self.working_bytes
            return sizes
        sizes["temporary"] = self.share * _FP32_BYTES
        if self.working_bytes != _FP32_BYTES:  # flat first, and then in fp32
            sizes["temporary"] += self.share_bytes
        if self.stage < 3 and not self.is_away:
            sizes["gradients"] = self.share_bytes
        return sizes

    def _gathered(self) -> int:
        """What is gathered when the loss is there.

        A parameter is not given up after its forward if its backward is nearer than the reuse
        distance: the last half of that distance stays. And each module, those without parameters
        too, begins to gather what comes next and marks it as needed, so the coordinator is ahead
        by as much as may be live.
        """
        reuse = int(self.zero.get("stage3_max_reuse_distance", _REUSE))
        live = int(self.zero.get("stage3_max_live_parameters", _LIVE))
        prefetched = int(self.zero.get("stage3_prefetch_bucket_size", 0))
        ahead = live if prefetched else 0
        return min(self.parameters, max(2 * self.largest + prefetched, reuse // 2, ahead))


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
    moments = _moments(engine, trace)
    host = away if device_type != "cpu" else frozenset()
    if "optimizer" not in host:  # else the host updates: what that takes more is in its memory
        moments.append(engine.updating())
        moments += [engine.reducing()] if engine.stage == 1 else []
    moments = [engine.held() + moment for moment in moments]
    most = max(moments, key=lambda sizes: sum(sizes[kind] for kind in KINDS if kind not in host))
    sizes = {f"{kind}_bytes": 0 if kind in host else most[kind] for kind in KINDS}
    return Memory(**sizes, host_bytes=sum(most[kind] for kind in host))


def _moments(engine: _Engine, trace: Trace) -> list[Counter[str]]:
    """The worst moment of each segment of the passes, with what the engine has then."""
    level: Counter[str] = Counter()
    found = []
    ready = 0
    for segment in trace.segments:
        ready = ready + engine.block if "backward" in segment.label else 0
        moment = Counter(level)
        moment.update(segment.peak)
        moment.update(engine.passing(segment.label, ready))
        found.append(moment)
        level.update(segment.change)
    return found


def _engine(config: Config, world_size: int) -> tuple[_Engine, frozenset[str], int]:
    here = ranks_of(config, world_size)
    strategy_class, options, world, plan = here.strategy, here.options, here.world, here.batches
    sharding = strategy_class.sharding(options, world, config.train)
    backend = strategy_class.backend_config(options, config.train, plan, world) or {}
    model = config.model
    parameters, largest = count_parameters(model), (model.vocab_size or 0) * model.hidden_size
    engine = _Engine(
        stage=cast(DeepSpeedOptions, options).stage,
        ranks=world_size,
        parameters=parameters,
        block=(parameters - (1 if model.tie_embeddings else 2) * largest) // model.num_layers,
        largest=largest,
        is_tied=model.tie_embeddings,
        working_bytes=sharding.working_bytes or _FP32_BYTES,
        accumulates=plan.grad_accumulation > 1,
        is_away="gradients" in sharding.offloaded,
        zero=backend["zero_optimization"],
    )
    return engine, sharding.offloaded, plan.micro_batch_size
