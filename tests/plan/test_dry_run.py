"""A dry run is the real step: same bytes, the strategies' own collectives, nothing left behind."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty as original_chunks

from scalellm.batches import Batch
from scalellm.config import Config, parse_config
from scalellm.dist import World, detect
from scalellm.errors import UserError
from scalellm.model import Decoder, count_parameters
from scalellm.parity import TOLERANCE, Curve, Task, run_curve, worst_difference
from scalellm.plan import dry_run as module
from scalellm.plan._fakes import _Chunks
from scalellm.plan.dry_run import dry_run
from scalellm.plan.live import LiveBytes
from scalellm.strategies.base import Options, Strategy
from scalellm.train.optimizer import make_adamw

ROWS = 2


def config(
    strategy: dict[str, Any],
    world_size: int = 1,
    accumulation: int = 1,
    model: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    shape = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 256, "seq_len": 32}
    batch = {
        "global_batch_size": ROWS * accumulation * world_size,
        "micro_batch_size": ROWS,
    }
    values = {
        "model": {**shape, **(model or {})},
        "strategy": strategy,
        "train": {**batch, **train},
    }
    return parse_config(values)


def real_peak_bytes(made: Config) -> int:
    """The same count of the same step on tensors with numbers in them."""
    strategy = Strategy(World(), made.train, Options())
    live = LiveBytes()
    with torch.device("meta"):
        model = Decoder(made.model)
    strategy.setup(model, functools.partial(make_adamw, train=made.train))
    live.call("parameters", (p for _, p in strategy.named_parameters()))
    with live:
        for _ in range(2):
            live.mark("step")
            tokens = torch.zeros(ROWS, made.model.seq_len + 1, dtype=torch.long)
            batch = Batch(tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:])
            with strategy.micro_step(True):
                strategy.backward(strategy.forward(batch), 1)
            strategy.step(1e-3)
    start, [step] = live.segments("step")
    return sum(start.values()) + sum(step.peak.values())


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, {}),
        ({}, {"activation_checkpointing": "full"}),
        ({}, {"activation_checkpointing": "selective"}),
        ({"attention": "explicit", "dropout": 0.1}, {"precision": "bf16"}),
        ({"loss_chunk_tokens": 16, "tie_embeddings": False, "num_kv_heads": 2}, {}),
        ({"norm": "layernorm", "mlp": "gelu", "positions": "learned", "bias": True}, {}),
    ],
)
def test_fake_tensors_need_what_real_ones_need(
    model: dict[str, Any], train: dict[str, Any]
) -> None:
    made = config({"name": "single"}, model=model, **train)
    assert dry_run(made, 1, "cpu").memory.peak_bytes == pytest.approx(
        real_peak_bytes(made), rel=2e-3
    )


def test_states_are_sixteen_bytes_a_parameter() -> None:
    made = config({"name": "ddp"}, world_size=4)
    memory, parameters = dry_run(made, 4).memory, count_parameters(made.model)
    assert memory.parameters_bytes == memory.gradients_bytes == 4 * parameters
    assert memory.optimizer_bytes == pytest.approx(8 * parameters, rel=1e-3)
    assert memory.peak_bytes > 16 * parameters + memory.activations_bytes


def test_ddp_reduces_each_gradient_once_whatever_the_accumulation() -> None:
    made = config({"name": "ddp"}, world_size=4, accumulation=3)
    [reduced] = dry_run(made, 4).collectives
    assert (reduced.kind, reduced.payload_bytes) == ("all_reduce", 4 * count_parameters(made.model))


def test_a_divided_optimizer_is_gathered_after_the_update() -> None:
    made = config({"name": "ddp", "shard_optimizer": True}, world_size=4)
    found, parameters = dry_run(made, 4), count_parameters(made.model)
    reduced, gathered = sorted(found.collectives, key=lambda one: one.kind, reverse=True)
    assert (reduced.kind, reduced.payload_bytes) == ("all_reduce", 4 * parameters)
    assert gathered.kind == "all_gather"
    assert 4 * parameters <= gathered.payload_bytes < 4.1 * parameters  # rows padded to fours
    assert found.memory.optimizer_bytes == pytest.approx(2 * parameters, rel=2e-2)
    assert found.memory.parameters_bytes == found.memory.gradients_bytes == 4 * parameters


def test_accumulating_under_ddp_holds_gradients_beside_the_buckets() -> None:
    once, twice = (
        dry_run(config({"name": "ddp"}, world_size=2, accumulation=n), 2).memory for n in (1, 2)
    )
    assert twice.gradients_bytes == 2 * once.gradients_bytes


def test_fsdp_gathers_and_reduces_every_unit_of_many_ranks() -> None:
    made = config({"name": "fsdp"}, world_size=64)
    found = dry_run(made, 64)
    traffic = {one.kind: one for one in found.collectives}
    # 4 units: 3 blocks and the rest; each is gathered for the forward and for the backward.
    assert traffic["all_gather"].count == 8
    assert traffic["reduce_scatter"].count == 4
    assert traffic["all_gather"].payload_bytes == 2 * traffic["reduce_scatter"].payload_bytes
    assert found.memory.parameters_bytes < 1.1 * 4 * count_parameters(made.model) / 64


def test_fsdp_traffic_is_what_the_algorithm_says() -> None:
    made = config({"name": "fsdp"}, world_size=4, accumulation=5)
    whole_bytes = 4 * count_parameters(made.model)
    traffic = {one.kind: one.payload_bytes for one in dry_run(made, 4).collectives}
    assert traffic == {"all_gather": 5 * 2 * whole_bytes, "reduce_scatter": 5 * whole_bytes}


def test_hybrid_shards_reduce_over_their_replicas() -> None:
    made = config({"name": "fsdp", "shard_ranks": 2}, world_size=8)
    traffic = {one.kind: one.payload_bytes for one in dry_run(made, 8).collectives}
    assert traffic["all_reduce"] == 4 * count_parameters(made.model) / 2


def test_offloaded_states_lie_on_the_host() -> None:
    strategy = {"name": "fsdp", "cpu_offload": True}
    memory = dry_run(config(strategy, world_size=4), 4).memory
    there = dry_run(config({"name": "fsdp"}, world_size=4), 4).memory
    assert (memory.parameters_bytes, memory.optimizer_bytes) == (0, 0)
    assert memory.host_bytes >= there.parameters_bytes + there.optimizer_bytes
    on_cpu = dry_run(config(strategy, world_size=4), 4, "cpu").memory
    assert on_cpu.host_bytes == 0 < on_cpu.parameters_bytes


@pytest.mark.parametrize("name", ["deepspeed", "accelerate"])
def test_deepspeed_on_a_gpu_is_refused_in_one_sentence(name: str) -> None:
    options = {"backend": "deepspeed"} if name == "accelerate" else {}
    with pytest.raises(UserError, match="can run dry for a CPU only"):
        dry_run(config({"name": name, **options}, world_size=2), 2)


def test_nothing_is_left_behind_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Strategy, learning_rate: float) -> None:
        raise RuntimeError("in the middle")

    resize = torch.UntypedStorage.resize_
    monkeypatch.setattr(Strategy, "step", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        dry_run(config({"name": "fsdp"}, world_size=2), 2)
    assert torch.UntypedStorage.resize_ is resize
    assert not tdist.is_initialized()
    assert not isinstance(torch.ones(1), FakeTensor)


def test_a_rank_of_a_group_does_not_run_dry(tmp_path: Any) -> None:
    store = tdist.FileStore(str(tmp_path / "store"), 1)
    tdist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        with pytest.raises(UserError, match="process of its own"):
            dry_run(config({"name": "single"}), 1)
    finally:
        tdist.destroy_process_group()


def test_the_middle_block_stands_for_the_others() -> None:
    few, many = (
        config({"name": "fsdp"}, world_size=2, accumulation=2, model={"num_layers": n})
        for n in (module.FEW_LAYERS, 9)
    )
    trace = module.stretched(module.record(few, 2, "cuda"), 9)
    found = dry_run(many, 2)
    assert module.summarize(trace) == (found.memory, found.collectives)


def test_the_shards_of_other_ranks_are_spared_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [
        # 7 ranks: the last ones have shards that are smaller, and none at all of small tensors.
        config(
            {"name": "fsdp", "param_dtype": "bf16"}, 7, 2, {"vocab_size": 301}, precision="bf16"
        ),
        config({"name": "fsdp", "shard_ranks": 3, "reshard_after_forward": False}, 6),
    ]
    sparing = [dry_run(one, world_size) for one, world_size in zip(made, (7, 6), strict=True)]
    monkeypatch.setattr("scalellm.plan._fakes._Chunks", original_chunks)
    for one, world_size, found in zip(made, (7, 6), sparing, strict=True):
        whole = dry_run(one, world_size)
        assert (whole.memory, whole.collectives) == (found.memory, found.collectives)


@pytest.mark.parametrize(("rows", "ranks"), [(8, 4), (7, 4), (2, 4), (1, 3), (5, 1)])
def test_chunks_are_those_that_torch_cuts(rows: int, ranks: int) -> None:
    whole = torch.arange(rows * 3).view(rows, 3)
    expected, chunks = original_chunks(whole, ranks, 0), _Chunks(whole, ranks, 0)
    assert len(chunks) == len(expected) == ranks
    for index in range(ranks):
        assert torch.equal(chunks[index], expected[index])
    with pytest.raises(IndexError):
        chunks[ranks]


LLAMA_8B = {
    "model": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "seq_len": 8192,
        "tie_embeddings": False,
    },
    "strategy": {"name": "fsdp", "param_dtype": "bf16", "reduce_dtype": "fp32"},
    "train": {
        "global_batch_size": 2048,
        "micro_batch_size": 1,
        "precision": "bf16",
        "activation_checkpointing": "selective",
    },
}
_UNDER_8_GB = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from scalellm.config import parse_config
from scalellm.plan._fakes import _Chunks
from scalellm.plan.dry_run import dry_run
from scalellm.plan.traffic import collectives, traffic
made = parse_config(json.load(sys.stdin))
found = dry_run(made, 1024)
assert found.collectives == collectives(traffic(made, 1024)), found.collectives
print(json.dumps([found.memory.peak_bytes, sum(c.payload_bytes for c in found.collectives)]))
"""


