"""Ray on two and three hosts: the losses of a single process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hosts import Hosts, leftovers, why_not
from helpers.paced import Pace
from helpers.ray_hosts import WITHIN_S, RayHosts, losses_in, parent_of

from scalellm.checkpoint import latest
from scalellm.config import parse_config
from scalellm.train import run_training

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

Values = dict[str, Any]
Ranks = Callable[..., list[Any]]
STEPS = 200  # far more than the tests wait for, see helpers/paced.py


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """Two hosts for the runs that leave them as they are. Each has one CPU."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(2) as made:
        yield RayHosts(made, tmp_path_factory.mktemp("ray"))
    assert leftovers(made.token) == []


@pytest.fixture
def pace(tmp_path: Path) -> Pace:
    return Pace(tmp_path / "pace", STEPS, WITHIN_S)


@pytest.fixture
def values(tiny_values: Values, pace: Pace) -> Values:
    """A run that is under way until its test says `pace.off()`."""
    tiny_values["cluster"] = {"name": "ray", "nodes": 2}
    tiny_values["strategy"] = pace.strategy
    tiny_values["train"] |= {"steps": STEPS, "learning_rate": 1e-3, "micro_batch_size": 1}
    tiny_values["checkpoint"] = {"every_steps": 20}
    return tiny_values


def with_dir(values: Values, folder: Path, **sections: Any) -> Values:
    return {**values, "run": {**values["run"], "dir": str(folder)}, **sections}


