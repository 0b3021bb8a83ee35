"""What gloo takes for a collective, by the resident set of a real rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as tdist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from scalellm.config import parse_config
from scalellm.plan._record import record_events
from scalellm.plan.allocator import GLOO, MIB, Event
from scalellm.plan.live import LiveBytes

SENT_BYTES = 80 * MIB


def test_a_gather_takes_its_size_again_and_a_reduced_part_a_copy_of_the_whole(
    ranks: Callable[..., list[Any]],
) -> None:
    [grown] = ranks(grown_by_collectives, 1)
    assert grown["all_gather"] == pytest.approx(SENT_BYTES, rel=0.1)
    assert grown["reduce_scatter"] == pytest.approx(SENT_BYTES, rel=0.1)
    assert grown["all_reduce"] < 0.1 * SENT_BYTES


@pytest.mark.parametrize(
    ("strategy", "device_type", "times"),
    [
        (
            {"name": "parallel", "mesh": {"tp": 2}},
            "cpu",
            3,
        ),  # the tokens of a row, in each of three steps
        ({"name": "parallel", "mesh": {"tp": 2}}, "cuda", 0),
        ({"name": "fsdp"}, "cpu", 0),
        ({"name": "ddp", "shard_optimizer": True}, "cpu", 0),
        ({"name": "deepspeed", "stage": 1}, "cpu", 0),
        ({"name": "deepspeed", "stage": 3}, "cpu", 0),
    ],
)
def test_what_gloo_gathers_by_copies_is_in_the_events_of_a_step(
    strategy: dict[str, Any], device_type: str, times: int
) -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 16}
    # One micro-batch a step, so that all three steps are alike; ranks of a tp group share a row.
    train = {"global_batch_size": 1 if "mesh" in strategy else 2, "micro_batch_size": 1}
    made = parse_config({"model": shape, "strategy": strategy, "train": train})
    trace, events = record_events(made, 2, device_type)
    sent = [traffic for segment in trace.segments for traffic in segment.traffic]
    step_bytes = sum(one.payload_bytes for one in sent if one.kind == "all_gather")
    assert step_bytes > 0
    assert sum(event.size_bytes for event in events if is_gather(event)) == times * step_bytes


@pytest.mark.parametrize("uses", [2, 3])
def test_gradients_that_meet_are_added_where_one_of_them_lies(uses: int) -> None:
    """A watched backward adds them apart; what torch's own profiler sees is the truth."""
    elements = 50_000
    x, factors = torch.randn(elements, requires_grad=True), torch.randn(uses, elements)

    def total() -> torch.Tensor:
        y = x * 2
        return torch.stack([(y * factor).sum() for factor in factors]).sum()

    loss = total()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()  # type: ignore[no-untyped-call]
    assert profiler.profiler is not None
    seen: Any = profiler.profiler.kineto_results
    sizes = [event.nbytes() for event in seen.events() if event.name() == "[memory]"]
    x.grad = None
    loss = total()
    with LiveBytes() as live:
        live.add([x, factors])
        known = len(live.events())
        loss.backward()  # type: ignore[no-untyped-call]
        watched = [event.size_bytes for event in live.events()[known:]]
    whole = 4 * elements
    assert watched.count(whole) == sizes.count(whole) == uses + 1


def test_what_lies_on_meta_has_no_memory_even_beside_fake_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        kept = torch.zeros(MIB)
        shape_only = torch.zeros_like(kept, device="meta")
        views = [shape_only.view(2, -1), kept.view(2, -1)]
        assert sum(event.size_bytes for event in live.events()) == 4 * MIB
    del views


def is_gather(event: Event) -> bool:
    return event.stream == GLOO and event.size_bytes > 0


def grown_by_collectives() -> dict[str, int]:
    """Bytes that the highest resident set rises by in one collective."""
    whole, out = torch.ones(2, SENT_BYTES // 4)
    grown = {}
    for name, send in {
        "all_reduce": lambda: tdist.all_reduce(whole),
        "all_gather": lambda: tdist.all_gather_into_tensor(out, whole),
        "reduce_scatter": lambda: tdist.reduce_scatter_tensor(out, whole),
    }.items():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before_bytes = status_bytes("VmHWM")
        send()
        grown[name] = status_bytes("VmHWM") - before_bytes
    return grown


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) << 10
