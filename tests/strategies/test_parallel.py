"""Kinds of parallelism together: what each rank holds, what is refused, and what stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.transformed import transformed_curve
from torch import Tensor, nn

from scalellm.config import ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.model import Decoder, count_parameters
from scalellm.parity import VARIANTS, Curve, Task, build, check_task, run_curve, train_steps
from scalellm.parity import worst_difference as worst
from scalellm.strategies import DataRank
from scalellm.strategies._mesh import MeshOptions, place_of, sizes
from scalellm.strategies.parallel import Parallel, ParallelOptions

MODEL = ModelConfig(
    num_layers=5, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=24
)
OTHER = MODEL.model_copy(
    update={"positions": "learned", "norm": "layernorm", "mlp": "gelu", "norm_position": "post"}
)
# What these save is saved by the others too.
SLOW = ["tp", "cp", "pp-fsdp", "pp-zero-bubble"]
LABELS = [label for label, variant in VARIANTS.items() if variant.name == "parallel"]


def curve(label: str, model: ModelConfig, **paths: Path) -> Curve:
    variant = VARIANTS[label]
    task = Task(model, 4, "fp64", micro_batch=1)
    return run_curve(task, variant.name, variant.options, detect(), **paths)


def least_ranks(label: str) -> int:
    return min(VARIANTS[label].worlds)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Curve]:
    return {"plain": curve("single", MODEL), "other": curve("single", OTHER)}


@pytest.mark.parametrize("label", LABELS)
def test_the_same_curve_as_one_process(
    ranks: Callable[..., list[Curve]], wanted: dict[str, Curve], label: str
) -> None:
    for found in ranks(curve, least_ranks(label), label, MODEL):
        assert worst(found, wanted["plain"]) < 1e-11


def mixed_curve(schedule: str) -> Curve:
    options = {"mesh": {"pp": 2, "tp": 2}, "schedule": schedule}
    return run_curve(Task(MODEL, 3, "fp64", micro_batch=2), "parallel", options, detect())


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero_bubble"])
def test_divided_tokens_travel_in_every_schedule(
    ranks: Callable[..., list[Curve]], schedule: str
) -> None:
    """Two rows a micro-batch: of one, a transposed view is contiguous too."""
    alone = run_curve(Task(MODEL, 3, "fp64", micro_batch=2), "single", {}, World())
    for found in ranks(mixed_curve, 4, schedule):
        assert worst(found, alone) < 1e-11


def few_words() -> Curve:
    model = MODEL.model_copy(update={"vocab_size": 5})
    return run_curve(Task(model, 2, "fp64"), "parallel", {"mesh": {"tp": 2, "dp": 2}}, detect())


def test_fewer_words_than_would_fill_equal_parts(ranks: Callable[..., list[Curve]]) -> None:
    alone = run_curve(
        Task(MODEL.model_copy(update={"vocab_size": 5}), 2, "fp64"), "single", {}, World()
    )
    for found in ranks(few_words, 4):
        assert worst(found, alone) < 1e-11


@pytest.mark.parametrize("label", ["tp", "tp-whole-rows", "cp", "pp", "pp-tp"])
def test_other_decoders(
    ranks: Callable[..., list[Curve]], wanted: dict[str, Curve], label: str
) -> None:
    """Learned positions, LayerNorm, GELU and norms behind the sums."""
    for found in ranks(curve, least_ranks(label), label, OTHER):
        assert worst(found, wanted["other"]) < 1e-11


def biased_curve(label: str) -> Curve:
    """Without the gradients: a key's bias has none, and what rounding leaves of it differs."""
    found = curve(label, OTHER.model_copy(update={"bias": True, "tie_embeddings": False}))
    found.gradients = {}
    return found


@pytest.mark.parametrize("label", ["tp", "tp-whole-rows", "pp-tp"])
def test_a_bias_is_added_once(ranks: Callable[..., list[Curve]], label: str) -> None:
    alone = biased_curve("single")
    for found in ranks(biased_curve, least_ranks(label), label):
        assert worst(found, alone) < 1e-11


@pytest.mark.parametrize(
    "saved_in",
    [
        "pp",
        "tp-fsdp",
        *(pytest.param(label, marks=pytest.mark.slow) for label in SLOW),
    ],
)
def test_a_checkpoint_of_it_is_any_strategys(
    ranks: Callable[..., list[Curve]], wanted: dict[str, Curve], saved_in: str, tmp_path: Path
) -> None:
    """The optimizer's state too: half of the steps come after it."""
    path = tmp_path / "checkpoint"
    size = least_ranks(saved_in)
    ranks(save, size, saved_in, path)
    rest = wanted["plain"].losses[2:]
    for resumed_in, world_size in (("single", 1), ("fsdp", 2), (saved_in, size)):
        for found in ranks(load, world_size, resumed_in, path):
            assert found == pytest.approx(rest, rel=1e-11)


