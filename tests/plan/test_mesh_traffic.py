"""What meshes send: equal to a dry run of the strategy, and to what can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm.config import Config, parse_config
from scalellm.plan.dry_run import dry_run
from scalellm.plan.traffic import collectives, traffic

# An odd vocabulary, which tensor parallelism does not divide evenly.
MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 509,
    "seq_len": 32,
}


def config(
    data_ranks: int,
    mesh: dict[str, int],
    micro_batches: int = 2,
    model: Any = None,
    train: Any = None,
    **options: Any,
) -> Config:
    batch = {"global_batch_size": 2 * micro_batches * data_ranks, "micro_batch_size": 2}
    return parse_config(
        {
            "model": {**MODEL, **(model or {})},
            "strategy": {"name": "parallel", "mesh": mesh, **options},
            "train": {**batch, **(train or {})},
        }
    )


HALF = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
WIDE = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4}


@pytest.mark.parametrize(
    ("world_size", "of"),
    [
        (2, config(1, {"tp": 2}, train={"precision": "bf16"})),
        (4, config(2, {"tp": 2, "fsdp": 2}, 3, model={"bias": True, "mlp": "gelu"})),
        (2, config(1, {"tp": 2}, sequence_parallel=False, train={"precision": "bf16"})),
        (
            4,
            config(
                2,
                {"tp": 2},
                train={"activation_checkpointing": "full"},
                model={"norm_position": "post", "positions": "sinusoidal"},
            ),
        ),
        (
            2,
            config(
                1,
                {"tp": 2},
                sequence_parallel=False,
                train={"activation_checkpointing": "alternate"},
            ),
        ),
        (2, config(1, {"cp": 2}, train={"activation_checkpointing": "selective"})),
        (8, config(4, {"cp": 2, "fsdp": 2, "dp": 2}, train={"precision": "bf16"})),
        (4, config(1, {"cp": 2, "tp": 2}, context="ulysses", train={"precision": "bf16"})),
        (4, config(2, {"tp": 2, "fsdp": 2}, train={"precision": "bf16"}, **HALF)),
        (4, config(2, {"cp": 2, "fsdp": 2}, train={"precision": "bf16"}, **HALF)),
        (4, config(2, {"tp": 2, "fsdp": 2}, **HALF)),
        (4, config(2, {"cp": 2, "fsdp": 2}, **HALF)),
        (4, config(2, {"pp": 2, "fsdp": 2}, train={"precision": "bf16"}, param_dtype="bf16")),
        (2, config(1, {"pp": 2}, 3, bucket_mb=1)),
        (2, config(1, {"pp": 2}, 2, schedule="gpipe", model={"tie_embeddings": False})),
        (2, config(1, {"pp": 2}, 2, schedule="interleaved", model=WIDE)),
        (2, config(1, {"pp": 2}, 4, schedule="zero_bubble", model=WIDE)),
        (4, config(2, {"pp": 2, "fsdp": 2}, 2)),
        (4, config(1, {"pp": 2, "tp": 2}, 2, train={"precision": "bf16"})),
    ],
    ids=lambda value: str(value.strategy.options) if isinstance(value, Config) else str(value),
)
def test_equals_a_dry_run(world_size: int, of: Config) -> None:
    assert collectives(traffic(of, world_size)) == dry_run(of, world_size).collectives


def test_replicas_send_no_less_for_sharing_a_model() -> None:
    """Two all-gathers and two reduce-scatters a block and micro-batch, and as many backwards."""
    of = config(1, {"tp": 2}, micro_batches=3)
    found = {one.kind: one for one in collectives(traffic(of, 2))}
    blocks, ends = 3 * 2 * (2 + 2), 3 * 2
    assert found["all_gather"].count == blocks + ends
    assert found["reduce_scatter"].count == blocks + 3  # of the head's backward only
    assert found["all_gather"].payload_bytes == found["all_gather"].count * 2 * 32 * 48 * 4
