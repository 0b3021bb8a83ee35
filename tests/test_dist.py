"""What the ranks ask each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as tdist

from scalellm.dist import (
    World,
    detect,
    ranks_where,
    same_on_all_ranks,
    side_group,
    sum_over_ranks,
)


def test_alone_without_a_process_group() -> None:
    world = World()
    assert side_group() is None
    assert sum_over_ranks([2.0], group=side_group()) == [2.0]
    assert (ranks_where(True, world), ranks_where(False, world)) == ([0], [])
    assert same_on_all_ranks("a", world)


def _ask() -> list[Any]:
    world = detect()
    return [
        ranks_where(world.rank != 1, world),
        same_on_all_ranks("a", world),
        same_on_all_ranks("b" if world.rank == 2 else "a", world),
    ]


def test_every_rank_gets_the_same_answer(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(_ask, 3) == [[[0, 2], True, False]] * 3


def _two_threads() -> list[float]:
    """The side thread is a collective behind on one rank and ahead on the other."""
    world, group, found = detect(), side_group(), []
    assert group is not tdist.group.WORLD

    def aside() -> None:
        found.extend(sum_over_ranks([10.0 + world.rank], group=group))

    thread = threading.Thread(target=aside)
    if world.is_main:
        thread.start()
    found_here = sum_over_ranks([1.0 + world.rank])
    if not world.is_main:
        thread.start()
    thread.join()
    return [*found_here, *found]


def test_a_side_group_is_a_threads_own(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(_two_threads, 2) == [[3.0, 21.0]] * 2
