"""The memory of one rank under any strategy, in seconds for a model of any size.

What can run dry is asked: the strategy itself takes a step with a few blocks, of which the middle
one is then repeated. DeepSpeed's buckets do not repeat with the blocks. For a CPU its engine takes
a step of the whole model; for a GPU what it holds is added up (`_zero_memory`), on top of the
passes of the same decoder. A strategy of the user's own is taken at the word of its `sharding()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from scalellm import strategies
from scalellm.config import BatchPlan, Config, StrategyConfig, TrainConfig
from scalellm.model import count_parameters
from scalellm.plan._pipeline_memory import pipeline_memory
from scalellm.plan._ranks import batches_of, data_world_size, ranks_of
from scalellm.plan._record import Trace, engine_runs_dry, is_deepspeed, record, record_events
from scalellm.plan._steps import FEW_LAYERS
from scalellm.plan._zero_memory import zero_memory
from scalellm.plan.activations import activations, spared_by_compiling
from scalellm.plan.allocator import Event
from scalellm.plan.dry_run import remembered, stretched, summarize
from scalellm.plan.types import Memory
from scalellm.strategies._mesh import ParallelOptions, sizes

# What of a pipeline's options its stages' own work depends on.
_KEPT = ("sequence_parallel", "context", "bucket_mb", "param_dtype", "reduce_dtype")

# A heap of so many blocks is simulated whole; that of more has as large a share of holes.
WHOLE_LAYERS = 12
# Only those of the last trace: they are many.
_LAST_EVENTS: dict[str, list[Event]] = {}


def estimate(config: Config, world_size: int, device_type: str = "cuda") -> Memory:
    """Returns what rank 0 of `world_size` holds at the worst moment of an optimizer step.

    It is what tensors take. The cache of an allocator, workspaces of kernels, communication
    libraries and the framework come on top.

    Args:
        device_type: see `dry_run`.

    Raises:
        ConfigError: the config cannot run in such a world, or does not say the vocabulary.
        UserError: this process is a rank of a process group.
    """
    memory = _uncompiled(config, world_size, device_type)
    if not config.train.compile:
        return memory
    micro_batch = batches_of(config, world_size).micro_batch_size
    spared_bytes = spared_by_compiling(config, micro_batch, device_type)
    spared_bytes //= _sharing_ranks(config, world_size)
    kept_bytes = max(0, memory.activations_bytes - spared_bytes)
    return replace(memory, activations_bytes=kept_bytes)


def _sharing_ranks(config: Config, world_size: int) -> int:
    """Among how many ranks one micro-batch's activations are divided."""
    options = ranks_of(config, world_size).options
    if not isinstance(options, ParallelOptions):
        return 1
    # A pipeline's rank keeps several micro-batches: what it is spared of the others is not counted.
    return options.mesh.tp * options.mesh.cp * options.mesh.pp


def _uncompiled(config: Config, world_size: int, device_type: str) -> Memory:
    if is_deepspeed(config):
        if device_type != "cpu" or not engine_runs_dry(config, world_size):
            return zero_memory(config, world_size, device_type)
        trace = _recorded(config, world_size, device_type, config.model.num_layers)
        return summarize(trace)[0]
    if config.strategy.name not in strategies.names():
        return _by_word(config, world_size, device_type)
    here = ranks_of(config, world_size)
    if isinstance(here.options, ParallelOptions) and here.options.mesh.pp > 1:
        return _of_pipeline(config, here.options, here.batches, world_size, device_type)
    layers = config.model.num_layers
    if device_type == "cpu" and layers <= WHOLE_LAYERS:  # `events_of` wants the same
        return summarize(_recorded(config, world_size, device_type, layers))[0]
    trace = _recorded(config, world_size, device_type, min(layers, FEW_LAYERS))
    return summarize(stretched(trace, layers) if layers > FEW_LAYERS else trace)[0]