def save(label: str, path: Path) -> None:
    curve(label, MODEL, save=path)


def load(label: str, path: Path) -> list[float]:
    return curve(label, MODEL, load=path).losses


@pytest.mark.parametrize("saved_in", ["ddp", "fsdp"])
@pytest.mark.parametrize("label", ["tp-fsdp", "pp-tp"])
def test_any_strategys_checkpoint_is_its(
    ranks: Callable[..., list[Curve]],
    wanted: dict[str, Curve],
    saved_in: str,
    label: str,
    tmp_path: Path,
) -> None:
    ranks(save, 2, saved_in, tmp_path / "checkpoint")
    for found in ranks(load, 4, label, tmp_path / "checkpoint"):
        assert found == pytest.approx(wanted["plain"].losses[2:], rel=1e-11)


# -- what each rank holds -----------------------------------------------------------------------


def held(options: dict[str, Any]) -> dict[str, int]:
    world = detect()
    task = Task(MODEL, 1, "fp32", micro_batch=1)
    strategy = build(task, "parallel", options, world)
    list(train_steps(strategy, task, world, range(1)))
    strategy.close()
    return strategy.memory()


def test_tp_divides_every_matrix(ranks: Callable[..., list[Any]]) -> None:
    """All but the norms, and 61 words are 31 and 30."""
    norms = (2 * 5 + 1) * 48
    matrices = count_parameters(MODEL) - norms - 61 * 48
    for rank, memory in enumerate(ranks(held, 2, {"mesh": {"tp": 2}})):
        elements = matrices // 2 + norms + (31, 30)[rank] * 48
        assert memory["parameters_bytes"] == memory["gradients_bytes"] == 4 * elements
        counters = memory["optimizer_bytes"] - 8 * elements
        assert counters == 4 * (5 * 9 + 2)  # a step of each of the parameters


