"""What rank 0 of `parallel` sends in an optimizer step, by formula; see `traffic`.

Its part of the model is cut without memory by the strategy's own functions. Under autocast matrices
give half precision, while what reads the residual stream and the gradients towards it stay wide, as
the weights that the model meets.

Shapes: B rows of a micro-batch, T tokens of a row, t of them on this rank between blocks, C
features of the residual stream, V words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from scalellm.config import BatchPlan, Config
from scalellm.model import Decoder
from scalellm.plan._transfers import Phase, Shape, Shards, Transfer, Widths, sharded
from scalellm.plan.types import CollectiveKind
from scalellm.strategies._mesh import ParallelOptions, sizes
from scalellm.strategies._pipeline_cut import cut, split_layers
from scalellm.strategies._pipeline_schedule import owner_of, stages_of, stages_per_rank
from scalellm.strategies._sums import buckets
from scalellm.strategies._tensor import Cut, TensorGroup, divide, has_partial_gradient
from scalellm.strategies._transforms import canonical_fqn

_HALF = ("bf16", "fp16")
_MESSAGES: tuple[CollectiveKind, ...] = ("send", "receive")


def mesh_traffic(
    config: Config, options: ParallelOptions, batches: BatchPlan, world_size: int
) -> list[Transfer]:
    """Returns the transfers of rank 0, which holds the first stage."""
    mesh = _Mesh(config, options, batches, sizes(options.mesh, world_size))
    return [*_tensor(mesh), *_context(mesh), *_pipeline(mesh, world_size), *_data(mesh)]


@dataclass(frozen=True)
class _Mesh:
    config: Config
    options: ParallelOptions
    batches: BatchPlan
    size: dict[str, int]

    @property
    def micro_batches(self) -> int:
        return self.batches.grad_accumulation

    @property
    def widths(self) -> Widths:
        options = self.options
        return Widths.of(self.config.train.precision, options.param_dtype, options.reduce_dtype)

    @property
    def wide_bytes(self) -> int:
        return self.widths.stored_bytes

    @property
    def product_bytes(self) -> int:
        """Of a number that a matrix product gives."""
        return 2 if self.config.train.precision in _HALF else self.gathered_bytes

    @property
    def gathered_bytes(self) -> int:
        """Of a parameter's number where the model meets it, and of the residual stream's."""
        return self.widths.gathered_bytes

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that this rank's context group leaves it."""
        return self.batches.micro_batch_size * self.config.model.seq_len // self.size["cp"]

    @property
    def computes_again(self) -> bool:
        return self.config.train.activation_checkpointing != "none"

    @cached_property
    def stages(self) -> list[range]:
        """The layers of all stages."""
        schedule, per_rank = self.options.schedule, self.options.stages_per_rank or 2
        count = self.size["pp"] * stages_per_rank(schedule, per_rank)
        return split_layers(self.config.model, count)

    @cached_property
    def mine(self) -> list[int]:
        """The stages of rank 0."""
        if self.size["pp"] == 1:
            return [0]
        per_rank = len(self.stages) // self.size["pp"]
        return stages_of(self.options.schedule, 0, self.size["pp"], per_rank)

    @property
    def layers(self) -> int:
        return sum(len(self.stages[stage]) for stage in self.mine)

    @property
    def holds_last(self) -> bool:
        return len(self.stages) - 1 in self.mine

    @cached_property
    def parts(self) -> list[Decoder]:
        return [self._part(stage)[0] for stage in self.mine]

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        return {name: cut for stage in self.mine for name, cut in self._part(stage)[1].items()}

    @property
    def ranks(self) -> TensorGroup:
        return TensorGroup(cast(Any, None), 0, self.size["tp"], self.options.sequence_parallel)

    def _part(self, stage: int) -> tuple[Decoder, dict[str, Cut]]:
        with torch.device("meta"):
            decoder = Decoder(self.config.model)
        if self.config.train.precision == "fp64":
            decoder = decoder.to(torch.float64)
        last = len(self.stages) - 1
        if last:
            cut(decoder, self.stages[stage], is_first=stage == 0, is_last=stage == last)
        return decoder, divide(decoder, self.ranks) if self.size["tp"] > 1 else {}

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds before FSDP divides it; a tied embedding's two ends are one."""
        seen: set[str] = set()
        for part in self.parts:
            for name, parameter in part.named_parameters():
                name = canonical_fqn(name)
                if name not in seen:
                    yield name, parameter
                seen.add(name)


