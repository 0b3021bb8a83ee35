"""A pipeline's estimate is near a dry run of the real schedule, rank by rank."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm.config import Config, parse_config
from scalellm.plan._record import record
from scalellm.plan.dry_run import dry_run, summarize
from scalellm.plan.memory import estimate
from scalellm.plan.types import Memory

MODEL = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 512,
    "seq_len": 64,
}


HALF = {"param_dtype": "bf16", "reduce_dtype": "fp32"}


def config(
    mesh: dict[str, int],
    micro_batches: int,
    data_ranks: int = 1,
    precision: str = "fp32",
    **options: Any,
) -> Config:
    samples = 2 * micro_batches * data_ranks
    return parse_config(
        {
            "model": MODEL,
            "strategy": {"name": "parallel", "mesh": mesh, **options},
            "train": {
                "global_batch_size": samples,
                "micro_batch_size": 2,
                "precision": precision,
            },
        }
    )


def fullest(of: Config, world_size: int, pp: int) -> Memory:
    ranks = range(0, world_size, world_size // pp)
    found = [summarize(record(of, world_size, "cuda", rank))[0] for rank in ranks]
    return max(found, key=lambda memory: memory.peak_bytes)


@pytest.mark.parametrize(
    ("of", "world_size", "error"),
    [
        (config({"pp": 2}, 3), 2, 0.03),
        (config({"pp": 2}, 3, schedule="gpipe"), 2, 0.03),
        (config({"pp": 2}, 2, schedule="interleaved"), 2, 0.03),
        (config({"pp": 2}, 3, schedule="zero_bubble"), 2, 0.08),
        (config({"pp": 2, "fsdp": 2}, 2, data_ranks=2), 4, 0.03),
        (config({"pp": 2, "fsdp": 2}, 2, 2, "bf16", **HALF), 4, 0.03),
        (config({"pp": 2, "fsdp": 2}, 2, 2, "bf16", param_dtype="bf16"), 4, 0.03),
        (config({"pp": 2, "fsdp": 2}, 2, 2, "bf16", reduce_dtype="bf16"), 4, 0.03),
        (config({"pp": 2, "fsdp": 2, "tp": 2}, 3, 2, "bf16", **HALF), 8, 0.03),
    ],
    ids=["1f1b", "gpipe", "interleaved", "zero_bubble", "fsdp", "half", "half-sums", "sums", "tp"],
)
def test_is_near_a_dry_run(of: Config, world_size: int, error: float) -> None:
    found, dry = estimate(of, world_size), fullest(of, world_size, 2)
    assert found.peak_bytes == pytest.approx(dry.peak_bytes, rel=error)
    if of.strategy.options.get("schedule") == "zero_bubble":
        assert found.peak_bytes > dry.peak_bytes  # it is an upper bound


@pytest.mark.parametrize(
    ("mesh", "world_size", "data_ranks"),
    [({"tp": 2}, 2, 1), ({"cp": 2}, 2, 1), ({"tp": 2, "fsdp": 2}, 4, 2)],
    ids=str,
)
def test_without_a_pipeline_it_is_the_dry_run(
    mesh: dict[str, int], world_size: int, data_ranks: int
) -> None:
    """From five blocks to eight, to the part in a hundred that other estimates have."""
    of = config(mesh, 2, data_ranks)
    dry = dry_run(of, world_size).memory
    assert estimate(of, world_size).peak_bytes == pytest.approx(dry.peak_bytes, rel=0.01)


def test_more_micro_batches_cost_1f1b_only_their_borders() -> None:
    few, many = (estimate(config({"pp": 2}, times), 2) for times in (4, 16))
    assert many.activations_bytes == few.activations_bytes
    border_bytes = 2 * MODEL["seq_len"] * MODEL["hidden_size"] * 4
    assert many.buffers_bytes - few.buffers_bytes == 12 * border_bytes
    gpipe = estimate(config({"pp": 2}, 16, schedule="gpipe"), 2)
    assert gpipe.activations_bytes > 7 * many.activations_bytes