@pytest.mark.parametrize(("shard_ranks", "world_size"), [(1, 2), (2, 4)])
def test_pp_divides_the_layers(
    ranks: Callable[..., list[Any]], shard_ranks: int, world_size: int
) -> None:
    """Both ends hold the tied embedding; the last, which projects too, has fewer layers."""
    embedding = 61 * 48
    layer = (count_parameters(MODEL) - embedding - 48) // 5
    stages = [3 * layer + embedding, 2 * layer + embedding + 48]
    mesh = {"pp": 2, "fsdp": shard_ranks}
    found = ranks(held, world_size, {"mesh": mesh})
    for stage, memories in enumerate((found[: world_size // 2], found[world_size // 2 :])):
        elements = sum(memory["parameters_bytes"] for memory in memories) // 4
        assert elements == stages[stage]
        assert all(m["parameters_bytes"] < 4.2 * elements / shard_ranks for m in memories)


# -- on which rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{"tp": 2, "fsdp": 2}, {"pp": 2}, {"cp": 2, "tp": 2}])
def test_ranks_that_work_together_read_the_same_rows(mesh: dict[str, int]) -> None:
    options = ParallelOptions(mesh=MeshOptions(**mesh))
    size = sizes(options.mesh, 8)
    rows: dict[int, list[DataRank]] = {}
    for rank in range(8):
        found = Parallel.data_rank(options, World(rank=rank, world_size=8))
        assert found.world_size == size["dp"] * size["fsdp"]
        rows.setdefault(found.rank, []).append(found)
    assert sorted(rows) == list(range(size["dp"] * size["fsdp"]))
    for together in rows.values():
        assert sum(one.counts for one in together) == 1
        assert len(together) == size["pp"] * size["cp"] * size["tp"]


def test_the_ranks_that_divide_matrices_are_neighbours() -> None:
    size = {"pp": 2, "dp": 1, "fsdp": 2, "cp": 1, "tp": 2}
    places = [place_of(rank, size) for rank in range(8)]
    assert [place["tp"] for place in places] == [0, 1] * 4
    assert [place["pp"] for place in places] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("mesh", "wanted"), [({"tp": 2}, [0, 0, 1, 1]), ({"cp": 2}, [0, 1, 2, 3])])
def test_dropout_is_the_same_where_matrices_are_divided(
    mesh: dict[str, int], wanted: list[int]
) -> None:
    options = ParallelOptions(mesh=MeshOptions(**mesh))
    train = TrainConfig()
    worlds = [World(rank=rank, world_size=4) for rank in range(4)]
    assert [Parallel(world, train, options).dropout_rank for world in worlds] == wanted


# -- transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["tp", "pp", "tp-fsdp"])
@pytest.mark.parametrize(
    "changes",
    [{"activation_checkpointing": "full"}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_blocks_that_are_computed_twice(
    ranks: Callable[..., list[Curve]],
    label: str,
    changes: dict[str, Any],
) -> None:
    variant = VARIANTS[label]
    alone = transformed_curve(MODEL, "single", {}, {})
    arguments = (MODEL, variant.name, variant.options, changes)
    for found in ranks(transformed_curve, least_ranks(label), *arguments):
        assert worst(found, alone) < 1e-11


# -- refused ------------------------------------------------------------------------------------


def check(
    options: dict[str, Any], world_size: int, model: ModelConfig = MODEL, precision: str = "fp32"
) -> None:
    config = StrategyConfig.model_validate({"name": "parallel", **options})
    check_task(Task(model, 1, precision, micro_batch=1), config, World(world_size=world_size))


def mistakes() -> Iterator[tuple[dict[str, Any], int, dict[str, Any], str]]:
    yield {"mesh": {"tp": 3}}, 4, {}, "tp 3 .* = 3 ranks do not make the 4 ranks .* start 3 ranks"
    yield {"mesh": {"dp": 4, "tp": 2}}, 4, {}, r"= 8 ranks .* or set strategy\.mesh\.dp=2"
    yield {"mesh": {"tp": 4}}, 4, {}, r"tp=4 .* model\.num_kv_heads=2 heads evenly; use tp=2"
    yield {"mesh": {"tp": 2}}, 2, {"seq_len": 23}, r"seq_len=23 tokens is no multiple .* use 24"
    yield {"mesh": {"tp": 2}}, 2, {"loss_chunk_tokens": 8}, r"loss_chunk_tokens=8 .* set it to 0"
    yield {"mesh": {"cp": 2}}, 2, {"seq_len": 22}, r"seq_len=22 tokens .* 4 chunks .*=20 or 24"
    yield {"mesh": {"pp": 2}, "stages_per_rank": 2}, 2, {}, "stages_per_rank=2 .* leave it out"
    yield {"mesh": {"tp": 2}, "schedule": "gpipe"}, 2, {}, "schedule=gpipe .* leave it out"
    yield {"mesh": {"tp": 2}, "context": "ulysses"}, 2, {}, "context=ulysses .* leave it out"
    yield {"mesh": {"tp": 2}, "param_dtype": "bf16"}, 2, {}, r"mesh\.fsdp of 2 .* leave it out"
    yield {"mesh": {"pp": 8}}, 8, {}, r"8 stages .* model\.num_layers=5"
    yield {"mesh": {"tpp": 2}}, 2, {}, r"unknown key strategy\.mesh\.tpp; did you mean 'tp'"


@pytest.mark.parametrize(("options", "world_size", "model", "sentence"), list(mistakes()))
def test_what_does_not_go_together(
    options: dict[str, Any], world_size: int, model: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(options, world_size, MODEL.model_copy(update=model))


class Own(Decoder):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return super().forward(*arguments, **keywords) * 2


def own_forward(options: dict[str, Any]) -> str:
    with torch.device("meta"):
        model = Own(MODEL)
    try:
        build(Task(MODEL, 1, "fp32", micro_batch=1), "parallel", options, detect(), model)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("dim", ["pp", "cp"])
def test_a_decoder_with_a_forward_of_its_own_is_not_cut(
    ranks: Callable[..., list[str]], dim: str
) -> None:
    for sentence in ranks(own_forward, 2, {"mesh": {dim: 2}}):
        assert "Own has a forward of its own" in sentence


# -- frozen -------------------------------------------------------------------------------------


def frozen_curve(label: str) -> Curve:
    variant = VARIANTS[label]
    task = Task(MODEL, 4, "fp64", micro_batch=1)
    with torch.device("meta"):
        model = Decoder(MODEL)
    for name in ("embed_tokens", "layers.1.mlp.up_proj", "layers.4.input_layernorm", "norm"):
        model.get_parameter(f"{name}.weight").requires_grad_(False)
    world = detect()
    strategy = build(task, variant.name, variant.options, world, model)
    found = Curve()
    for loss, grad_norm, gradients in train_steps(strategy, task, world, range(4)):
        found.losses.append(loss)
        found.grad_norms.append(grad_norm)
        found.gradients = found.gradients or gradients
    strategy.close()
    return found


@pytest.mark.parametrize("label", ["tp", "cp", "pp", "pp-interleaved", "pp-fsdp"])
def test_frozen_parameters(ranks: Callable[..., list[Curve]], label: str) -> None:
    alone = frozen_curve("single")
    assert len(alone.gradients) == 5 * 9 - 2
    for found in ranks(frozen_curve, least_ranks(label), label):
        assert worst(found, alone) < 1e-11


# -- half precision -----------------------------------------------------------------------------


def first_loss(label: str, precision: str) -> float:
    variant = VARIANTS[label]
    task = Task(MODEL, 1, precision, micro_batch=1)
    return run_curve(task, variant.name, variant.options, detect()).losses[0]


@pytest.mark.parametrize("label", ["tp", "cp", "pp", "pp-fsdp"])
def test_autocast_reaches_every_part(ranks: Callable[..., list[float]], label: str) -> None:
    """A part that computed in fp32 would have its loss, to the last digits."""
    exact, half = first_loss("single", "fp32"), first_loss("single", "bf16")
    assert abs(half - exact) > 1e-5
    for found in ranks(first_loss, least_ranks(label), label, "bf16"):
        assert abs(found - exact) > 1e-5
        assert found == pytest.approx(half, abs=4 * abs(half - exact) + 1e-4)


HALF = {"param_dtype": "bf16", "reduce_dtype": "fp32"}


def wide_norms(norm: Any) -> Any:
    """A GPU's rule: under autocast a norm computes, and gives, fp32 (a CPU's gives what it got)."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = norm(self, x)
        return result.float() if torch.is_autocast_enabled("cpu") else result

    return forward


def first_step(
    name: str, options: dict[str, Any], precision: str, model: ModelConfig
) -> tuple[float, dict[str, Tensor]]:
    world, task = detect(), Task(model, 1, precision, micro_batch=1)
    for kind in (nn.RMSNorm, nn.LayerNorm):
        kind.forward = wide_norms(kind.forward)  # type: ignore[method-assign]
    strategy = build(task, name, options, world)
    [(loss, _, gradients)] = train_steps(strategy, task, world, range(1))
    assert all(p.dtype == torch.float32 for _, p in strategy.named_parameters())
    strategy.close()
    return loss, gradients


def far_off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    both = [(found[name].flatten(), tensor.flatten()) for name, tensor in wanted.items()]
    difference = torch.cat([one - other for one, other in both])
    return float(difference.norm() / torch.cat([other for _, other in both]).norm())


@pytest.mark.parametrize("model", [MODEL, OTHER], ids=["plain", "other"])
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": {"tp": 2, "fsdp": 2}},
        {"mesh": {"cp": 2, "fsdp": 2}},
        {"mesh": {"pp": 2, "fsdp": 2}, "schedule": "zero_bubble"},
    ],
    ids=["tp", "cp", "pp"],
)
def test_parameters_gathered_in_bf16(
    ranks: Callable[..., list[Any]], options: dict[str, Any], model: ModelConfig
) -> None:
    """Half the bytes on the wire, and a residual stream of bf16, give a gradient as near."""
    wanted = ranks(first_step, 1, "single", {}, "fp32", model)[0]
    [wide, *_] = ranks(first_step, 4, "parallel", options, "bf16", model)
    for loss, gradients in ranks(first_step, 4, "parallel", {**options, **HALF}, "bf16", model):
        assert loss == pytest.approx(wanted[0], rel=1e-4) and loss != wide[0]
        assert far_off(gradients, wanted[1]) < 0.02


def test_precisions_that_do_not_go_together() -> None:
    mesh = {"mesh": {"fsdp": 2}}
    with pytest.raises(ConfigError, match=r"train\.precision=fp64 forbids"):
        check({**mesh, **HALF}, 2, precision="fp64")
    with pytest.raises(ConfigError, match=r"two kinds of half .* use strategy\.param_dtype=fp16"):
        check({**mesh, **HALF}, 2, precision="fp16")
    with pytest.raises(ConfigError, match=r"only train\.precision=fp16 does"):
        check({**mesh, "param_dtype": "fp16"}, 2)


def half_curve(options: dict[str, Any], paths: dict[str, Path]) -> list[float]:
    task = Task(MODEL, 4, "bf16", micro_batch=1)
    return run_curve(task, "parallel", {**options, **HALF}, detect(), **paths).losses


@pytest.mark.parametrize("dim", ["tp", "pp"])
def test_a_resumed_run_gathered_in_bf16_has_the_same_digits(
    ranks: Callable[..., list[list[float]]], dim: str, tmp_path: Path
) -> None:
    """What is saved are the shards, not what is gathered of them."""
    options, path = {"mesh": {dim: 2, "fsdp": 2}}, tmp_path / "checkpoint"
    [whole, *_] = ranks(half_curve, 4, options, {"save": path})
    for rest in ranks(half_curve, 4, options, {"load": path}):
        assert rest == whole[2:]
