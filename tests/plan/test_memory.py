"""Estimates agree with dry runs, and move as they must where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm.config import Config, TrainConfig, parse_config
from scalellm.errors import ConfigError
from scalellm.model import Decoder, count_parameters
from scalellm.plan.activations import activations, spared_by_compiling
from scalellm.plan.dry_run import dry_run
from scalellm.plan.memory import estimate
from scalellm.strategies._transforms import apply_transforms

TINY = {"num_layers": 8, "hidden_size": 64, "num_heads": 4, "vocab_size": 300, "seq_len": 32}


def config(
    strategy: dict[str, Any],
    world_size: int,
    model: dict[str, Any] | None = None,
    accumulation: int = 1,
    **train: Any,
) -> Config:
    batch = {"global_batch_size": 2 * accumulation * world_size, "micro_batch_size": 2}
    shape = {**TINY, **(model or {})}
    return parse_config({"model": shape, "strategy": strategy, "train": {**batch, **train}})


FSDP = {"name": "fsdp"}
CASES: dict[str, tuple[Config, int]] = {
    "single": (config({"name": "single"}, 1), 1),
    "single-deep": (config({"name": "single"}, 1, {"num_layers": 17, "seq_len": 8}), 1),
    "ddp": (config({"name": "ddp"}, 4, accumulation=3), 4),
    "ddp-bf16-wire": (config({"name": "ddp", "compression": "bf16"}, 4), 4),
    "ddp-powersgd": (config({"name": "ddp", "compression": "powersgd"}, 4), 4),
    "accelerate": (config({"name": "accelerate"}, 4), 4),
    "fsdp": (config(FSDP, 4, {"vocab_size": 4000}), 4),
    "fsdp-keeps": (config({**FSDP, "reshard_after_forward": False}, 4, accumulation=2), 4),
    "fsdp-once": (config({**FSDP, "reduce_every_micro_batch": False}, 4, accumulation=3), 4),
    "hsdp": (config({**FSDP, "shard_ranks": 2}, 8, {"tie_embeddings": False}), 8),
    "fsdp-offload": (config({**FSDP, "cpu_offload": True}, 4), 4),
    "fsdp-bf16": (config({**FSDP, "param_dtype": "bf16"}, 4, precision="bf16"), 4),
    "fsdp-full": (config(FSDP, 64, activation_checkpointing="full"), 64),
    "fsdp-selective": (config(FSDP, 4, activation_checkpointing="selective"), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_an_estimate_agrees_with_the_dry_run(name: str) -> None:
    made, world_size = CASES[name]
    found, asked = estimate(made, world_size), dry_run(made, world_size).memory
    assert found.peak_bytes == pytest.approx(asked.peak_bytes, rel=0.02)
    assert found.host_bytes == pytest.approx(asked.host_bytes, rel=0.02)


def test_activations_are_linear_in_layers_and_rows() -> None:
    def kept_bytes(layers: int, rows: int) -> int:
        model = parse_config({"model": {**TINY, "num_layers": layers}}).model
        return activations(model, TrainConfig(), rows, 32)[0]

    corners = kept_bytes(9, 4) - kept_bytes(7, 4), kept_bytes(7, 4) - kept_bytes(5, 4)
    assert corners[0] == corners[1] > 0
    assert kept_bytes(9, 4) - kept_bytes(9, 3) == kept_bytes(9, 3) - kept_bytes(9, 2) > 0


def test_checkpointing_keeps_a_block_s_input_only() -> None:
    model = parse_config({"model": {**TINY, "num_layers": 9}}).model
    kept = {
        mode: activations(model, TrainConfig(activation_checkpointing=mode), 2, 32)[0]
        for mode in ("none", "selective", "alternate", "full")
    }
    fewer = model.model_copy(update={"num_layers": 8})
    without = activations(fewer, TrainConfig(activation_checkpointing="full"), 2, 32)[0]
    assert kept["full"] - without == 2 * 32 * 64 * 4
    assert kept["none"] > kept["selective"] > kept["alternate"] > kept["full"]
    # Of q, k, v, o, gate, up and down the second, fourth and sixth: 64, 64 and the MLP's features.
    features = 64 + 64 + model.mlp_size
    assert kept["selective"] - kept["alternate"] == 9 * 2 * 32 * features * 4


ZERO = {"name": "deepspeed", "bucket_mb": 1}


def test_zero_divides_more_with_each_stage() -> None:
    parameters = count_parameters(config(ZERO, 4).model)
    found = [estimate(config({**ZERO, "stage": stage}, 4), 4) for stage in range(4)]
    assert [m.parameters_bytes for m in found[:3]] == [4 * parameters] * 3
    assert found[3].parameters_bytes == pytest.approx(parameters, rel=1e-3)
    optimizer = [m.optimizer_bytes / parameters for m in found]
    assert optimizer == pytest.approx([8, 3, 3, 2], rel=1e-3)  # masters at 1 and 2
    assert found[2].gradients_bytes == pytest.approx(parameters, rel=1e-3)


def test_zero_in_bf16_holds_two_bytes_and_masters() -> None:
    made = config({**ZERO, "stage": 3}, 4, precision="bf16")
    memory, parameters = estimate(made, 4), count_parameters(made.model)
    assert memory.parameters_bytes == pytest.approx(parameters / 2, rel=1e-3)
    assert memory.optimizer_bytes == pytest.approx(3 * parameters, rel=1e-3)


def test_zero_offloads_to_the_host_of_a_gpu_and_nowhere_on_a_cpu() -> None:
    made = config({**ZERO, "stage": 2, "offload_optimizer": "cpu"}, 4)
    memory = estimate(made, 4)
    assert memory.optimizer_bytes == memory.gradients_bytes == 0
    assert memory.host_bytes >= 3 * count_parameters(made.model)
    assert estimate(made, 4, "cpu").host_bytes == 0


def test_an_update_on_the_host_takes_nothing_of_the_device() -> None:
    """One rank: flat fp32 gradients of the whole model are in the host's memory, not here."""
    made = config({**ZERO, "stage": 2, "offload_optimizer": "cpu"}, 1, precision="bf16")
    memory, parameters = estimate(made, 1), count_parameters(made.model)
    assert memory.parameters_bytes == 2 * parameters and memory.activations_bytes > 0
    here = estimate(config({**ZERO, "stage": 2}, 1, precision="bf16"), 1)
    assert memory.peak_bytes < here.peak_bytes - 12 * parameters


