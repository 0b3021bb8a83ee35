"""Which computation of a pipeline follows which, and how long its ranks then stand idle.

1F1B and interleaved 1F1B: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on
GPU Clusters Using Megatron-LM", section 2.2; GPipe: Huang et al. 2019; zero bubble: Qi et al. 2023,
"Zero Bubble Pipeline Parallelism", whose ZB-V gives each rank one stage on the way down and one
on the way up, so that the first stage and the last are on the first rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _PipelineSchedule,
)

from scalellm.config import ModelConfig, TrainConfig
from scalellm.errors import ConfigError

# On an error every rank would print the whole schedule above it.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

_SINGLE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTI: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
}

# torch's names of computations, and what is written here: F forward, B backward, which is I, the
# gradients of the inputs, and W, those of the weights.
_KINDS = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
}
UNIT_COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class Action(NamedTuple):
    """One computation of a rank; `kind` is F, B, I or W."""

    kind: str
    stage: int
    micro_batch: int


def stages_per_rank(schedule: str, interleaved: int = 2) -> int:
    """How many stages a rank holds; only `interleaved` leaves a choice."""
    return {"interleaved": interleaved, "zero_bubble": 2}.get(schedule, 1)


def stages_of(schedule: str, rank: int, ranks: int, per_rank: int) -> list[int]:
    """The stages of a rank in order: round and round, or down and up again (zero bubble)."""
    if schedule == "zero_bubble":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * turn for turn in range(per_rank)]


def owner_of(schedule: str, stage: int, ranks: int) -> int:
    """The rank that holds a stage."""
    if schedule == "zero_bubble":
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks


def make_schedule(
    schedule: str, stages: Sequence[Any], micro_batches: int, loss_fn: Callable[..., Any]
) -> _PipelineSchedule:
    """Returns torch's schedule; it leaves gradients as they are summed over micro-batches."""
    arguments: dict[str, Any] = {"loss_fn": loss_fn, "scale_grads": False}
    if schedule in _SINGLE:
        [stage] = stages
        return cast(_PipelineSchedule, _SINGLE[schedule](stage, micro_batches, **arguments))
    return cast(_PipelineSchedule, _MULTI[schedule](list(stages), micro_batches, **arguments))


def check_pipeline(
    schedule: str,
    ranks: int,
    micro_batches: int,
    model: ModelConfig,
    train: TrainConfig,
    interleaved: int = 2,
) -> None:
    """Refuses what the schedule cannot do, or would do wrongly without a word.

    Args:
        ranks: of one pipeline.
        micro_batches: of one pipeline and optimizer step.
        interleaved: stages per rank of `interleaved`.

    Raises:
        ConfigError: see the messages.
    """
    per_rank = stages_per_rank(schedule, interleaved)
    _check_layers(schedule, ranks, per_rank, model.num_layers)
    _check_micro_batches(schedule, ranks, micro_batches)
    if train.compile and train.compile_scope == "model":
        raise ConfigError(
            "train.compile_scope=model makes one graph of all blocks, but a pipeline cuts between "
            "them; use train.compile_scope=parts"
        )
    if schedule == "zero_bubble":
        _check_split_backward(model, train)


def _check_layers(schedule: str, ranks: int, per_rank: int, num_layers: int) -> None:
    num_stages = ranks * per_rank
    if num_stages <= num_layers:
        return
    fitting = num_layers // per_rank
    ways = [f"strategy.mesh.pp={fitting}"] if fitting > 1 else []
    ways += ["strategy.schedule=1f1b"] if per_rank > 1 and ranks <= num_layers else []
    ways += [f"model.num_layers={num_stages}"]
    raise ConfigError(
        f"strategy.mesh.pp={ranks} ranks with strategy.schedule={schedule} are {num_stages} stages "
        f"of at least one layer, but model.num_layers={num_layers}; use {' or '.join(ways)}"
    )


def _check_micro_batches(schedule: str, ranks: int, micro_batches: int) -> None:
    below = micro_batches // ranks * ranks
    if schedule == "1f1b" and micro_batches < ranks:
        need, fitting = f"at least as many as the {ranks} ranks of strategy.mesh.pp", [ranks]
    elif schedule == "interleaved" and micro_batches % ranks:
        need = f"a multiple of the {ranks} ranks of strategy.mesh.pp"
        fitting = [number for number in (below, below + ranks) if number]
    else:
        return
    raise ConfigError(
        f"strategy.schedule={schedule} needs {need}, not {micro_batches} micro-batches a step; use "
        f"{' or '.join(map(str, fitting))} (by train.global_batch_size or train.micro_batch_size), "
        "or strategy.schedule=gpipe"
    )


