"""`parallel`: tensor, pipeline and context parallelism beside replicas and shards, on one mesh.

Each kind acts on the decoder from outside and knows nothing of the others (`_tensor.py`,
`_pipeline.py`, `_context.py`; shards are FSDP2's); this file puts them together. Sources: Shoeybi
et al. 2019 and Narayanan et al. 2021, "Megatron-LM"; Liu et al. 2024, "Ring Attention", for
dividing rows; Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3, for all at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as tdist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalellm.batches import Batch
from scalellm.config import BatchPlan, ModelConfig, TrainConfig
from scalellm.dist import World, sum_over_ranks
from scalellm.model import Decoder
from scalellm.strategies._assembly import assemble
from scalellm.strategies._mesh import (
    Mesh,
    ParallelOptions,
    place_of,
    refuse,
    refuse_training,
    sizes,
)
from scalellm.strategies._norm import norm_of
from scalellm.strategies._pipeline import Pipeline, StepTime
from scalellm.strategies._shards import autocast_beside, refuse_precisions, shard_of
from scalellm.strategies._state import StateSource, check_names
from scalellm.strategies._sums import sum_gradients
from scalellm.strategies._tensor import has_partial_gradient
from scalellm.strategies._transforms import canonical_fqn
from scalellm.strategies.base import (
    DataRank,
    MakeOptimizer,
    Options,
    Sharding,
    Strategy,
    is_meta,
    slices,
)


class Parallel(Strategy):
    options_class = ParallelOptions
    needs_process_group = True

    @classmethod
    def check(cls, options: Options, world: World, train: TrainConfig) -> None:
        options = cast(ParallelOptions, options)
        refuse_training(options, sizes(options.mesh, world.world_size), train)
        refuse_precisions(options.param_dtype, options.reduce_dtype, train)

    @classmethod
    def check_model(
        cls,
        options: Options,
        world: World,
        train: TrainConfig,
        model: ModelConfig,
        plan: BatchPlan,
    ) -> None:
        options = cast(ParallelOptions, options)
        refuse(options, sizes(options.mesh, world.world_size), train, model, plan)

    @classmethod
    def data_rank(cls, options: Options, world: World) -> DataRank:
        size = sizes(cast(ParallelOptions, options).mesh, world.world_size)
        place = place_of(world.rank, size)
        counts = not (place["pp"] or place["cp"] or place["tp"])
        rank = place["dp"] * size["fsdp"] + place["fsdp"]
        return DataRank(rank, size["dp"] * size["fsdp"], counts, "dp x fsdp of strategy.mesh")

    @classmethod
    def sharding(cls, options: Options, world: World, train: TrainConfig) -> Sharding:
        size = sizes(cast(ParallelOptions, options).mesh, world.world_size)
        ranks = size["pp"] * size["tp"] * (size["fsdp"] * size["cp"] if size["fsdp"] > 1 else 1)
        return Sharding(ranks, ranks, ranks)

    @property
    def dropout_rank(self) -> int:
        """Each rank of a tp group computes a part of what all of them drop the same features of."""
        return self.world.rank // cast(ParallelOptions, self.options).mesh.tp

    # -- building ---------------------------------------------------------------------------

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        options = cast(ParallelOptions, self.options)
        self.mesh = Mesh.make(options, self.world)
        dtype = torch.float64 if self.train.precision == "fp64" else None
        decoder = cast(Decoder, model).to(dtype=dtype)
        # A model that has its weights already gives them up, one after the other.
        given = None if is_meta(decoder) else {n: p.detach() for n, p in decoder.named_parameters()}
        decoder = decoder.to("meta")
        self._shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
        self._frozen = {n for n, p in decoder.named_parameters() if not p.requires_grad}
        values = given.items() if given is not None else copy.deepcopy(decoder).initial_weights()
        made = assemble(decoder, options, self.mesh, self.train, self.world.device)
        self._made, self._queue = made, list[Batch]()
        several = len(made.parts) > 1
        self.model = self.module = nn.ModuleList(made.parts) if several else made.parts[0]
        self._names = {p: name for name, p in self.named_parameters()}
        self._order = list(self._names)
        self._fill_with(values)
        self.optimizer = make_optimizer(self.named_parameters())

    @torch.no_grad()
    def _fill_with(self, values: Any) -> None:
        mine: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            mine.setdefault(name, []).append(parameter)
        for name, value in values:
            for parameter in mine.get(name, ()):
                local, begin = self.part_of(parameter)[0], self.begin_of(parameter)
                local.copy_(value[slices(begin, local)])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of the whole model; where a rank has two copies of a tied embedding, both."""
        parts = self.module if isinstance(self.module, nn.ModuleList) else [self.module]
        named = ((name, p) for part in parts for name, p in part.named_parameters())
        for parameter, name in {p: name for name, p in named}.items():
            yield canonical_fqn(name), parameter

    # -- one optimizer step -----------------------------------------------------------------

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        options = cast(ParallelOptions, self.options)
        return autocast_beside(options.param_dtype, self.train.precision)

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        self._is_last = is_last
        yield

    def forward(self, batch: Batch) -> Tensor:
        if self._made.context is not None:
            batch = self._made.context.local(batch)
        if self._made.pipeline is None:
            loss_sum = super().forward(batch)
        elif torch.is_grad_enabled():
            self._queue.append(_with_positions(batch))
            return torch.zeros((), dtype=torch.float64, device=self.world.device)
        else:
            loss_sum = self._made.pipeline.evaluate(_with_positions(batch))
        self._share_rows(batch)
        return loss_sum / self.mesh.size["tp"]  # each rank of the group has the whole of it

    def _share_rows(self, batch: Batch) -> None:
        if batch.row_losses is not None and batch.row_losses.losses_B is not None:
            batch.row_losses.losses_B /= self.mesh.size["tp"]

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        self.gradient_scale = float(self.mesh.size["tp"])
        reductions, shards = self._made.reductions, self.mesh.shards
        if reductions is not None and shards is not None and not reductions.are_sums:
            self.gradient_scale *= shards.size()  # FSDP averages; the loss wants a sum
        if self._made.pipeline is None:
            with reductions.beside_backward(self.optimizer) if reductions else nullcontext():
                super().backward(loss_sum, global_tokens)
        elif self._is_last:
            loss_sum.copy_(self._run_pipeline(self._made.pipeline, global_tokens))
        if self._is_last:
            self._finish_gradients()

    def _run_pipeline(self, pipeline: Pipeline, global_tokens: int) -> Tensor:
        """A step's micro-batches go through together; returns the share of their losses."""
        tp = self.mesh.size["tp"]
        queue, self._queue = self._queue, []
        scale = self.gradient_scale / tp * self.loss_scale.value / global_tokens
        losses = pipeline.run(queue, scale)
        for batch in queue:
            self._share_rows(batch)
        return torch.stack(losses).sum() / tp

    @property
    def step_time(self) -> StepTime | None:
        """When this rank computed in its pipeline's last step; None without a pipeline."""
        return None if self._made.pipeline is None else self._made.pipeline.time

    def _finish_gradients(self) -> None:
        """Adds what other ranks have of this rank's gradients."""
        self.fill_missing_gradients()
        if self._made.pipeline is not None:
            self._made.pipeline.sync_tied()
        bucket_bytes = cast(ParallelOptions, self.options).bucket_mb << 20
        if self._made.tensor is not None:
            partial = (
                gradient
                for parameter, gradient in self._all_gradients()
                if has_partial_gradient(self._names[parameter], self._made.cuts, self._made.tensor)
            )
            sum_gradients(partial, self._made.tensor.group, bucket_bytes)
        if self.mesh.sums is not None:
            everything = (gradient for _, gradient in self._all_gradients())
            sum_gradients(everything, self.mesh.sums, bucket_bytes)

    def _all_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What this rank holds of the gradients; frozen parameters have none."""
        for _, parameter in self.named_parameters():
            if parameter.grad is not None:
                yield parameter, self.part_of(parameter.grad)[0]

    def grad_norm(self) -> float:
        """Each rank sums the squares it holds; of replicas only the first counts."""
        mine = [
            gradient for parameter, gradient in self._all_gradients() if self._counts(parameter)
        ]
        local = norm_of(mine) if mine else 0.0
        [squares] = sum_over_ranks([local * local], self.world.device)
        return math.sqrt(squares) if squares >= 0 else math.nan

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first of those that hold the same of a parameter."""
        if parameter in self._made.copies:
            return False
        place, names = self.mesh.place, {"dp"}
        if self.mesh.shards is None:
            names |= {"fsdp", "cp"}
        if self._names[parameter] not in self._made.cuts:
            names |= {"tp"}
        return not any(place[name] for name in names)

    # -- state ------------------------------------------------------------------------------

    def full_gradients(self) -> dict[str, Tensor]:
        """Every rank puts what it counts into zeros, which are summed."""
        self.fill_missing_gradients()
        dtype = torch.float64 if self.train.precision == "fp64" else torch.float32
        whole = {
            name: torch.zeros(shape, dtype=dtype, device=self.world.device)
            for name, shape in self._shapes.items()
            if name not in self._frozen
        }
        for parameter, gradient in self._all_gradients():
            if self._counts(parameter):
                place = slices(self.begin_of(parameter), gradient)
                whole[self._names[parameter]][place] = gradient / self.loss_scale.value
        for tensor in whole.values():
            tdist.all_reduce(tensor)
        return {name: tensor.cpu() for name, tensor in whole.items()}

    def part_of(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return shard_of(tensor) if isinstance(tensor, DTensor) else super().part_of(tensor)

    def begin_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        begin, cut = super().begin_of(parameter), self._made.cuts.get(self._names[parameter])
        if cut is None:
            return begin
        return tuple(at + cut.begin * (dim == cut.dim) for dim, at in enumerate(begin))

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return self._shapes[self._names[parameter]]

    def writes(self, index: int) -> bool:
        return self._counts(self._order[index])

    def close(self) -> None:
        if hasattr(self, "_made") and self._made.pipeline is not None:
            self._made.pipeline.close()
        if hasattr(self, "mesh") and tdist.is_initialized():
            self.mesh.close()

    def check_names(self, source: StateSource) -> None:
        check_names(self._shapes, source)  # of all stages


def _with_positions(batch: Batch) -> Batch:
    """Later stages do not see the tokens, and where these are divided not how many they are."""
    if batch.positions_BT is not None:
        return batch
    positions_BT = torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device)
    return replace(batch, positions_BT=positions_BT.unsqueeze(0))
