"""The mesh of `parallel`: how ranks are arranged, and which arrangements are refused.

A rank has five coordinates, the last changes fastest, so that the ranks that talk most are
neighbours on one host: pp (stage of the pipeline), dp (replica), fsdp (shard), cp (part of each
row), tp (part of each matrix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as tdist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scalellm.config import BatchPlan, ModelConfig, Section, TrainConfig, setting
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.strategies._context import check_context
from scalellm.strategies._pipeline_schedule import check_pipeline
from scalellm.strategies._shards import PARAM_DTYPE, REDUCE_DTYPE, FloatWord
from scalellm.strategies.base import Options

DIMS = ("pp", "dp", "fsdp", "cp", "tp")
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


class MeshOptions(Section):
    dp: int | None = setting(
        None, "replicas of the model; null: as many as the ranks make", unit="replicas", ge=1
    )
    fsdp: int = setting(1, "ranks that divide parameters and optimizer (FSDP2)", ge=1)
    tp: int = setting(1, "ranks that divide every matrix (tensor parallelism)", ge=1)
    pp: int = setting(1, "ranks that divide the layers (pipeline parallelism)", ge=1)
    cp: int = setting(1, "ranks that divide every row (context parallelism)", ge=1)


class ParallelOptions(Options):
    mesh: MeshOptions = setting(MeshOptions(), "how many ranks do what; the product is all ranks")
    sequence_parallel: bool = setting(
        True, "with tp: each rank keeps a part of the tokens between the matrices"
    )
    schedule: Schedule = setting("1f1b", "with pp: the order of forwards and backwards")
    stages_per_rank: int | None = setting(
        None, "with schedule interleaved: stages of a rank; null: 2", unit="stages", ge=2
    )
    context: Literal["gather", "ulysses"] = setting(
        "gather",
        "with cp: gather all keys and values, or exchange tokens for heads (as many as ranks)",
    )
    param_dtype: FloatWord | None = setting(None, PARAM_DTYPE)
    reduce_dtype: FloatWord | None = setting(None, REDUCE_DTYPE)
    bucket_mb: int = setting(25, "gradients summed together over replicas", unit="MiB", ge=1)


def sizes(mesh: MeshOptions, world_size: int) -> dict[str, int]:
    """The ranks along each dimension.

    Raises:
        ConfigError: their product is not `world_size`.
    """
    fixed = mesh.fsdp * mesh.tp * mesh.pp * mesh.cp
    dp = mesh.dp or max(1, world_size // fixed)
    if dp * fixed != world_size:
        words = {"dp": mesh.dp, "fsdp": mesh.fsdp, "tp": mesh.tp, "pp": mesh.pp, "cp": mesh.cp}
        product = " x ".join(f"{name} {size}" for name, size in words.items() if size is not None)
        nearest = max(1, round(world_size / (dp * fixed))) * dp * fixed if mesh.dp is None else 0
        fix = f"start {nearest or dp * fixed:,} ranks"
        if world_size % fixed == 0:
            fix += f", or set strategy.mesh.dp={world_size // fixed}"
        found = f"{world_size:,} ranks" if world_size > 1 else "one rank"
        raise ConfigError(
            f"strategy.mesh: {product} = {(mesh.dp or 1) * fixed:,} ranks do not make the "
            f"{found} of this run; {fix}"
        )
    return {"pp": mesh.pp, "dp": dp, "fsdp": mesh.fsdp, "cp": mesh.cp, "tp": mesh.tp}


def place_of(rank: int, size: dict[str, int]) -> dict[str, int]:
    """A rank's coordinates."""
    place = {}
    for dim in reversed(DIMS):
        rank, place[dim] = divmod(rank, size[dim])
    return place


@dataclass(frozen=True)
class Mesh:
    """A rank's place, and the groups it is in.

    Attributes:
        shards: for FSDP2, (replicas, shards): ranks of one context share the shards too, since
            each has a part of the gradient; None without shards.
        sums: the ranks whose gradients are summed where FSDP2 does not: replicas, contexts.
    """

    size: dict[str, int]
    place: dict[str, int]
    groups: dict[str, tdist.ProcessGroup]
    shards: DeviceMesh | None
    sums: tdist.ProcessGroup | None
    made: list[DeviceMesh]

    @classmethod
    def make(cls, options: ParallelOptions, world: World) -> Mesh:
        """All ranks call it: it makes process groups."""
        size = sizes(options.mesh, world.world_size)
        pp, dp, fsdp, cp, tp = (size[dim] for dim in DIMS)
        whole = _device_mesh(world, size)
        groups = {dim: whole.get_group(dim) for dim in DIMS if size[dim] > 1 and whole is not None}
        shards, by_data, sums = None, None, None
        if fsdp > 1:
            by_data = _device_mesh(world, {"pp": pp, "dp": dp, "shard": fsdp * cp, "tp": tp})
            shards = by_data["dp", "shard"] if dp > 1 else by_data["shard"]
        elif dp * cp > 1:
            by_data = _device_mesh(world, {"pp": pp, "data": dp * cp, "tp": tp})
            sums = by_data.get_group("data")
        made = [mesh for mesh in (whole, by_data) if mesh is not None]
        return cls(size, place_of(world.rank, size), groups, shards, sums, made)

    def close(self) -> None:
        """Gives up the groups: each has threads and connections of its own."""
        for mesh in self.made:
            for group in mesh.get_all_groups():
                if group is not tdist.group.WORLD and group in tdist.distributed_c10d._world.pg_map:
                    tdist.destroy_process_group(group)


