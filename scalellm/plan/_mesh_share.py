"""How much of a model's work is one rank's, where ranks share a model."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm.config import Config
from scalellm.model import flops_per_token
from scalellm.plan.traffic import Setup
from scalellm.strategies._mesh import ParallelOptions, sizes
from scalellm.strategies._pipeline_cut import split_layers
from scalellm.strategies._pipeline_schedule import bubble_formula, stages_of, stages_per_rank

# Without sequence parallelism every rank of a tensor group does what lies between the matrices:
# of a block's element-wise bytes assumed to be about this share.
_BETWEEN = 1 / 3


@dataclass(frozen=True)
class WorkShare:
    """What the slowest rank does of a micro-batch, and what it waits of a step.

    `products` of the matrix products, `memory` of other operators' bytes, `operators` of the
    operators launched; `bubble` is the idle part of the time of a step's computations.
    """

    products: float = 1.0
    memory: float = 1.0
    operators: float = 1.0
    bubble: float = 0.0


def share_of(config: Config, setup: Setup, world_size: int) -> WorkShare:
    """Returns the share of the rank with the most; all of it where ranks share no model."""
    options = setup.options
    if not isinstance(options, ParallelOptions):
        return WorkShare()
    size = sizes(options.mesh, world_size)
    ranks = size["tp"] * size["cp"]
    between = 0.0 if options.sequence_parallel or size["tp"] == 1 else _BETWEEN
    memory = (between + (1 - between) / size["tp"]) / size["cp"]
    if size["pp"] == 1:
        return WorkShare(products=1 / ranks, memory=memory)
    stage, layers = _slowest_stage(config, options, size["pp"])
    per_rank = stages_per_rank(options.schedule, options.stages_per_rank or 2)
    micro_batches = setup.batches.grad_accumulation
    bubble = bubble_formula(options.schedule, size["pp"], micro_batches, per_rank)
    return WorkShare(stage / ranks, memory * stage, layers, bubble)


def _slowest_stage(config: Config, options: ParallelOptions, pp: int) -> tuple[float, float]:
    """Of the rank with the most products: its shares of the products and of the layers."""
    model = config.model
    per_rank = stages_per_rank(options.schedule, options.stages_per_rank or 2)
    stages = split_layers(model, pp * per_rank)
    total = flops_per_token(model)
    head = 6 * (model.vocab_size or 0) * model.hidden_size
    layer = (total - head) / model.num_layers
    found = []
    for rank in range(pp):
        mine = stages_of(options.schedule, rank, pp, per_rank)
        layers = sum(len(stages[stage]) for stage in mine)
        flops = layers * layer + head * (len(stages) - 1 in mine)
        found.append((flops / total, layers / model.num_layers))
    return max(found)
