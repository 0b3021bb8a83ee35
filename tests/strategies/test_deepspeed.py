"""DeepSpeed: what is refused and why, the generated JSON, kernels, and its traps."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as tdist

from scalellm import strategies
from scalellm.config import BatchPlan, ModelConfig, StrategyConfig, TrainConfig, parse_config
from scalellm.dist import World, detect
from scalellm.errors import ConfigError
from scalellm.model import Decoder, count_parameters
from scalellm.parity import TOLERANCE, Curve, Task, build, run_curve, train_steps, worst_difference
from scalellm.reference import backend_json
from scalellm.strategies import _deepspeed_build, _deepspeed_config
from scalellm.train.optimizer import make_adamw

MODEL = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=61, seq_len=16
)

LARGER = ModelConfig(
    num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=2, vocab_size=1031, seq_len=16
)


def parsed(precision: str = "fp32", **options: Any) -> strategies.Options:
    config = StrategyConfig.model_validate({"name": "deepspeed", **options})
    train = TrainConfig.model_validate({"precision": precision})
    strategy = strategies.resolve("deepspeed")
    return strategies.parse_options(config, strategy, World(world_size=2), train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": 4}, r"strategy\.stage=4 is out of range: it must be at most 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "does nothing at strategy.stage=0"),
        ({"stage": 2, "offload_param": "cpu"}, "does nothing at strategy.stage=2"),
        ({"stage": 3, "offload_param": "nvme"}, "stores fp32 parameters in half precision"),
        ({"stage": 2, "offload_optimizer": "nvme"}, "writes nothing to disk at strategy.stage=2"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "needs strategy.nvme_path"),
        (
            {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/nowhere"},
            "nvme_path=/nowhere is not a folder",
        ),
        ({"config": "/nowhere.json"}, "strategy.config=/nowhere.json cannot be read: No such file"),
        ({"offload_optimizer": "disk"}, "strategy.offload_optimizer"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(**options)


@pytest.mark.parametrize(
    ("precision", "stage", "words"),
    [
        ("bf16", 0, "stage=0 with train.precision=bf16 diverges .* use strategy.stage=1"),
        ("fp64", 2, "fp64 is not offered with DeepSpeed"),
        ("fp16", 2, "fp16 is not offered with DeepSpeed"),
    ],
)
def test_precisions_that_are_refused(precision: str, stage: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(precision, stage=stage)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install deepspeed==0\.19\.8"):
        parsed()


def test_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.1+abc")
    with pytest.raises(
        ConfigError, match=r"deepspeed 0\.18\.1 is installed, .*deepspeed==0\.19\.8"
    ):
        parsed()


# -- the generated JSON -----------------------------------------------------------------------


def test_our_config_becomes_deepspeeds(tiny_values: dict[str, Any]) -> None:
    tiny_values["train"] |= {"precision": "bf16", "micro_batch_size": 2}
    tiny_values["strategy"] = {"name": "deepspeed", "stage": 3, "offload_optimizer": "cpu"}
    found = json.loads(backend_json(parse_config(tiny_values), World(world_size=2)))
    assert found["train_batch_size"] == 8
    assert found["gradient_accumulation_steps"] == 2
    assert found["bf16"]["enabled"] is True
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    tiny_values["strategy"] = {"name": "ddp"}
    with pytest.raises(ConfigError, match="has no DeepSpeed configuration"):
        backend_json(parse_config(tiny_values), World(world_size=2))


def test_a_json_of_the_users_own_is_merged_over_it(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"overlap_comm": true}, "prescale_gradients": false}')
    options = parsed(stage=2, config=str(own))
    plan = BatchPlan.of(8, 2, 2)
    assert isinstance(options, _deepspeed_config.DeepSpeedOptions)
    found = _deepspeed_config.make_config(options, TrainConfig(), plan)
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["stage"] == 2
    assert found["prescale_gradients"] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"zero_optimization": {"stage": 1}}',
            "sets 'zero_optimization.stage', .* strategy.stage",
        ),
        ('{"gradient_clipping": 1.0}', "said by train.grad_clip"),
        ('{"torch_autocast": {"enabled": true}}', "said by train.precision"),
        ('{"zero_optimization": {"cpu_offload": true}}', "said by strategy.offload_optimizer"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "checkpoints are not proven"),
        ('{"zero_optimization": null}', "not an object"),
        ("{broken", "is not JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_a_json_that_contradicts_or_is_none(text: str, words: str, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(text)
    with pytest.raises(ConfigError, match=words):
        parsed(config=str(own))


# -- what each rank holds -----------------------------------------------------------------------


def memory_of(options: dict[str, Any]) -> dict[str, int]:
    world = detect()
    task = Task(MODEL, 1, "fp32")
    strategy = build(task, "deepspeed", options, world)
    list(train_steps(strategy, task, world, range(1)))
    found = strategy.memory()
    strategy.close()
    return found


@pytest.mark.parametrize(
    ("stage", "bytes_a_parameter"),
    # fp32: weights 4, gradients 4, moments 8; below stage 3 ZeRO keeps a master of its part too.
    [(1, 4 + 4 + 12 / 2), (2, 4 + 4 / 2 + 12 / 2), (3, 16 / 2)],
)
def test_each_rank_holds_its_part(
    ranks: Callable[..., list[Any]], stage: int, bytes_a_parameter: float
) -> None:
    options = {"stage": stage, **({"persistent_elements": 0} if stage == 3 else {})}
    for memory in ranks(memory_of, 2, options):
        theory_bytes = bytes_a_parameter * count_parameters(MODEL)
        assert sum(memory.values()) == pytest.approx(theory_bytes, rel=0.1)


# -- traps ------------------------------------------------------------------------------------


def checkpointed_curve(mode: str) -> Curve:
    class Checkpointed(Task):
        def train_config(self) -> TrainConfig:
            keys = {"activation_checkpointing": mode}
            return super().train_config().model_copy(update=keys)

    options = {"stage": 3, "persistent_elements": 0}
    task = Checkpointed(MODEL, 4, "fp32", micro_batch=2)
    return run_curve(task, "deepspeed", options, detect())


def curve_and_collectives(options: dict[str, Any]) -> tuple[Curve, list[str]]:
    asked: list[str] = []

    def noted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("deepspeed."):
                asked.append(name)
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor"):
            patch.setattr(tdist, name, noted(name, getattr(tdist, name)))
        curve = run_curve(Task(MODEL, 4, "fp32", micro_batch=2), "deepspeed", options, detect())
    return curve, asked


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_alone_it_hands_nothing_to_gloo(
    ranks: Callable[..., list[tuple[Curve, list[str]]]], stage: int
) -> None:
    options = {"stage": stage}
    [(curve, asked)] = ranks(curve_and_collectives, 1, options)
    assert asked == []
    wanted = run_curve(Task(MODEL, 4, "fp32", micro_batch=2), "single", {}, World())
    assert worst_difference(curve, wanted) < TOLERANCE["fp32"]
    assert {"all_reduce"} <= set(ranks(curve_and_collectives, 2, options)[0][1])


def left_by_a_failed_setup() -> object:
    """What an engine alone is told is nothing for a later one in this process with more ranks."""
    train, options = TrainConfig(global_batch_size=2), parsed(stage=1)
    strategy = strategies.resolve("deepspeed")(detect(), train, options)

    def make(_: Any) -> torch.optim.Optimizer:
        raise MemoryError

    with pytest.raises(MemoryError):
        strategy.setup(Decoder(MODEL), make)
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    assert comm.cdb is not None
    strategy.close()
    return comm.cdb


def test_a_failed_setup_leaves_no_backend(ranks: Callable[..., list[object]]) -> None:
    assert ranks(left_by_a_failed_setup, 1) == [None]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_with_divided_parameters(
    ranks: Callable[..., list[Curve]], mode: str
) -> None:
    # The same micro-batches: on this task fp32 itself moves the norm by 1e-5 between two splits.
    wanted = run_curve(Task(MODEL, 4, "fp32", micro_batch=2), "single", {}, World())
    for curve in ranks(checkpointed_curve, 2, mode):
        assert worst_difference(curve, wanted) < TOLERANCE["fp32"]


def decayed_elements() -> list[tuple[float, int]]:
    """(weight decay, elements) of the optimizer's groups as DeepSpeed was given them."""
    seen = []

    def recording(parameters: Any, train: TrainConfig) -> torch.optim.Optimizer:
        optimizer = make_adamw(parameters, train)
        for group in optimizer.param_groups:
            numel = sum(p.numel() for p in group["params"])
            seen.append((group["weight_decay"], numel))
        return optimizer

    task = Task(MODEL, 1, "fp32")
    train = task.train_config()
    strategy_class = strategies.resolve("deepspeed")
    config = StrategyConfig.model_validate({"name": "deepspeed", "stage": 3})
    world = detect()
    options = strategies.parse_options(config, strategy_class, world, train)
    strategy = strategy_class(world, train, options)
    with torch.device("meta"):
        model = Decoder(MODEL)
    strategy.setup(model, lambda parameters: recording(parameters, train))
    strategy.close()
    return seen