# -- tensor parallelism -------------------------------------------------------------------------


def _tensor(mesh: _Mesh) -> list[Transfer]:
    tp, model = mesh.size["tp"], mesh.config.model
    if tp == 1:
        return []
    numbers = mesh.tokens * model.hidden_size
    wide, half = numbers * mesh.gathered_bytes, numbers * mesh.product_bytes
    # The last sum of a block need not be computed again, unless something after it is kept.
    ends_with_sum = model.norm_position == "pre" and not model.dropout
    again = (1 if ends_with_sum else 2) if mesh.computes_again else 0
    sends = _Sends(mesh, tp, 1)
    layers = mesh.layers
    sends.add("all_reduce", "forward", 1, wide)  # the embedding
    if mesh.options.sequence_parallel:
        sends.add("all_gather", "backward", 1, wide)  # the embedding's tokens
        for phase, times in (("forward", 1), ("backward", int(mesh.computes_again))):
            sends.add("all_gather", cast(Phase, phase), 2 * layers * times, wide)
        sends.add("reduce_scatter", "forward", 2 * layers, half)
        sends.add("reduce_scatter", "backward", again * layers, half)
        sends.add("all_gather", "backward", 2 * layers, half)
        sends.add("reduce_scatter", "backward", 2 * layers, wide)
    else:
        sends.add("all_reduce", "forward", 2 * layers, half)
        sends.add("all_reduce", "backward", again * layers, half)
        sends.add("all_reduce", "backward", 2 * layers, wide)
    if mesh.holds_last:
        if mesh.options.sequence_parallel:
            sends.add("all_gather", "forward", 1, wide)
            sends.add("reduce_scatter", "backward", 1, wide)
        else:
            sends.add("all_reduce", "backward", 1, wide)
        for numbers_of_a_token in (1, 2):  # the highest logit; the sum, and the target's own
            payload = mesh.tokens * numbers_of_a_token * mesh.wide_bytes
            sends.add("all_reduce", "forward", 1, payload)
    return sends.found


class _Sends:
    """Transfers that happen in every micro-batch and wait for what they bring."""

    def __init__(self, mesh: _Mesh, ranks: int, stride: int) -> None:
        self.times, self.ranks, self.stride = mesh.micro_batches, ranks, stride
        self.found: list[Transfer] = []

    def add(self, kind: CollectiveKind, phase: Phase, count: int, payload_bytes: int) -> None:
        """`count` a micro-batch, of `payload_bytes` each."""
        if not count:
            return
        count *= self.times
        self.found.append(
            Transfer(
                kind,
                phase,
                count=count,
                payload_bytes=count * payload_bytes,
                ranks=self.ranks,
                stride=self.stride,
                micro_batches=self.times,
            )
        )


# -- context parallelism ------------------------------------------------------------------------