def _device_mesh(world: World, size: dict[str, int]) -> Any:
    """A mesh of the dimensions that have more than one rank; None if there are none."""
    names = tuple(name for name, ranks in size.items() if ranks > 1)
    if not names:
        return None
    shape = tuple(size[name] for name in names)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


_FOR_DIM = (
    ("schedule", "pp"),
    ("context", "cp"),
    ("sequence_parallel", "tp"),
    ("param_dtype", "fsdp"),
    ("reduce_dtype", "fsdp"),
)


def refuse_training(options: ParallelOptions, size: dict[str, int], train: TrainConfig) -> None:
    """Raises ConfigError for a way of training, or an option, that the mesh does not go with."""
    problem = next(_training_problems(options, size, train), None)
    if problem is not None:
        raise ConfigError(problem)


def _training_problems(
    options: ParallelOptions, size: dict[str, int], train: TrainConfig
) -> Iterator[str]:
    if train.compile and train.compile_scope == "model":
        yield (
            "train.compile_scope=model makes one graph of all blocks, but parallel calls a "
            "decoder's parts one by one; use train.compile_scope=parts"
        )
    if options.stages_per_rank is not None and options.schedule != "interleaved":
        yield (
            f"strategy.stages_per_rank={options.stages_per_rank} stages are for "
            f"strategy.schedule=interleaved, and {options.schedule} does nothing with it; leave it "
            "out"
        )
    defaults = ParallelOptions()
    for name, dim in _FOR_DIM:
        value = getattr(options, name)
        if size[dim] == 1 and value != getattr(defaults, name):
            yield (
                f"strategy.{name}={_word(value)} is for strategy.mesh.{dim} of 2 or more, here it "
                "is 1 and would do nothing; leave it out"
            )


def refuse(
    options: ParallelOptions,
    size: dict[str, int],
    train: TrainConfig,
    model: ModelConfig,
    plan: BatchPlan,
) -> None:
    """Raises ConfigError for the first thing about the model or its rows that cannot be divided."""
    problem = next(_problems(options, size, train, model, plan), None)
    if problem is not None:
        raise ConfigError(problem)


def _problems(
    options: ParallelOptions,
    size: dict[str, int],
    train: TrainConfig,
    model: ModelConfig,
    plan: BatchPlan,
) -> Iterator[str]:
    tp, cp = size["tp"], size["cp"]
    for name, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if heads % tp:
            yield (
                f"strategy.mesh.tp={tp} ranks do not divide model.{name}={heads} heads evenly; "
                f"use tp={_divisor(math.gcd(model.num_heads, model.kv_heads), tp)}, or other heads"
            )
    if tp > 1 and options.sequence_parallel and model.seq_len % (tp * cp):
        yield (
            f"strategy.sequence_parallel=true divides rows among {tp * cp} ranks (tp x cp), but "
            f"model.seq_len={model.seq_len} tokens is no multiple of that; use "
            f"{_multiple(model.seq_len, tp * cp)}, or set it to false"
        )
    try:
        check_context(model, cp, options.context, tp)
        if size["pp"] > 1:
            check_pipeline(
                options.schedule,
                size["pp"],
                plan.grad_accumulation,
                model,
                train,
                options.stages_per_rank or 2,
            )
    except ConfigError as error:
        yield str(error)
    if (model.vocab_size or tp) < tp:
        yield (
            f"strategy.mesh.tp={tp} ranks divide the words, but model.vocab_size="
            f"{model.vocab_size} are fewer; use tp={model.vocab_size} or less"
        )
    if tp > 1 and model.loss_chunk_tokens:
        yield (
            f"model.loss_chunk_tokens={model.loss_chunk_tokens} needs the whole output matrix on "
            f"every rank, and strategy.mesh.tp={tp} divides it (and with it the logits); set it "
            "to 0"
        )


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _divisor(number: int, near: int) -> int:
    """The largest divisor that is not above `near`."""
    return next(size for size in range(min(number, near), 0, -1) if number % size == 0)


def _multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
