"""Ranks on cores of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scalellm import dist
from scalellm.cores import BEHIND, bound_to_share, by_place, share_of, step_back
from scalellm.dist import detect, ranks
from scalellm.errors import ConfigError

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores to divide"
)


def machine(folder: Path, places: list[tuple[int, int]]) -> Path:
    """What Linux tells of a machine: (NUMA node, physical core) of each logical core."""
    for number, (node, core) in enumerate(places):
        cpu = folder / "cpu" / f"cpu{number}"
        (cpu / f"node{node}").mkdir(parents=True)
        (cpu / "topology").mkdir()
        (cpu / "topology" / "physical_package_id").write_text(f"{node}\n")
        (cpu / "topology" / "core_id").write_text(f"{core}\n")
    return folder


def test_neighbours_share(tmp_path: Path) -> None:
    """Linux numbers nodes in turn, and the second thread of each core in the upper half."""
    system = machine(tmp_path, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (0, 1), (1, 1)])
    cores = by_place(set(range(8)), system)
    assert cores == [0, 4, 2, 6, 1, 5, 3, 7]
    assert [share_of(cores, rank, 2) for rank in range(2)] == [[0, 4, 2, 6], [1, 5, 3, 7]]
    assert [share_of(cores, rank, 3) for rank in range(3)] == [[0, 4], [2, 6], [1, 5]]
    assert by_place({1, 0, 5}, tmp_path / "a system that tells nothing") == [0, 1, 5]


@needs_two_cores
def test_a_rank_is_bound_for_the_length_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    with ranks("cpu", threads=1, process_group=False, bind_cores=True):
        assert os.sched_getaffinity(0) == before  # one rank: all of them
    with bound_to_share(1, 2):
        bound = os.sched_getaffinity(0)
        child = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
        printed = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    assert len(bound) == len(before) // 2 and bound < before
    assert printed.strip() == str(sorted(bound))
    assert os.sched_getaffinity(0) == before


def test_more_ranks_than_cores_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    with (
        pytest.raises(ConfigError, match=f"each of the {cores + 1} ranks .* rank may use {cores};"),
        bound_to_share(0, cores + 1),
    ):
        pass


@needs_two_cores
def test_cores_that_slurm_has_divided_are_not_divided_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm = {"PROCID": "0", "LOCALID": "0", "NTASKS": "2", "STEP_NUM_TASKS": "2"}
    slurm |= {"STEP_TASKS_PER_NODE": "2", "STEP_ID": "0", "JOB_ID": "1", "CPUS_PER_TASK": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert detect().launcher == "srun"
    monkeypatch.setattr(dist, "_init_process_group", lambda world: None)
    monkeypatch.setattr(dist.tdist, "destroy_process_group", lambda: None)
    before = os.sched_getaffinity(0)
    with ranks("cpu", bind_cores=True):
        assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux")
def test_who_steps_back_leaves_the_others_where_they_were() -> None:
    def niceness_beside() -> int:
        with ThreadPoolExecutor(1, initializer=step_back) as pool:
            return pool.submit(niceness).result()

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert niceness_beside() == max(before, BEHIND)
    assert niceness() == before
