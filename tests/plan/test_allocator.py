"""The allocator's rules, one by one, on few allocations; then a real step's."""

from __future__ import annotations

import random

import pytest

from scalellm.config import parse_config
from scalellm.plan._record import record_events
from scalellm.plan.allocator import MIB, Event, reserved_bytes
from scalellm.plan.dry_run import summarize

both = pytest.mark.parametrize("expandable", [False, True])


def test_small_ones_share_segments_of_two_mib() -> None:
    assert reserved_bytes([Event(1, 1), Event(2, 1000)]) == 2 * MIB
    assert reserved_bytes([Event(n, MIB) for n in range(3)]) == 4 * MIB


def test_middling_ones_share_twenty_and_large_ones_have_their_own() -> None:
    assert reserved_bytes([Event(1, 2 * MIB), Event(2, 9 * MIB)]) == 20 * MIB
    assert reserved_bytes([Event(1, 11 * MIB - 5)]) == 12 * MIB
    assert reserved_bytes([Event(1, 11 * MIB), Event(2, 40 * MIB + 1)]) == (12 + 42) * MIB


@both
def test_what_was_freed_is_taken_again(expandable: bool) -> None:
    once = [Event(1, 100 * MIB), Event(1, -100 * MIB)]
    again = [Event(2, 60 * MIB), Event(3, 30 * MIB)]
    found = reserved_bytes([*once, *again], expandable=expandable)
    assert found == 100 * MIB


def test_segments_do_not_join_and_expandable_ones_do() -> None:
    """Two freed halves do not hold the whole, unless they are in one address space."""
    halves = [Event(1, 40 * MIB), Event(2, 40 * MIB), Event(1, -40 * MIB), Event(2, -40 * MIB)]
    whole = Event(3, 80 * MIB)
    assert reserved_bytes([*halves, whole]) == 160 * MIB
    assert reserved_bytes([*halves, whole], expandable=True) == 80 * MIB


def test_a_hole_is_not_filled_by_what_is_larger() -> None:
    events = [Event(1, 40 * MIB), Event(2, 20 * MIB), Event(1, -40 * MIB), Event(3, 60 * MIB)]
    assert reserved_bytes(events, expandable=True) == (60 + 60) * MIB


@both
def test_streams_have_memory_of_their_own(expandable: bool) -> None:
    first = [Event(1, 40 * MIB), Event(1, -40 * MIB)]
    assert reserved_bytes([*first, Event(2, 40 * MIB)], expandable=expandable) == 40 * MIB
    other = Event(2, 40 * MIB, "all_gather")
    assert reserved_bytes([*first, other], expandable=expandable) == 80 * MIB


@both
def test_whatever_comes_and_goes_what_is_alive_is_reserved(expandable: bool) -> None:
    draw, alive, events, most = random.Random(3), {}, [], 0
    for number in range(3000):
        if alive and draw.random() < 0.5:
            gone = draw.choice(sorted(alive))
            events.append(Event(gone, -alive.pop(gone)))
        else:
            alive[number] = int(2 ** draw.uniform(8, 27))
            events.append(Event(number, alive[number]))
        most = max(most, sum(alive.values()))
    found = reserved_bytes(events, expandable=expandable)
    assert most <= found < 2 * most


@both
def test_a_step_reserves_more_than_its_tensors(expandable: bool) -> None:
    values = {
        "model": {
            "num_layers": 4,
            "hidden_size": 1024,
            "num_heads": 8,
            "vocab_size": 32000,
            "seq_len": 1024,
        },
        "strategy": {"name": "fsdp"},
        "train": {"global_batch_size": 16, "micro_batch_size": 2},
    }
    trace, events = record_events(parse_config(values), 8, "cuda")
    tensors_bytes = summarize(trace)[0].peak_bytes
    level = most = 0
    for event in events:
        level += event.size_bytes
        most = max(most, level)
    # The step itself, or the first one, in which the optimizer's state is made.
    assert most == pytest.approx(tensors_bytes, rel=0.02)
    assert level == sum(trace.start.values()) + sum(sum(s.change.values()) for s in trace.segments)
    found = reserved_bytes(events, expandable=expandable)
    assert tensors_bytes < found < 1.5 * tensors_bytes
    assert {event.stream for event in events} == {"compute", "all_gather", "reduce_scatter"}