def test_stage_3_gathers_no_more_than_its_limits_allow(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(
        '{"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}'
    )
    shape = {"num_layers": 24}
    all_kept = estimate(config({**ZERO, "stage": 3}, 4, shape), 4)
    few_kept = estimate(config({**ZERO, "stage": 3, "config": str(own)}, 4, shape), 4)
    assert few_kept.buffers_bytes < all_kept.buffers_bytes


def test_a_70b_model_takes_seconds() -> None:
    shape = {"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8}
    shape |= {"intermediate_size": 28672, "vocab_size": 128256, "seq_len": 4096}
    made = config({**FSDP, "param_dtype": "bf16"}, 64, shape, precision="bf16")
    memory = estimate(made, 64)
    parameters = count_parameters(made.model)
    assert memory.parameters_bytes == pytest.approx(4 * parameters / 64, rel=1e-3)
    assert memory.optimizer_bytes == pytest.approx(8 * parameters / 64, rel=1e-3)


def test_a_model_without_a_vocabulary_has_no_size() -> None:
    with pytest.raises(ConfigError, match="vocab_size is null"):
        estimate(config({"name": "single"}, 1, {"vocab_size": None}), 1)


def test_a_strategy_of_one_s_own_is_taken_at_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "halved.py").write_text(
        "from scalellm.strategies import Sharding, Strategy\n"
        "class Halved(Strategy):\n"
        "    @classmethod\n"
        "    def sharding(cls, options, world, train):\n"
        "        return Sharding(optimizer=2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = config({"name": "planned.halved"}, 2)
    memory = estimate(made, 2)
    assert memory.optimizer_bytes == 4 * count_parameters(made.model) == memory.gradients_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "within"), [("none", 0.1), ("selective", 0.01), ("alternate", 0.01)]
)
def test_compiled_blocks_keep_as_much_as_is_said(precision: str, mode: str, within: float) -> None:
    shape = {"num_layers": 2, "hidden_size": 128, "num_heads": 4, "vocab_size": 300, "seq_len": 64}
    train = {"precision": precision, "activation_checkpointing": mode, "compile": True}
    made = parse_config({"model": {**shape, "attention": "sdpa"}, "train": train})
    kept = activations(made.model, made.train, 4, 64, "cpu")[0]
    said = kept - spared_by_compiling(made, 4, "cpu")
    assert kept_bytes(made) == pytest.approx(said, rel=within)


def kept_bytes(made: Config) -> int:
    """What a really compiled forward keeps for its backward, parameters left out."""
    torch._dynamo.reset()
    model = Decoder(made.model)
    apply_transforms(model, made.train)
    tokens = torch.zeros(4, made.model.seq_len, dtype=torch.long)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=made.train.precision == "bf16")
    with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, targets_BT=tokens)
    total = sum(kept.values())  # before they are freed, and their addresses taken again
    loss.backward()
    return total


def test_an_estimate_of_a_compiled_model_is_smaller() -> None:
    plain, compiled = (
        estimate(config(FSDP, 4, compile=compiles, activation_checkpointing="selective"), 4)
        for compiles in (False, True)
    )
    # The last product of each block, 64 features in fp32 of 2 x 32 tokens.
    assert plain.activations_bytes - compiled.activations_bytes == 8 * 2 * 32 * 64 * 4
    assert plain.temporary_bytes == compiled.temporary_bytes
