"""FSDP2: what is refused, what each rank holds, and transforms under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from helpers.transformed import transformed_curve
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from scalellm import strategies
from scalellm.config import ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.model import Decoder, count_parameters
from scalellm.parity import Curve, Task, build, run_curve, train_steps, worst_difference
from scalellm.strategies._gloo import Gather, Reductions, _ReduceToParts

MODEL = ModelConfig(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, vocab_size=257, seq_len=16
)


def parsed(world_size: int, precision: str = "fp32", **options: Any) -> strategies.Options:
    config = StrategyConfig.model_validate({"name": "fsdp", **options})
    train = TrainConfig.model_validate({"precision": precision})
    world = World(world_size=world_size)
    return strategies.parse_options(config, strategies.resolve("fsdp"), world, train)


def test_a_mesh_that_does_not_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy\.shard_ranks=4 ranks does not divide the 6 .*"
    ):
        parsed(6, shard_ranks=4)
    with pytest.raises(ConfigError, match="use 1 or 2 or 3 or 6"):
        parsed(6, shard_ranks=4)
    with pytest.raises(ConfigError, match=r"strategy\.shard_ranks=0 ranks is out of range"):
        parsed(6, shard_ranks=0)


def test_lower_precision_in_an_fp64_run() -> None:
    with pytest.raises(ConfigError, match=r"lower the precision, which train\.precision=fp64"):
        parsed(2, "fp64", param_dtype="bf16")


def held(options: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Memory after a step, and the elements of the largest parameter shard."""
    world = detect()
    task = Task(MODEL, 1, "fp32")
    strategy = build(task, "fsdp", options, world)
    list(train_steps(strategy, task, world, range(1)))
    shards = [strategy.part_of(p.detach())[0] for _, p in strategy.named_parameters()]
    return strategy.memory(), sum(shard.untyped_storage().nbytes() for shard in shards)


@pytest.mark.parametrize(("options", "parts"), [({}, 4), ({"shard_ranks": 2}, 2)])
def test_each_rank_holds_its_part_of_sixteen_bytes_a_parameter(
    ranks: Callable[..., list[Any]], options: dict[str, Any], parts: int
) -> None:
    theory_bytes = 16 * count_parameters(MODEL) / parts
    for memory, storage_bytes in ranks(held, 4, options):
        assert sum(memory.values()) == pytest.approx(theory_bytes, rel=0.1)
        # Storage, padding included: a view of a whole tensor would hold all of it.
        assert storage_bytes == pytest.approx(theory_bytes / 4, rel=0.1)