def _context(mesh: _Mesh) -> list[Transfer]:
    cp, tp, model = mesh.size["cp"], mesh.size["tp"], mesh.config.model
    if cp == 1:
        return []
    sends, layers = _Sends(mesh, cp, tp), mesh.layers
    head_bytes = mesh.tokens * model.head_size * mesh.product_bytes
    again = layers if mesh.computes_again else 0
    if mesh.options.context == "gather":
        payload = 2 * (model.kv_heads // tp) * head_bytes * cp
        sends.add("all_gather", "forward", layers, payload)
        sends.add("all_gather", "backward", again, payload)
        sends.add("reduce_scatter", "backward", layers, payload)
        return sends.found
    for heads in (model.num_heads + 2 * model.kv_heads, model.num_heads):
        payload = heads // tp * head_bytes
        sends.add("all_to_all", "forward", layers, payload)
        sends.add("all_to_all", "backward", layers + again, payload)
    return sends.found


# -- pipeline -----------------------------------------------------------------------------------


def _pipeline(mesh: _Mesh, world_size: int) -> list[Transfer]:
    pp, schedule = mesh.size["pp"], mesh.options.schedule
    if pp == 1:
        return []
    model, last = mesh.config.model, len(mesh.stages) - 1
    divided = mesh.size["tp"] if mesh.options.sequence_parallel else 1
    payload = mesh.tokens // divided * model.hidden_size * mesh.gathered_bytes
    stride = world_size // pp
    sends = _Sends(mesh, 2, stride)
    for stage in mesh.mine:
        for neighbour in (stage - 1, stage + 1):
            if not 0 <= neighbour <= last or owner_of(schedule, neighbour, pp) == 0:
                continue
            here, there = ("forward", "backward") if neighbour > stage else ("backward", "forward")
            sends.add("send", cast(Phase, here), 1, payload)
            sends.add("receive", cast(Phase, there), 1, payload)
    if model.tie_embeddings and owner_of(schedule, last, pp) != 0:
        rows = -(-(model.vocab_size or 0) // mesh.size["tp"])
        shards = _shard_ranks(mesh)
        tied = -(-rows // shards) * model.hidden_size * mesh.wide_bytes
        ends = (pp - 1) * stride
        sends.found += [Transfer(kind, "step", 1, tied, 2, ends) for kind in _MESSAGES]
    return sends.found


# -- shards and replicas ------------------------------------------------------------------------


def _shard_ranks(mesh: _Mesh) -> int:
    return mesh.size["fsdp"] * mesh.size["cp"] if mesh.size["fsdp"] > 1 else 1


def _data(mesh: _Mesh) -> list[Transfer]:
    """Sums and shards of gradients, once a step, and FSDP's gathers."""
    tp, dp, cp, fsdp = (mesh.size[name] for name in ("tp", "dp", "cp", "fsdp"))
    found, shards = [], _shard_ranks(mesh)
    if tp > 1:
        partial = [
            parameter
            for name, parameter in mesh.parameters()
            if has_partial_gradient(name, mesh.cuts, mesh.ranks)
        ]
        found += _summed(mesh, partial, tp, 1, shards)
    if fsdp > 1:
        is_pipeline = mesh.size["pp"] > 1
        times = 1 if is_pipeline else mesh.micro_batches
        how = Shards(
            shards,
            gathers=times,
            reductions=mesh.micro_batches if not is_pipeline else 1,
            gathered_bytes=mesh.gathered_bytes,
            reduced_bytes=mesh.widths.reduced_bytes,
            reshards=not is_pipeline,
            stride=tp,
            replicas=dp,
        )
        for part in mesh.parts:
            found += sharded(_units(part), how)
    elif dp * cp > 1:
        everything = [parameter for _, parameter in mesh.parameters()]
        found += _summed(mesh, everything, dp * cp, tp, 1)
    return found


def _summed(
    mesh: _Mesh, gradients: list[Tensor], ranks: int, stride: int, shards: int
) -> list[Transfer]:
    local = [
        gradient.new_empty(-(-gradient.shape[0] // shards), *gradient.shape[1:])
        for gradient in gradients
    ]
    count = len(list(buckets(local, mesh.options.bucket_mb << 20)))
    size = sum(gradient.nbytes for gradient in local)
    return [Transfer("all_reduce", "backward", count, size, ranks, stride)] if count else []


def _units(part: nn.Module) -> list[list[Shape]]:
    blocks = [list(block.parameters()) for block in part.get_submodule("layers").children()]
    inside = {id(parameter) for block in blocks for parameter in block}
    root = [parameter for parameter in part.parameters() if id(parameter) not in inside]
    return [[tuple(parameter.shape) for parameter in unit] for unit in [*blocks, root]]
