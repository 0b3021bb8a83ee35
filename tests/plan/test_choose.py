"""The choice among strategies, micro-batches and checkpointing, with an estimate made for it."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm.config import Config, parse_config
from scalellm.errors import ConfigError
from scalellm.model import count_parameters
from scalellm.plan.candidates import merged
from scalellm.plan.choose import AS_GIVEN, MARGIN, Chooser, Plan
from scalellm.plan.devices import Device, find_device
from scalellm.plan.traffic import set_up
from scalellm.plan.types import Memory
from scalellm.plan.ways_out import more_ranks

MODEL = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 32}
VALUES: dict[str, Any] = {
    "model": MODEL,
    "strategy": {"name": "ddp"},
    "train": {"global_batch_size": 64, "micro_batch_size": 8},
}
ROW_BYTES = {"none": 1_000_000, "selective": 500_000, "alternate": 350_000, "full": 100_000}


def estimate(config: Config, world_size: int) -> Memory:
    """16 bytes a parameter over the ranks that share them, and so much a row."""
    setup = set_up(config, world_size)
    parameters = count_parameters(config.model)
    kinds = setup.sharding
    away = kinds.offloaded
    rows_bytes = ROW_BYTES[config.train.activation_checkpointing] * config.model.seq_len // 32
    sizes = {
        "parameters": 4 * parameters // kinds.parameters,
        "gradients": 4 * parameters // kinds.gradients,
        "optimizer": 8 * parameters // kinds.optimizer,
    }
    here = {f"{kind}_bytes": 0 if kind in away else size for kind, size in sizes.items()}
    return Memory(
        **here,
        activations_bytes=setup.batches.micro_batch_size * rows_bytes,
        buffers_bytes=0,
        temporary_bytes=0,
        host_bytes=sum(sizes[kind] for kind in away),
    )


STATES_BYTES = 16 * count_parameters(parse_config(VALUES).model)


def device(memory_bytes: float, name: str = "h100-80g") -> Device:
    """One whose tensors may take so many bytes."""
    whole = int(memory_bytes / (1 - MARGIN)) + 1
    return find_device(name).model_copy(update={"memory_bytes": whole, "usable_share": 1.0})


def plan(memory_bytes: float, world_size: int = 8, **changes: Any) -> Plan:
    return Chooser(merged(VALUES, changes), device(memory_bytes), estimate).plan(world_size)


def rows(found: Plan) -> dict[str, Any]:
    return {row.label: row for row in found.rows}


def test_with_room_enough_the_simplest_of_the_fastest_is_taken() -> None:
    found = plan(1e9)
    assert found.best is not None and found.best.label == AS_GIVEN and not found.ways_out
    # Each variant tries the largest micro-batch first, and nothing is computed twice.
    for row in found.rows:
        if row.refused:
            assert "deepspeed" in row.refused
            continue
        assert row.fits and row.time is not None
        assert row.config.train.micro_batch_size == 8
        assert row.config.train.activation_checkpointing == "none"


def test_what_fits_really_fits_and_the_next_size_does_not() -> None:
    limit = STATES_BYTES + 2.5e6
    chooser = Chooser(VALUES, device(limit), estimate)
    row = chooser._largest_fitting("ddp", {"name": "ddp"}, "none", [1, 2, 4, 8], 8)
    assert row.fits and row.config is not None and row.memory is not None
    assert row.config.train.micro_batch_size == 2
    assert row.memory.peak_bytes <= limit < row.memory.peak_bytes + 2 * ROW_BYTES["none"]
    # These steps are as long as their launches: fewer and larger micro-batches are faster.
    best = rows(chooser.plan(8))["ddp"]
    assert best.config.train.activation_checkpointing == "full"
    assert best.config.train.micro_batch_size == 8


def test_what_does_not_fit_says_by_how_much() -> None:
    found = plan(STATES_BYTES / 2)
    ddp = rows(found)["ddp"]
    assert not ddp.fits and ddp.time is None
    # The least too large: one row, everything computed again.
    least = STATES_BYTES + ROW_BYTES["full"]
    assert ddp.over_bytes == pytest.approx(least - STATES_BYTES / 2, abs=2)
    assert found.best is not None and found.best.label.startswith(("fsdp", "zero-3"))
    assert not found.given.fits


def test_nothing_fits_and_there_are_ways_out() -> None:
    limit = STATES_BYTES / 8 * 0.8
    found = plan(limit, strategy={"name": "fsdp"})
    offloaded = rows(found)["fsdp offload"]
    assert found.best is not None and offloaded.fits  # offloading is among the variants
    found = plan(0.9 * ROW_BYTES["full"])
    assert found.best is None and 1 <= len(found.ways_out) <= 3
    nearest = min((row.over_bytes for row in found.rows if row.memory), default=0)
    for way in found.ways_out:
        assert way.memory is not None and way.over_bytes < nearest
        assert way.over_bytes == way.memory.peak_bytes - found.limit_bytes
    assert found.ways_out[0].fits and found.ways_out[0].label == "model.seq_len=16"


def test_more_devices_are_a_way_out() -> None:
    """Where it is the states that are too much, twice the ranks hold half of them each."""
    big = device(STATES_BYTES / 8 * 0.8)
    chooser = Chooser(merged(VALUES, {"strategy": {"name": "fsdp"}}), big, estimate)
    small_rows = {"train": {"micro_batch_size": 1, "activation_checkpointing": "full"}}
    nearest = chooser._try("nearest", 8, small_rows)
    assert not nearest.fits
    more = more_ranks(nearest, chooser._try, big)
    assert more is not None and more.fits and more.world_size in (16, 32)
    # The ranks of one CPU share its memory: more of them do not help.
    one_cpu = big.model_copy(update={"is_cpu": True})
    assert more_ranks(nearest, chooser._try, one_cpu) is None


def test_what_the_config_says_stays() -> None:
    options = {"name": "fsdp", "reduce_every_micro_batch": False}
    found = plan(1e9, strategy=options)
    for row in found.rows:
        if row.refused:
            continue
        assert row.config.train.precision == "fp32"
        assert row.config.train.global_batch_size == 64
        assert row.config.model == parse_config(VALUES).model
        if row.config.strategy.name == "fsdp":
            assert row.config.strategy.options["reduce_every_micro_batch"] is False


def test_only_sound_micro_batches_are_tried() -> None:
    chooser = Chooser(merged(VALUES, {"train": {"global_batch_size": 96}}), device(1e9), estimate)
    assert chooser._micro_batch_sizes({"name": "ddp"}, 8) == [1, 2, 4]
    with pytest.raises(ConfigError, match="not a multiple"):
        chooser.plan(7)


def test_a_precision_without_units_and_a_model_without_a_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="no bf16 matrix units"):
        half = merged(VALUES, {"train": {"precision": "bf16"}})
        Chooser(half, device(1e9, "v100-16g"), estimate).plan(8)
    with pytest.raises(ConfigError, match="vocab_size is null"):
        plan(1e9, model={"vocab_size": None})


def test_a_strategy_that_is_none_is_refused_not_left_out() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.shard_optimizer='perhaps' is not true"):
        plan(1e9, strategy={"name": "ddp", "shard_optimizer": "perhaps"})
    with pytest.raises(ConfigError, match="did you mean 'fsdp'"):
        plan(1e9, strategy={"name": "fsdq"})


def test_a_hybrid_over_nodes_and_a_single_process() -> None:
    assert "fsdp hybrid" in rows(plan(1e9, world_size=16))
    assert "fsdp hybrid" not in rows(plan(1e9, world_size=8))
    alone = rows(plan(1e9, world_size=1, strategy={"name": "single"}))
    assert "ddp" not in alone and alone["single"].fits


def test_hopeless_sizes_are_not_tried_again() -> None:
    asked: list[tuple[str, int]] = []

    def counting(config: Config, world_size: int) -> Memory:
        rows_of = config.batches(world_size).micro_batch_size
        asked.append((config.train.activation_checkpointing, rows_of))
        return estimate(config, world_size)

    limit = 1.5 * ROW_BYTES["none"]
    found = Chooser(VALUES, device(limit), counting).plan(8)
    # 8 rows alone are too many without checkpointing: once for either precision of weights.
    assert asked.count(("none", 8)) <= 2
    best = rows(found)["fsdp offload"]
    assert best.fits


def test_what_cannot_be_faster_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan as when everything is tried, from fewer estimates."""
    asked: list[Config] = []

    def counting(config: Config, world_size: int) -> Memory:
        asked.append(config)
        return estimate(config, world_size)

    # Large enough for products to take the time: to compute blocks again is slower.
    large = merged(VALUES, {"model": {"hidden_size": 1024, "num_heads": 8, "seq_len": 2048}})
    states_bytes = 16 * count_parameters(parse_config(large).model)

    def rows_of(limit: float) -> list[Any]:
        found = Chooser(large, device(limit), counting).plan(8)
        return [(row.label, row.changes, row.over_bytes, row.time) for row in found.rows]

    limits = (states_bytes + 160e6, states_bytes + 260e6, states_bytes / 2)
    sparing = [rows_of(limit) for limit in limits]
    num_sparing = len(asked)
    monkeypatch.setattr(Chooser, "_least_s", lambda *args: 0.0)
    assert [rows_of(limit) for limit in limits] == sparing
    assert num_sparing < len(asked) - num_sparing