@pytest.mark.parametrize(
    "train",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "alternate"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_transforms_change_nothing(
    ranks: Callable[..., list[Curve]], train: dict[str, Any]
) -> None:
    wanted = run_curve(Task(MODEL, 3, "fp64"), "single", {}, World())
    for curve in ranks(transformed_curve, 2, MODEL, "fsdp", {}, train):
        assert worst_difference(curve, wanted) < 1e-11


def bf16_losses(options: dict[str, Any], precision: str) -> list[float]:
    world = detect()
    task = Task(MODEL, 6, precision, micro_batch=4)
    strategy = build(task, "fsdp", options, world)
    losses = [loss for loss, _, _ in train_steps(strategy, task, world, range(6))]
    assert all(p.dtype == torch.float32 for _, p in strategy.named_parameters())
    return losses


def test_bf16_parameters_on_the_wire_train_alike(ranks: Callable[..., list[Any]]) -> None:
    [exact, _] = ranks(bf16_losses, 2, {}, "fp32")
    [found, _] = ranks(bf16_losses, 2, {"param_dtype": "bf16", "reduce_dtype": "fp32"}, "bf16")
    assert found == pytest.approx(exact, rel=2e-2)
    assert found != exact


def sent_by_parts(dtype: torch.dtype) -> list[Tensor]:
    """What our collectives give and, in turn, what gloo's own do."""
    group, rank, world_size = tdist.group.WORLD, tdist.get_rank(), tdist.get_world_size()
    assert group is not None
    part = torch.arange(3.0, dtype=dtype) + 10 * rank
    found = []
    for gather in (Gather(), DefaultAllGather()):
        whole = torch.zeros(3 * world_size, dtype=dtype)
        whole[3 * rank : 3 * rank + 3] = part  # as FSDP does
        work = gather(whole, whole[3 * rank : 3 * rank + 3], group, async_op=True)
        assert work is not None
        work.wait()
        found.append(whole)
    for reduce in (_ReduceToParts(Reductions(are_sums=True)), DefaultReduceScatter()):
        reduced = torch.zeros(3, dtype=dtype)
        reduce(reduced, found[0] * (rank + 1), group, tdist.ReduceOp.SUM)
        found.append(reduced)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_collectives_by_parts_give_what_gloo_own_do(
    ranks: Callable[..., list[Any]], dtype: torch.dtype
) -> None:
    for rank, found in enumerate(ranks(sent_by_parts, 3, dtype)):
        for ours, theirs in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(ours, theirs)
        assert found[2].tolist() == [6 * (10 * rank + n) for n in range(3)]


def optimizer(gradient: Tensor | None) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = gradient
    return torch.optim.SGD([parameter])


@pytest.mark.parametrize(
    ("gradient", "may_wait", "waits"),
    [(None, True, True), (None, False, False), (torch.zeros(1), True, False)],
)
def test_a_reduction_goes_on_beside_the_backward_where_nothing_takes_it_up_at_once(
    gradient: Tensor | None, *, may_wait: bool, waits: bool
) -> None:
    done: list[str] = []
    reductions = Reductions(are_sums=True)
    with reductions.beside_backward(optimizer(gradient)):
        reductions.add("unit", lambda: done.append("first"), may_wait=may_wait)
        assert done == ([] if waits else ["first"])
        reductions.add("other", lambda: done.append("second"), may_wait=may_wait)
        assert done == (["first"] if waits else ["first", "second"])
        reductions.add("unit", lambda: done.append("again"), may_wait=may_wait)
        assert done == ["first", "second", "again"]
    reductions.add("unit", lambda: done.append("outside"), may_wait=may_wait)
    assert done[3:] == ["outside"]


def test_what_a_backward_that_failed_began_is_completed_before_the_next() -> None:
    done: list[str] = []
    reductions = Reductions(are_sums=True)
    with pytest.raises(ZeroDivisionError), reductions.beside_backward(optimizer(None)):
        reductions.add("unit", lambda: done.append("late"), may_wait=True)
        raise ZeroDivisionError
    assert done == []
    with reductions.beside_backward(optimizer(None)):
        assert done == ["late"]


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError("in the backward")


def met_after_failing() -> str:
    task = Task(MODEL.model_copy(update={"num_layers": 4}), 1, "fp32")
    strategy = build(task, "fsdp", {}, detect())
    block = strategy.model.get_submodule("layers.1")
    block.register_forward_hook(lambda _module, _inputs, output: Failing.apply(output))
    with pytest.raises(ZeroDivisionError):
        next(train_steps(strategy, task, detect(), range(1)))
    tdist.barrier()  # would hang behind messages that nobody takes
    strategy.close()
    return "met"


def test_ranks_meet_after_a_backward_that_failed(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(met_after_failing, 2) == ["met", "met"]


def what_goes_on_beside(options: dict[str, Any], micro_batch: int | None) -> list[bool]:
    """For each reduction of a step, whether the backward went on before it was complete."""
    task = Task(MODEL, 1, "fp32", micro_batch=micro_batch)
    strategy = build(task, "fsdp", options, detect())
    seen: list[bool] = []
    add = Reductions.add

    def noted(reductions: Reductions, unit: object, finish: Any, *, may_wait: bool) -> None:
        add(reductions, unit, finish, may_wait=may_wait)
        seen.append(bool(reductions._under_way))

    Reductions.add = noted  # type: ignore[method-assign]
    for _ in train_steps(strategy, task, detect(), range(1)):
        pass
    strategy.close()
    return seen


UNITS = MODEL.num_layers + 1


@pytest.mark.parametrize(
    ("options", "micro_batch", "world_size", "beside"),
    [
        ({}, None, 2, [True] * UNITS),
        ({}, 2, 2, [True] * UNITS + [False] * UNITS),
        ({"reshard_after_forward": False}, 2, 2, [True] * UNITS + [False] * UNITS),
        ({"reduce_every_micro_batch": False}, 2, 2, [True] * UNITS),
        ({"shard_ranks": 2}, None, 4, [False] * UNITS),
        ({"reduce_dtype": "bf16"}, None, 2, [False] * UNITS),
    ],
)
def test_which_reductions_go_on_beside_the_backward(
    ranks: Callable[..., list[Any]],
    options: dict[str, Any],
    micro_batch: int | None,
    world_size: int,
    beside: list[bool],
) -> None:
    for seen in ranks(what_goes_on_beside, world_size, options, micro_batch):
        assert seen == beside


class LeavesOut(Decoder):
    """Its second block runs in every other forward only."""

    calls = 0

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        LeavesOut.calls += 1
        layers = self.layers
        if LeavesOut.calls % 2:
            self.layers = nn.ModuleList([layers[0], *layers[2:]])
        try:
            return super().forward(*arguments, **keywords)
        finally:
            self.layers = layers


class Repeated(nn.ModuleList):
    def children(self) -> Iterator[nn.Module]:
        return iter(self)


class Looped(Decoder):
    """Runs its blocks twice."""

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        layers = self.layers
        self.layers = Repeated([*layers, *layers])
        try:
            return super().forward(*arguments, **keywords)
        finally:
            self.layers = layers


def trained_as(model_class: type[Decoder], name: str) -> Curve:
    task = Task(MODEL.model_copy(update={"num_layers": 3}), 4, "fp32", learning_rate=2e-3)
    with torch.device("meta"):
        model = model_class(task.model)
    LeavesOut.calls = 0
    strategy, curve = build(task, name, {}, detect(), model), Curve()
    for loss, norm, gradients in train_steps(strategy, task, detect(), range(4)):
        curve.losses.append(loss)
        curve.grad_norms.append(norm)
        curve.gradients = curve.gradients or gradients
    strategy.close()
    return curve


@pytest.mark.parametrize("model_class", [LeavesOut, Looped])
def test_blocks_that_run_never_or_twice(
    ranks: Callable[..., list[Any]], model_class: type[Decoder]
) -> None:
    [alone] = ranks(trained_as, 1, model_class, "single")
    for curve in ranks(trained_as, 2, model_class, "fsdp"):
        assert worst_difference(curve, alone) < 1e-5


def test_more_ranks_than_rows(ranks: Callable[..., list[Any]]) -> None:
    """A parameter with fewer rows than ranks leaves some of them with nothing of it."""
    assert ranks(elements_of_narrow, 4) == [3, 3, 0, 0]


class Narrow(Decoder):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.narrow = nn.Parameter(torch.ones(2, 3))

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return super().forward(*arguments, **keywords) + self.narrow.square().sum()


def elements_of_narrow() -> int:
    world = detect()
    task = Task(MODEL, 1, "fp32", micro_batch=2)
    with torch.device("meta"):
        model = Narrow(MODEL)
    strategy = build(task, "fsdp", {}, world, model)
    list(train_steps(strategy, task, world, range(1)))
    pieces = [piece for piece in strategy.state() if piece.name.endswith("narrow.exp_avg")]
    return sum(piece.tensor.numel() for piece in pieces)