def _check_split_backward(model: ModelConfig, train: TrainConfig) -> None:
    """Zero bubble walks a forward's graph for the inputs, and later for one weight after another.

    Selective checkpointing forbids that, full checkpointing would recompute a block each time.
    """
    checkpointing = train.activation_checkpointing
    refused = [
        (train.compile, "train.compile=true", "false"),
        (model.loss_chunk_tokens > 0, f"model.loss_chunk_tokens={model.loss_chunk_tokens}", "0"),
        (checkpointing != "none", f"train.activation_checkpointing={checkpointing}", "none"),
    ]
    for is_set, given, fitting in refused:
        if is_set:
            raise ConfigError(
                f"{given} needs a backward in one go, which strategy.schedule=zero_bubble takes in "
                f"parts; use {fitting}, or strategy.schedule=interleaved"
            )


def order_of(schedule: str, ranks: int, micro_batches: int, per_rank: int) -> list[list[Action]]:
    """Returns the computations of each rank in their order; no rank needs to exist for it."""
    if schedule == "1f1b":
        # Schedule1F1B has an order of its own, and another one, wrong, to be drawn (torch 2.13).
        return [_order_1f1b(rank, ranks, micro_batches) for rank in range(ranks)]
    stand_ins = [
        SimpleNamespace(
            num_stages=ranks * per_rank, group_size=ranks, group_rank=0, stage_index=stage,
            is_first=stage == 0, is_last=stage == ranks * per_rank - 1, submod=None,
        )
        for stage in stages_of(schedule, 0, ranks, per_rank)
    ]  # fmt: skip
    orders = cast(Any, make_schedule(schedule, stand_ins, micro_batches, lambda *_: None))
    return [
        [
            Action(
                _KINDS[action.computation_type.name], action.stage_index, action.microbatch_index
            )
            for action in orders.pipeline_order[rank]
            if action is not None and action.computation_type.name in _KINDS
        ]
        for rank in range(ranks)
    ]


def _order_1f1b(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    ahead = min(micro_batches, ranks - rank)
    order = [Action("F", rank, index) for index in range(ahead)]
    for index in range(micro_batches):
        order.append(Action("B", rank, index))
        if ahead + index < micro_batches:
            order.append(Action("F", rank, ahead + index))
    return order


def simulated_bubble(
    orders: Sequence[Sequence[Action]], costs: dict[str, float] | None = None
) -> float:
    """Returns the idle part of all ranks' time if computations cost `costs` and messages nothing.

    Args:
        costs: of F, B, I and W, in any unit; None: one of each, B two.

    Raises:
        ValueError: a computation waits for one that never comes.
    """
    costs = costs or UNIT_COSTS
    last_stage = max(action.stage for order in orders for action in order)
    end: dict[Action, float] = {}
    clocks, places = [0.0] * len(orders), [0] * len(orders)
    total = sum(len(order) for order in orders)
    while len(end) < total:
        before = len(end)
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                needed = _needed(action, last_stage)
                if not needed <= end.keys():
                    break
                start = max([clocks[rank], *(end[one] for one in needed)])
                clocks[rank] = end[_whole(action)] = start + costs[action.kind]
                places[rank] += 1
        if len(end) == before:
            raise ValueError("the order of the pipeline's computations never ends")
    busy = sum(costs[action.kind] for order in orders for action in order)
    return 1.0 - busy / (len(orders) * max(clocks))


def _whole(action: Action) -> Action:
    """What others wait for: they do not care whether the weights' gradients are in it."""
    return action._replace(kind="I") if action.kind == "B" else action


def _needed(action: Action, last_stage: int) -> set[Action]:
    kind, stage, index = action
    if kind == "F":
        return {Action("F", stage - 1, index)} if stage else set()
    if kind == "W":
        return {Action("I", stage, index)}
    own = {Action("F", stage, index)}
    return own | ({Action("I", stage + 1, index)} if stage < last_stage else set())


def bubble_formula(schedule: str, ranks: int, micro_batches: int, per_rank: int) -> float:
    """Returns the idle part of a step's time, if all stages take equal time and messages none.

    With p ranks, v stages a rank and m micro-batches the step takes v m units of one stage's
    forward and backward, and p - 1 more: (p - 1) / (v m + p - 1) of it (Narayanan et al. 2021,
    section 2.2, where it is divided by the work alone; m is a multiple of p if v > 1). Zero bubble
    (Qi et al. 2023, section 6) leaves p - 1 forwards, a third of such units, if forward and both
    halves of a backward take equal time: none, had no step to wait for the last one's gradient
    norm. Below 2 p - 1 micro-batches its V is not filled.
    """
    p, m = ranks, micro_batches
    if schedule == "zero_bubble":
        idle = max(p - 1, 2 * (2 * p - 1 - m))
        return idle / (3 * 2 * m + idle)
    return (p - 1) / (per_rank * m + p - 1)