def single(values: Values, folder: Path) -> list[float]:
    """The losses of one process."""
    plain = {name: part for name, part in values.items() if name not in ("cluster", "strategy")}
    run_training(parse_config(with_dir(plain, folder / "single")))
    return losses_in(folder / "single")


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint: the model and what the optimizer remembers."""
    found, _ = latest(run_dir / "checkpoints")
    assert found is not None and found.step == STEPS
    shapes = {name: found.shape(name) for name in found.names()}
    return {name: found.read(name, (0,) * len(shape), shape) for name, shape in shapes.items()}


def same_bits(first: Path, second: Path) -> bool:
    one, two = state(first), state(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "strategy",
    [{"name": "ddp"}, {"name": "fsdp"}, {"name": "deepspeed", "stage": 2}],
    ids=lambda strategy: strategy["name"],
)
def test_the_losses_of_a_single_process(
    strategy: Values, cluster: RayHosts, values: Values, tmp_path: Path
) -> None:
    pytest.importorskip(strategy["name"]) if strategy["name"] == "deepspeed" else None
    values["train"] |= {"steps": 20, "micro_batch_size": None}
    values["strategy"] = strategy
    run = cluster.train(values)
    assert run.finish() == 0, run.said
    assert f"{strategy['name']}: 2 ranks on cpu by ray" in run.said
    assert run.events("started")[0]["nodes"] == [host.address for host in cluster.hosts]
    assert run.losses() == pytest.approx(single(values, tmp_path), rel=1e-5)


def uninterrupted(values: Values, folder: Path, ranks: Ranks) -> Path:
    """The folder of a run by two ranks that nobody disturbs, without Ray."""
    plain = {name: part for name, part in values.items() if name != "cluster"}
    plain["strategy"] = {"name": "ddp"}
    ranks(run_training, 2, parse_config(with_dir(plain, folder / "calm")))
    return folder / "calm"


def test_killed_ranks_and_workers(
    cluster: RayHosts, values: Values, pace: Pace, tmp_path: Path, ranks: Ranks
) -> None:
    """kill -9 of a rank, of a Ray worker, and SIGTERM of the driver: the same bits in the end."""
    run = cluster.train(values)
    run.wait_for_step(30, pace)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    run.wait_for_start(2)
    run.wait_for_step(70, pace)
    os.kill(parent_of(run.rank_pid(1)), signal.SIGKILL)
    run.wait_for_start(3)
    run.wait_for_step(110, pace)
    run.process.terminate()
    assert run.finish() == 3, run.said
    assert "was ended by SIGKILL" in run.said and "(failure 1 of at most 3)" in run.said
    assert "(failure 2 of at most 3)" in run.said
    assert "stopped by" in run.said and "Traceback" not in run.said, run.said
    assert len(run.events("recovered")) == 2
    assert all(event["recovery_s"] > 0 for event in run.events("recovered"))

    pace.off()
    run = cluster.train(values, "--resume", "auto")
    assert run.finish() == 0, run.said
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert same_bits(uninterrupted(values, tmp_path, ranks), run.run_dir)


def test_too_many_failures(cluster: RayHosts, values: Values, pace: Pace) -> None:
    values["cluster"]["max_failures"] = 0
    run = cluster.train(values)
    run.wait_for_step(5, pace)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.finish() == 1
    assert "cluster.max_failures=0): go on later with --resume auto" in run.said
    assert "Traceback" not in run.said


def test_a_mistake_is_not_tried_again(cluster: RayHosts, values: Values, tmp_path: Path) -> None:
    """The sentence and exit code of any other run, and nothing left."""
    values["data"]["path"] = str(tmp_path / "nowhere")
    run = cluster.train(values)
    assert run.finish() == 2
    assert "there is no dataset" in run.said or "nowhere" in run.said, run.said
    assert run.said.count("scalellm: ") == 1, run.said
    assert not run.run_dir.exists()


def test_a_node_dies(
    hosts: Callable[[int], Hosts], values: Values, pace: Pace, tmp_path: Path, ranks: Ranks
) -> None:
    """With a fixed number the run waits for another node, and ends with the same bits."""
    made = hosts(2)
    cluster = RayHosts(made, tmp_path)
    run = cluster.train(values)
    run.wait_for_step(30, pace)
    made[1].kill()
    pace.off()  # there is no going on without that node
    made[1].revive()
    cluster.start_node(made[1])
    assert run.finish() == 0, run.said
    assert "(failure 1 of at most 3)" in run.said and "Traceback" not in run.said
    assert same_bits(uninterrupted(values, tmp_path, ranks), run.run_dir)


def test_elastic(hosts: Callable[[int], Hosts], values: Values, pace: Pace, tmp_path: Path) -> None:
    """A node dies and the run shrinks, it comes back and the run grows: the same losses."""
    made = hosts(2)
    cluster = RayHosts(made, tmp_path)
    values["train"] |= {"precision": "fp64"}
    values["cluster"] = {"name": "ray", "workers": {"min": 1, "max": 2}, "resize_every_s": 2.0}
    wanted = single(values, tmp_path)
    run = cluster.train(values)
    run.wait_for_step(30, pace)
    made[1].kill()
    assert run.wait_for_start(2)["world_size"] == 1
    run.wait_for_step(60, pace)
    made[1].revive()
    cluster.start_node(made[1])
    assert run.wait_for_start(3)["world_size"] == 2
    pace.off()
    assert run.finish() == 0, run.said
    assert len(run.events("recovered")) == 1 and len(run.events("resized")) == 1
    assert run.losses() == pytest.approx(wanted, rel=1e-10)


def test_a_lost_head(
    hosts: Callable[[int], Hosts], values: Values, pace: Pace, tmp_path: Path, ranks: Ranks
) -> None:
    """The ranks save and stop, the driver waits for the head, and goes on with nothing lost."""
    made = hosts(3)
    cluster = RayHosts(made, tmp_path)
    run = cluster.train(values, on=made[1])
    run.wait_for_step(30, pace)
    made[0].kill()
    made[0].revive()
    for host in made:
        cluster.start_node(host)
    pace.off()
    assert run.finish() == 0, run.said
    assert "lost the Ray cluster" in run.said
    assert same_bits(uninterrupted(values, tmp_path, ranks), run.run_dir)