def _of_pipeline(
    config: Config,
    options: ParallelOptions,
    batches: BatchPlan,
    world_size: int,
    device_type: str,
) -> Memory:
    """The fullest rank's, from the same decoder undivided, on shards only if these change it."""
    size = sizes(options.mesh, world_size)
    shards = 2 if options.param_dtype or options.reduce_dtype else 1
    ranks = size["tp"] * size["cp"] * shards
    mesh = {"tp": size["tp"], "cp": size["cp"], "fsdp": shards}
    rest = {key: config.strategy.options[key] for key in _KEPT if key in config.strategy.options}
    strategy = StrategyConfig.model_validate({"name": "parallel", "mesh": mesh, **rest})
    rows = batches.micro_batch_size
    train = config.train.model_copy(
        update={
            "micro_batch_size": rows,
            "global_batch_size": rows * min(batches.grad_accumulation, 2) * shards,
        }
    )
    whole = config.model_copy(update={"strategy": strategy, "train": train})
    trace = _recorded(whole, ranks, device_type, FEW_LAYERS)
    trace_shards = shards * size["cp"] if shards > 1 else 1
    return pipeline_memory(config, options, batches, size, trace, trace_shards)


def _recorded(config: Config, world_size: int, device_type: str, layers: int) -> Trace:
    small = _small(config, world_size, layers)
    key = _key(small, world_size, device_type)
    if device_type != "cpu":
        return remembered(key, lambda: record(small, world_size, device_type))
    return remembered(key, lambda: _with_events(key, small, world_size))


def _with_events(key: str, small: Config, world_size: int) -> Trace:
    trace, events = record_events(small, world_size, "cpu")
    _LAST_EVENTS.clear()
    _LAST_EVENTS[key] = events
    return trace


def events_of(config: Config, world_size: int) -> tuple[str, Callable[[], Sequence[Event]]]:
    """Returns what a step's allocations on a CPU depend on, and what gives them.

    Of more than `WHOLE_LAYERS` blocks they are those of so many. Right after `estimate` they are
    known already.
    """
    small = _small(config, world_size, min(config.model.num_layers, WHOLE_LAYERS))
    key = _key(small, world_size, "cpu")

    def events() -> Sequence[Event]:
        if key not in _LAST_EVENTS:
            _with_events(key, small, world_size)
        return _LAST_EVENTS[key]

    return key, events


def _key(small: Config, world_size: int, device_type: str) -> str:
    return (
        f"{small.model!r} {small.strategy!r} {small.train!r} {small.data.document_mask} "
        f"{world_size} {device_type}"
    )


def _small(config: Config, world_size: int, layers: int) -> Config:
    """Only what a step's memory depends on, so that plans which differ elsewhere share a trace."""
    data_ranks = data_world_size(config, world_size)
    plan = config.batches(data_ranks)
    train = TrainConfig(
        precision=config.train.precision,
        activation_checkpointing=config.train.activation_checkpointing,
        grad_clip=config.train.grad_clip,
        micro_batch_size=plan.micro_batch_size,
        global_batch_size=plan.micro_batch_size * min(plan.grad_accumulation, 2) * data_ranks,
    )
    model = config.model.model_copy(update={"num_layers": layers})
    return config.model_copy(update={"model": model, "train": train})


def _by_word(config: Config, world_size: int, device_type: str) -> Memory:
    """A strategy whose workings are not known, divided as it says itself."""
    here = ranks_of(config, world_size)
    sharding = here.strategy.sharding(here.options, here.world, config.train)
    micro_batch = here.batches.micro_batch_size
    kept_bytes, beyond_bytes = activations(
        config.model, config.train, micro_batch, config.model.seq_len, device_type
    )
    element_bytes = 8 if config.train.precision == "fp64" else 4
    working_bytes = sharding.working_bytes or element_bytes
    masters = 0 if sharding.working_bytes is None else 1
    parameters = count_parameters(config.model)
    held = {
        "parameters": Fraction(parameters * working_bytes, sharding.parameters),
        "gradients": Fraction(parameters * working_bytes, sharding.gradients),
        "optimizer": Fraction(parameters * (2 + masters) * element_bytes, sharding.optimizer),
    }
    sizes = Counter({kind: int(size) for kind, size in held.items()})
    host = sum(sizes.pop(kind, 0) for kind in sharding.offloaded) if device_type != "cpu" else 0
    return Memory(
        parameters_bytes=sizes["parameters"],
        gradients_bytes=sizes["gradients"],
        optimizer_bytes=sizes["optimizer"],
        activations_bytes=kept_bytes,
        buffers_bytes=0,
        temporary_bytes=beyond_bytes,
        host_bytes=host,
    )
