"""Configs of `parallel` in the comparison: their rows and refusals, and meshes that are tried."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from scalellm.cli import main
from scalellm.config import Config, parse_config
from scalellm.errors import ConfigError
from scalellm.plan._ranks import batches_of, data_world_size
from scalellm.plan.candidates import meshes
from scalellm.plan.devices import find_device
from scalellm.plan.speed import StepTime, step_time
from scalellm.plan.traffic import set_up
from scalellm.plan_command import plan

MODEL = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "vocab_size": 256, "seq_len": 64}
DEVICE = find_device("a100-40g")


def config(mesh: dict[str, int], samples: int = 8, model: Any = None, **options: Any) -> Config:
    return parse_config(
        {
            "model": {**MODEL, **(model or {})},
            "strategy": {"name": "parallel", "mesh": mesh, **options},
            "train": {"global_batch_size": samples, "micro_batch_size": 1, "precision": "bf16"},
        }
    )


def test_ranks_that_share_a_model_share_its_rows() -> None:
    of = config({"tp": 2, "fsdp": 2})
    assert data_world_size(of, 8) == 4  # two replicas of two shards
    assert batches_of(of, 8).grad_accumulation == 2
    assert set_up(of, 8).batches == batches_of(of, 8)


def test_what_training_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"do not divide model\.num_heads=4"):
        set_up(config({"tp": 3}), 3)
    with pytest.raises(ConfigError, match="at least as many"):
        set_up(config({"pp": 4}, samples=2), 4)


def time_of(mesh: dict[str, int], world_size: int, **options: Any) -> StepTime:
    shape = {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "seq_len": 1024}
    return step_time(config(mesh, 32, shape, **options), world_size, DEVICE)


def test_ranks_divide_the_products_and_a_pipeline_waits() -> None:
    one, four = time_of({}, 1), time_of({"tp": 2, "cp": 2}, 4)
    assert four.compute_s == pytest.approx(one.compute_s / 4)
    assert four.bubble_s == 0 and four.exposed_communication_s > 0
    staged = time_of({"pp": 4}, 4)
    # No stage has less than a quarter; the last has the output projection too.
    assert one.compute_s / 4 <= staged.compute_s < one.compute_s / 3
    busy_s = staged.compute_s + staged.memory_s + staged.launch_s
    assert staged.bubble_s == pytest.approx(busy_s * 3 / 32)  # (p - 1) / m of the work
    assert staged.total_s == pytest.approx(
        busy_s + staged.bubble_s + staged.exposed_communication_s + staged.optimizer_s
    )


def test_tensor_groups_are_faster_within_a_node() -> None:
    inside, across = time_of({"tp": 8}, 8), time_of({"tp": 16}, 16)
    assert across.exposed_communication_s > 1.5 * inside.exposed_communication_s


def test_meshes_stay_within_a_node_and_use_all_ranks() -> None:
    found = meshes(16, DEVICE, 32_768, "bf16")
    assert found["tp 8 x fsdp 2"]["mesh"] == {"tp": 8, "fsdp": 2}
    assert found["tp 8 x pp 2"]["mesh"] == {"tp": 8, "pp": 2}
    assert "cp 8 x fsdp 2" in found and "cp 8 x fsdp 2" not in meshes(16, DEVICE, 4096, "bf16")
    assert found["tp 8 x fsdp 2"]["param_dtype"] == "bf16"
    assert "param_dtype" not in found["tp 8 x pp 2"]  # which has no shards
    assert "param_dtype" not in meshes(16, DEVICE, 4096, "fp32")["tp 8 x fsdp 2"]
    assert all(options["mesh"].get("tp", 1) <= 8 for options in found.values())


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("strategy.mesh.tp=2", ""),
        ("strategy.mesh.cp=2 strategy.context=ulysses", ""),
        ("strategy.mesh.pp=2 train.micro_batch_size=1", ""),
        ("strategy.mesh.pp=2", "1f1b needs at least as many"),
        ("strategy.mesh.cp=2 model.seq_len=18", "model.seq_len=18 tokens are not a multiple"),
    ],
)
def test_a_plan_has_a_row_or_a_sentence(
    words: str, refusal: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "parallel.yaml"
    path.write_text(
        "model: {num_layers: 2, hidden_size: 32, num_heads: 2, vocab_size: 64, seq_len: 16}\n"
        "train: {global_batch_size: 4}\n"
        "strategy: {name: parallel}\n"
    )
    assert main(["plan", str(path), "--gpus", "2", "--device", "a100-40g", *words.split()]) == 0
    shown = capsys.readouterr().out
    given = next(line for line in shown.splitlines() if line.startswith("as given"))
    assert refusal in given if refusal else " yes " in given


def test_ranks_that_no_mesh_makes_are_refused_in_a_sentence(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "parallel.yaml"
    path.write_text("model: {vocab_size: 64}\nstrategy: {name: parallel, mesh: {tp: 3}}\n")
    with pytest.raises(ConfigError, match="do not make the 2 ranks of this run"):
        plan([str(path), "--gpus", "2", "--device", "a100-40g"])
