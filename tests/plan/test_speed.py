"""Step times: two cases by hand, and what must grow or shrink with what."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm.config import Config, ModelConfig, TrainConfig, parse_config
from scalellm.plan.devices import Efficiency, find_device
from scalellm.plan.operators import Work, measure_work
from scalellm.plan.speed import step_time

NO_BYTES = Work(0, 0, 0)
TINY = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 32}


def config(model: dict[str, Any], strategy: dict[str, Any], **train: Any) -> Config:
    return parse_config({"model": model, "strategy": strategy, "train": train})


def test_124m_on_eight_a100_by_hand() -> None:
    of = config(
        {"preset": "gpt2-124m"},
        {"name": "ddp"},
        global_batch_size=192,
        micro_batch_size=12,
        precision="bf16",
    )
    time = step_time(of, 8, find_device("a100-80g"), Efficiency(), Work(2e10, 3e10, 900))
    # 12 blocks of 12 x 768^2 weights, the head, attention over 1,024 keys; 2 x 12 rows a rank.
    flops_per_token = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    compute_s = 2 * 12 * 1024 * flops_per_token / (312e12 * 0.7)
    memory_s = 2 * 5e10 / (2.039e12 * 0.8)
    # The last bucket, the tied embedding, goes when the backward is done: fp32, a ring of eight.
    exposed_s = 2 * 7 / 8 * 50304 * 768 * 4 / (300e9 * 0.8) + 14e-6 + 2 * 7 * 1.9e-6
    # AdamW reads 4 and writes 3 numbers, the norm reads 1, clipping moves 2.
    optimizer_s = 10 * 4 * 124.48e6 / (2.039e12 * 0.8)
    total_s = compute_s + memory_s + exposed_s + optimizer_s
    assert time.compute_s == pytest.approx(compute_s, rel=1e-6)
    assert time.exposed_communication_s == pytest.approx(exposed_s, rel=0.01)
    assert time.optimizer_s == pytest.approx(optimizer_s, rel=0.01)
    assert time.total_s == pytest.approx(total_s, rel=0.01)
    assert time.tokens_per_s == pytest.approx(192 * 1024 / total_s, rel=0.01)
    assert time.mfu == pytest.approx(24 * 1024 * flops_per_token / total_s / 312e12, rel=0.01)


def test_8b_on_64_h100_by_hand() -> None:
    of = config(
        {"preset": "llama-8b"},
        {"name": "fsdp", "param_dtype": "bf16", "reduce_dtype": "fp32"},
        global_batch_size=128,
        micro_batch_size=1,
        precision="bf16",
        activation_checkpointing="full",
    )
    time = step_time(of, 64, find_device("h100-80g"), Efficiency(), Work(1e11, 2e11, 3000))
    # A block: q and o, grouped k and v, three MLP matrices. Embedding and head are not tied.
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    head = 128256 * 4096
    forward = 8192 * (2 * (32 * block + head) + 4 * 32 * 4096 * 8192)
    again = forward - 8192 * 2 * head
    compute_s = 2 * (3 * forward + again) / (989.4e12 * 0.7)
    memory_s = 2 * 3e11 / (3.35e12 * 0.8)
    # Eight rails of 50 GB/s a node are slower than NVLink's 450. What hides behind nothing: gathers
    # (bf16) of root and first block, forward and backward, and the last reductions (fp32) of both.
    root, unit = 2 * head + 4096, block + 2 * 4096
    sent = 63 / 64 * (root + unit) * (2 + 2 + 4)
    hops_s = 8 * 7 * 1.9e-6 + 7 * 4e-6
    exposed_s = 2 * (sent / (400e9 * 0.8) + 3 * 2 * (14e-6 + hops_s))
    optimizer_s = 10 * 4 * 8.03e9 / 64 / (3.35e12 * 0.8)
    total_s = compute_s + memory_s + exposed_s + optimizer_s
    assert time.compute_s == pytest.approx(compute_s, rel=1e-6)
    assert time.exposed_communication_s == pytest.approx(exposed_s, rel=0.01)
    assert time.total_s == pytest.approx(total_s, rel=0.01)


def small(strategy: dict[str, Any], world_size: int, device: str = "a100-80g", **train: Any) -> Any:
    values = {"global_batch_size": 1024, "micro_batch_size": 1, "precision": "bf16", **train}
    of = config(TINY, strategy, **values)
    return step_time(of, world_size, find_device(device), work=NO_BYTES)


def test_more_nodes_cost_more_communication() -> None:
    in_a_node, between = (small({"name": "ddp"}, n).communication_s for n in (8, 16))
    assert between > in_a_node > small({"name": "single"}, 1).communication_s == 0.0


def test_a_hybrid_keeps_gathers_in_the_node() -> None:
    big = {**TINY, "hidden_size": 2048, "num_heads": 16}

    def seconds(**options: Any) -> float:
        of = config(big, {"name": "fsdp", **options}, global_batch_size=128, micro_batch_size=1)
        return step_time(of, 64, find_device("v100-32g"), work=NO_BYTES).communication_s

    whole, hybrid = seconds(), seconds(shard_ranks=8)
    assert hybrid < whole


def test_offloading_pays_at_the_host() -> None:
    on_device, offloaded = (small({"name": "fsdp", "cpu_offload": x}, 8) for x in (False, True))
    assert offloaded.optimizer_s > 10 * on_device.optimizer_s
    assert offloaded.communication_s > on_device.communication_s


def test_full_checkpointing_computes_a_third_again_of_the_blocks_only() -> None:
    plain = small({"name": "single"}, 1).compute_s
    again = small({"name": "single"}, 1, activation_checkpointing="full").compute_s
    assert 1 < again / plain < 4 / 3
    assert small({"name": "single"}, 1, activation_checkpointing="selective").compute_s == plain
    half = small({"name": "single"}, 1, activation_checkpointing="alternate").compute_s
    assert plain < half < plain + (again - plain) * 0.6


def test_many_small_operators_are_as_slow_as_their_launches() -> None:
    of = config(TINY, {"name": "single"}, global_batch_size=4, micro_batch_size=1)
    device = find_device("h100-80g")
    time = step_time(of, 1, device, work=Work(0, 0, 1000))
    assert time.compute_s + time.launch_s == pytest.approx(4 * 1000 * device.launch_s)


def test_days_and_cost() -> None:
    time = small({"name": "ddp"}, 8)
    assert time.days(time.tokens_per_s * 86_400) == pytest.approx(1.0)
    assert time.cost(time.tokens_per_s * 3600, 8, 2.5) == pytest.approx(20.0)


def test_work_is_that_of_the_decoder() -> None:
    model = ModelConfig.model_validate({**TINY, "attention": "sdpa"})
    train = TrainConfig()
    one, three = (measure_work(model, train, rows) for rows in (1, 3))
    assert one.num_operators == three.num_operators
    # fp32 without dropout: per token and block two norms (read, write), two sums (2 reads, write),
    # SwiGLU's two (read, write; 2 reads, write), rotations. Less than that would be a broken count.
    tokens, width, mlp = 32, 64, model.mlp_size
    least = 2 * 4 * tokens * (2 * 2 * width + 2 * 3 * width + 5 * mlp)
    assert least < one.forward_bytes < 6 * least
    assert 2.5 < three.forward_bytes / one.forward_bytes <= 3
    deep = measure_work(model.model_copy(update={"num_layers": 5}), train, 1)
    assert deep.num_operators > 2 * one.num_operators
    again = measure_work(model, train.model_copy(update={"activation_checkpointing": "full"}), 1)
    assert again.forward_bytes == one.forward_bytes and again.backward_bytes > one.backward_bytes
    half = measure_work(model, train.model_copy(update={"precision": "bf16"}), 1, half=True)
    cast = measure_work(model, train.model_copy(update={"precision": "bf16"}), 1)
    assert half.forward_bytes < cast.forward_bytes


def test_launching_adds_up_on_a_cpu_and_hides_on_a_gpu() -> None:
    of = config(TINY, {"name": "single"}, global_batch_size=4)
    gpu = find_device("a100-80g")
    work = Work(0, 0, 100)
    on_gpu, on_cpu = (
        step_time(of, 1, gpu.model_copy(update={"is_cpu": is_cpu}), Efficiency(), work)
        for is_cpu in (False, True)
    )
    assert on_cpu.launch_s == pytest.approx(100 * gpu.launch_s)
    assert on_gpu.launch_s == pytest.approx(100 * gpu.launch_s - on_gpu.compute_s)