def test_divided_matrices_still_decay(ranks: Callable[..., list[Any]]) -> None:
    """Stage 3 leaves empty vectors in place of matrices; vectors do not decay."""
    norms = MODEL.hidden_size * (2 * MODEL.num_layers + 1)
    for groups in ranks(decayed_elements, 2):
        assert groups == [(0.1, count_parameters(MODEL) - norms), (0.0, norms)]


def bf16_losses(name: str, options: dict[str, Any], precision: str) -> list[float]:
    world = detect()
    task = Task(MODEL, 6, precision, micro_batch=4)
    strategy = build(task, name, options, world)
    losses = [loss for loss, _, _ in train_steps(strategy, task, world, range(6))]
    pieces = {piece.tensor.dtype for piece in strategy.state()}
    assert pieces <= {torch.float32}  # masters, not the rounded weights
    strategy.close()
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_alike(ranks: Callable[..., list[Any]], stage: int) -> None:
    [exact, _] = ranks(bf16_losses, 2, "ddp", {}, "fp32")
    [found, _] = ranks(bf16_losses, 2, "deepspeed", {"stage": stage}, "bf16")
    assert found == pytest.approx(exact, rel=2e-2)


# -- kernels ----------------------------------------------------------------------------------


def test_the_lock_of_a_killed_build_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would wait for it without end and without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _deepspeed_build.import_deepspeed(World(), join=False)
    folder = _deepspeed_build._extension_folder(_deepspeed_build.CPU_ADAM)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    with pytest.raises(ConfigError, match=r"left its lock .*cpu_adam/lock, .*delete that file"):
        _deepspeed_build.prepare(_deepspeed_build.CPU_ADAM, World())


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _deepspeed_build.import_deepspeed(World(), join=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.* strategy\.cpu_adam=torch"):
        _deepspeed_build.prepare(_deepspeed_build.CPU_ADAM, World())


def offloaded_curve(options: dict[str, Any]) -> Curve:
    return run_curve(Task(MODEL, 6, "fp32", micro_batch=2), "deepspeed", options, detect())


@pytest.mark.slow
@pytest.mark.timeout(900)  # in a new installation DeepSpeed compiles for minutes
@pytest.mark.parametrize("stage", [2, 3])
def test_the_cpu_optimizer(ranks: Callable[..., list[Curve]], stage: int) -> None:
    """The real DeepSpeedCPUAdam; the first use on a machine compiles it."""
    os.environ.setdefault("MAX_JOBS", "2")
    _deepspeed_build.import_deepspeed(World(), join=False)
    _deepspeed_build.prepare(_deepspeed_build.CPU_ADAM, World())
    wanted = run_curve(Task(MODEL, 6, "fp32", micro_batch=2), "single", {}, World())
    options = {"stage": stage, "offload_optimizer": "cpu"}
    for curve in ranks(offloaded_curve, 2, options):
        assert worst_difference(curve, wanted) < TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # in a new installation DeepSpeed compiles for minutes
def test_the_optimizer_on_a_disk(ranks: Callable[..., list[Curve]], tmp_path: Path) -> None:
    _deepspeed_build.import_deepspeed(World(), join=False)
    try:
        _deepspeed_build.prepare(_deepspeed_build.ASYNC_IO, World())
    except ConfigError as error:
        assert "needs the library libaio" in str(error)
        pytest.skip("this machine has no libaio")
    # Smaller optimizer states are not worth a file to DeepSpeed, and stay in memory.
    task = Task(LARGER, 4, "fp32", micro_batch=2, learning_rate=1e-3)
    saves = tmp_path / "saves"
    wanted = run_curve(task, "single", {}, World(), save=saves / "single")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = {"stage": 3, "offload_optimizer": "nvme", "nvme_path": str(disk)}
    options |= {"cpu_adam": "torch", "persistent_elements": 0}
    for curve in ranks(saved_and_resumed, 2, task, options, saves):
        assert worst_difference(curve, wanted) < TOLERANCE["fp32"]
    assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) > 1 << 20


def saved_and_resumed(task: Task, options: dict[str, Any], saves: Path) -> Curve:
    """A whole run that saves on the way; the second halves of two resumed ones must be its own."""
    world = detect()
    whole = run_curve(task, "deepspeed", options, world, save=saves / "disk")
    for start in ("disk", "single"):
        half = run_curve(task, "deepspeed", options, world, load=saves / start)
        assert half.losses == pytest.approx(whole.losses[2:], rel=1e-6)
    return whole
