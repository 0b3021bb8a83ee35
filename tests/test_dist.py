"""What the ranks ask each other, their launcher and their machine."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as tdist

from scalellm import dist, launched
from scalellm.dist import (
    World,
    detect,
    interface_towards,
    ranks_where,
    same_on_all_ranks,
    side_group,
    sum_over_ranks,
    threads_per_rank,
)
from scalellm.errors import ConfigError


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


@pytest.mark.parametrize(
    ("environment", "restarts"),
    [
        ({}, 0),
        # torchrun starts again after a mistake too: a forgotten --resume stays one.
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, 0),
        ({"SCALELLM_RESTARTS": "2"}, 2),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "SCALELLM_RESTARTS": "0"}, 0),
    ],
)
def test_how_often_the_ranks_were_started_before(
    environment: dict[str, str], restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert detect().restarts == restarts


def test_a_count_of_starts_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALELLM_RESTARTS", "once")
    with pytest.raises(ConfigError, match="SCALELLM_RESTARTS='once' in the environment is not"):
        detect()


@pytest.mark.parametrize(
    ("launcher", "reserved", "threads"),
    [
        ("ray", "3", 3),
        ("ray", "64", 8),  # more than this process may use
        ("ray", "", 1),
        ("torchrun", "3", 4),  # two ranks share the host
    ],
)
def test_threads_are_those_that_ray_reserved(
    launcher: str, reserved: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", reserved)
    world = World(world_size=2, local_world_size=2, launcher=launcher)
    assert threads_per_rank(world) == threads


def test_a_caller_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    with dist.ranks("cpu", threads=before + 1, process_group=False):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_no_more_threads_than_openmp_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of more, torch 2.13 on a CPU leaves parts of a product as they were in memory."""
    monkeypatch.setattr(dist, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "3")
    assert threads_per_rank(World()) == 3
    assert threads_per_rank(World(world_size=8, local_world_size=8)) == 1
    sentence = "run.threads=4 threads, but OMP_THREAD_LIMIT=3 in the environment"
    with pytest.raises(ConfigError, match=sentence), dist.ranks("cpu", threads=4):
        pass


def _compute_in_parallel() -> float:
    return float(torch.ones(1 << 20).cos().mean())


def test_a_rank_computes_after_its_parent_asked_for_more_threads(
    ranks: Callable[..., list[Any]],
) -> None:
    """OpenMP's threads are not there after a fork: a rank that waits for them hangs."""
    torch.set_num_threads(2)
    try:
        here = _compute_in_parallel()
        assert ranks(_compute_in_parallel, 2) == pytest.approx([here] * 2)
    finally:
        torch.set_num_threads(1)


def test_a_watched_rank_tells_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    launched.tell("started", step=0)  # to nobody
    reading, writing = os.pipe()
    monkeypatch.setenv("SCALELLM_EVENTS_FD", str(writing))
    launched.tell("started", step=0)
    launched.tell("saved", path="/a")
    events = [json.loads(line) for line in os.read(reading, 1000).splitlines()]
    assert events == [{"kind": "started", "step": 0}, {"kind": "saved", "path": "/a"}]
    os.close(reading)
    launched.tell("saved", path="/b")  # nobody listens any more, and that is no reason to stop
    assert "SCALELLM_EVENTS_FD" not in os.environ
    os.close(writing)


INTERFACES = {"lo": "127.0.0.1", "down": None, "eth0": "172.17.0.2", "ib0": "10.0.0.1"}
ROUTES = {  # from which of its addresses this machine would speak to another
    "10.0.0.7": "10.0.0.1",
    "127.0.1.1": "127.0.0.1",
    "172.17.0.2": "172.17.0.2",
    dist._ELSEWHERE: "172.17.0.2",
}
NAMES = {"node-7": "10.0.0.7", "node-1": "127.0.1.1", "far": "10.9.9.9"}


class _Probe:
    """A socket on a machine with those routes."""

    def __init__(self, *arguments: int) -> None:
        self._own_address = ""

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        if address[0] not in ROUTES:
            raise OSError("Network is unreachable")
        self._own_address = ROUTES[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self._own_address, 1


def _resolve(host: str, *arguments: object) -> list[Any]:
    address = NAMES.get(host, host)
    if not address[0].isdigit():
        raise socket.gaierror("Name or service not known")
    return [(0, 0, 0, "", (address, 1))]


@pytest.mark.parametrize(
    ("host", "has_way_out", "interface"),
    [
        ("node-7", True, "ib0"),
        ("node-7", False, "ib0"),
        ("172.17.0.2", True, "eth0"),  # this machine, by an address that others know
        ("node-1", True, "eth0"),  # this machine, by a name that means loopback here
        ("node-1", False, None),
        ("far", True, "eth0"),
        ("nobody", True, "eth0"),
        ("nobody", False, None),
    ],
)
def test_the_interface_by_which_the_others_are_reached(
    host: str, has_way_out: bool, interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolve)
    monkeypatch.setattr(socket, "socket", _Probe)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(INTERFACES)))
    monkeypatch.setattr(dist, "_ipv4_address", lambda probe, name: INTERFACES[name])
    if not has_way_out:
        monkeypatch.delitem(ROUTES, dist._ELSEWHERE)
    assert interface_towards(host) == interface


def test_the_interface_of_this_machine() -> None:
    """The kernel's own table of routes says the same; without a way out there is none."""
    rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    ways_out = [row[0] for row in sorted(rows, key=lambda row: int(row[6])) if row[1] == "00000000"]
    assert interface_towards("127.0.0.1") == (ways_out or [None])[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert dist._ipv4_address(probe, "lo") == "127.0.0.1"
        assert dist._ipv4_address(probe, "none") is None
