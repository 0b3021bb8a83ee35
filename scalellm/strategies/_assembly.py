"""What a rank of a mesh holds of a decoder, and how it is put together.

Order matters: stages are cut out first, then matrices; attention gets its collectives; then blocks
are checkpointed and compiled as under every strategy, and FSDP shards what is left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from scalellm.config import TrainConfig
from scalellm.errors import ConfigError
from scalellm.model import Decoder
from scalellm.strategies._context import Context
from scalellm.strategies._context import apply as apply_context
from scalellm.strategies._gloo import Reductions, compute_beside
from scalellm.strategies._mesh import Mesh, ParallelOptions
from scalellm.strategies._part import Part
from scalellm.strategies._pipeline import Pipeline
from scalellm.strategies._pipeline_cut import cut, named_parameters, share_embedding, split_layers
from scalellm.strategies._pipeline_schedule import stages_of, stages_per_rank
from scalellm.strategies._shards import autocast_beside, mixed_precision
from scalellm.strategies._tensor import Cut, TensorGroup, divide
from scalellm.strategies._transforms import apply_transforms


@dataclass
class Assembly:
    """A rank's parts of a decoder, with memory but without values, and the groups they use.

    Attributes:
        parts: the decoder, or its stages here in order, as `Part` where rows or layers are divided.
        cuts: which part of a matrix is here, by FQN.
        copies: the last stage's of a tied embedding, which is the first one's in norms and files.
        reductions: of gradients to shards; None where nothing is sharded.
    """

    parts: list[nn.Module]
    tensor: TensorGroup | None
    context: Context | None
    pipeline: Pipeline | None
    cuts: dict[str, Cut]
    copies: set[nn.Parameter]
    reductions: Reductions | None


def assemble(
    decoder: Decoder,
    options: ParallelOptions,
    mesh: Mesh,
    train: TrainConfig,
    device: torch.device,
) -> Assembly:
    """Takes a decoder on the meta device apart.

    Raises:
        ConfigError: the decoder is of a class whose own forward would be passed over.
    """
    size, place = mesh.size, mesh.place
    tensor, context = None, None
    if size["tp"] > 1:
        divides = options.sequence_parallel
        tensor = TensorGroup(mesh.groups["tp"], place["tp"], size["tp"], divides_tokens=divides)
    if size["cp"] > 1:
        context = Context(mesh.groups["cp"], place["cp"], size["cp"], options.context)
    cuts: dict[str, Cut] = {}
    parts: dict[int, nn.Module] = {}
    reductions: Reductions | None = None
    for stage, part in _stages(decoder, options, mesh).items():
        inner = cast(Decoder, part.module if isinstance(part, Part) else part)
        if tensor is not None:
            cuts |= divide(inner, tensor)
        if context is not None:
            apply_context(inner, context)
        apply_transforms(inner, train)
        if mesh.shards is not None:
            reductions = _shard(part, inner, mesh.shards, options, is_stage=size["pp"] > 1)
        parts[stage] = part.to_empty(device=device)
    pipeline = _pipeline(parts, options, mesh, train, device, tensor) if size["pp"] > 1 else None
    held = list(parts.values())
    named = named_parameters(cast(list[Part], held)) if pipeline is not None else ()
    copies = {parameter for _, parameter, counts in named if not counts}
    return Assembly(held, tensor, context, pipeline, cuts, copies, reductions)


def _stages(decoder: Decoder, options: ParallelOptions, mesh: Mesh) -> dict[int, nn.Module]:
    """What this rank holds of the layers, by the number of its stage."""
    pp = mesh.size["pp"]
    if pp == 1 and mesh.size["cp"] == 1:
        return {0: decoder}
    if type(decoder).forward is not Decoder.forward:
        raise ConfigError(
            "strategy.mesh.cp and pp run a decoder part by part, and "
            f"{type(decoder).__name__} has a forward of its own that would be passed over; use "
            "tp, fsdp and dp"
        )
    if pp == 1:
        return {0: Part(decoder)}
    per_rank = stages_per_rank(options.schedule, options.stages_per_rank or 2)
    layers = split_layers(decoder.config, pp * per_rank)
    last = len(layers) - 1
    return {
        stage: cut(
            copy.deepcopy(decoder), layers[stage], is_first=stage == 0, is_last=stage == last
        )
        for stage in stages_of(options.schedule, mesh.place["pp"], pp, per_rank)
    }


def _shard(
    part: nn.Module,
    decoder: Decoder,
    mesh: DeviceMesh,
    options: ParallelOptions,
    *,
    is_stage: bool,
) -> Reductions:
    policy = mixed_precision(options.param_dtype, options.reduce_dtype)
    layers = list(decoder.get_submodule("layers").children())
    for unit in (*layers, part):
        # A pipeline's stages are used once for each micro-batch: gathered once a step.
        fully_shard(unit, mesh=mesh, reshard_after_forward=not is_stage, mp_policy=policy)
    return compute_beside([part, *layers], mesh, gathers_ahead=not is_stage)


def _pipeline(
    parts: dict[int, nn.Module],
    options: ParallelOptions,
    mesh: Mesh,
    train: TrainConfig,
    device: torch.device,
    tensor: TensorGroup | None,
) -> Pipeline:
    staged = [(stage, cast(Part, part)) for stage, part in parts.items()]
    if mesh.shards is None:
        share_embedding([part for _, part in staged])
    per_rank = stages_per_rank(options.schedule, options.stages_per_rank or 2)
    return Pipeline(
        staged,
        mesh.size["pp"] * per_rank,
        mesh.groups["pp"],
        device,
        options.schedule,
        tokens_divided=tensor.size if tensor is not None and tensor.divides_tokens else 1,
        activation_dtype=mixed_precision(options.param_dtype, None).param_dtype,
        autocast_dtype=autocast_beside(options.param_dtype, train.precision),
    )