@pytest.mark.slow
def test_8_billion_parameters_over_1024_ranks_in_8_gb() -> None:
    """All of the process, its libraries included, within 8 GiB of addresses."""
    command = [sys.executable, "-c", _UNDER_8_GB]
    found = subprocess.run(
        command, input=json.dumps(LLAMA_8B), text=True, capture_output=True, check=True, timeout=600
    )
    peak_bytes, sent_bytes = json.loads(found.stdout)
    parameters = count_parameters(parse_config(LLAMA_8B).model)
    # Two micro-batches: gathered in bf16 twice each, reduced in fp32 once each.
    assert sent_bytes == pytest.approx(2 * (2 * 2 + 4) * parameters, rel=1e-3)
    assert peak_bytes > 16 * parameters / 1024


def test_a_gpu_s_norm_keeps_its_input_and_a_number_a_row() -> None:
    made = [
        config(
            {"name": "fsdp", "param_dtype": "bf16"}, 2, model={"num_layers": n}, precision="bf16"
        )
        for n in (5, 6)
    ]
    kept = {
        kind: [dry_run(one, 2, kind).memory.activations_bytes for one in made]
        for kind in ("cpu", "cuda")
    }
    a_block = {kind: many - few for kind, (few, many) in kept.items()}
    # Two norms a block, each of 2 x 32 x 64 numbers: apart, they keep two wide copies of them.
    assert a_block["cpu"] - a_block["cuda"] == pytest.approx(2 * 2 * 2 * 32 * 64 * 4, rel=0.1)
    # In fp32 nothing is wide, but what was normalised is still kept.
    plain = config({"name": "single"})
    assert dry_run(plain, 1, "cuda").memory.peak_bytes < dry_run(plain, 1, "cpu").memory.peak_bytes
    assert torch.nn.RMSNorm(4)(torch.ones(4)).tolist() == pytest.approx([1.0] * 4)


def trained(task: Task) -> Curve:
    """As this process's rank."""
    return run_curve(task, "fsdp", {}, detect())


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_trains_after_a_dry_run_takes_its_own_part(
    ranks: Callable[..., list[Curve]], world_size: int
) -> None:
    """Its weights would be rank 0's, if DTensor remembered the mesh of the dry run."""
    made = config({"name": "fsdp"}, world_size)
    dry_run(made, world_size, "cpu")
    task = Task(made.model, steps=2, precision="fp32", global_batch=6)
    [alone] = ranks(trained, 1, task)
    for curve in ranks(trained, world_size, task):
        assert worst_difference(curve, alone) < TOLERANCE["fp32"]
