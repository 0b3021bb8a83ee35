"""Hosts with nothing in common but storage and a network give the losses of a single process.

They are namespaces, see helpers/hosts.py; each finds its own name on loopback, as on Debian.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hosts import Host, HostProcess, Hosts
from helpers.paced import PYTHONPATH, Pace

from scalellm.checkpoint import latest
from scalellm.config import parse_config
from scalellm.train import run_training

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

MakeHosts = Callable[[int], Hosts]
Values = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TRAIN = "launch/train.py"
WITHIN_S = 300.0  # a machine with other work is five times slower than an idle one
PORT = 29500  # of the host's own: nobody else has one there
STEPS = 240
# A dead host is taken off the list after 5 s without a word, not after 15, and nobody waits 30 s
# for more hosts than the fewest allowed.
TIMES = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=1"
ELASTIC = ["--max-restarts", "3", "--rdzv-conf", TIMES]
# A host that joins later would wait for the store that the first ones shared.
JOINABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(host: Host, command: Sequence[str], config: Path, **env: str) -> HostProcess:
    """Starts a launcher, whose ranks may outlive it: into a pipe they would be heard for ever."""
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": PYTHONPATH}
    with log_of(host, config).open("a") as log:
        return host.start(command, {**paths, **env}, cwd=REPOSITORY, stdout=log)


def log_of(host: Host, config: Path) -> Path:
    return config.with_name(f"{host.name}.log")


def finish(*processes: HostProcess) -> list[int | None]:
    """Waits until all have ended, or one has failed, and returns their exit codes."""
    deadline_s = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline_s:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    return [process.poll() for process in processes]


def torchrun(master: Host, config: Path, nodes: str, *more: str) -> list[str]:
    """The command of docs/launchers.md, the same on every host."""
    return [
        *("torchrun", "--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-id", "run1", "--rdzv-endpoint", f"{master.name}:{PORT}", *more),
        *(TRAIN, "--config", str(config)),
    ]


def write_config(folder: Path, values: Values) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(values: Values, kind: str = "train") -> list[dict[str, Any]]:
    """The rows that are whole; while the run lasts, the last may not be."""
    path = Path(values["run"]["dir"]) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(values: Values) -> list[float]:
    found = rows(values)
    assert [row["step"] for row in found] == list(range(1, values["train"]["steps"] + 1))
    return [row["loss"] for row in found]


def single(values: Values, folder: Path) -> list[float]:
    """The losses of one process on the same config."""
    values = {**values, "run": {**values["run"], "dir": str(folder / "single")}}
    run_training(parse_config(values))
    return losses(values)


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint: the model and what the optimizer remembers."""
    found, _ = latest(run_dir / "checkpoints")
    assert found is not None and found.step == STEPS
    shapes = {name: found.shape(name) for name in found.names()}
    return {name: found.read(name, (0,) * len(shape), shape) for name, shape in shapes.items()}


def start_elastic(host: Host, master: Host, config: Path) -> HostProcess:
    more = [*ELASTIC, "--local-addr", host.address]
    command = torchrun(master, config, "1:2", *more)
    return start(host, [*command, "--resume", "auto"], config, **JOINABLE)


def worlds(output: str) -> list[int]:
    """The world sizes that rank 0 named, one for each start of the ranks."""
    return [int(size) for size in re.findall(r"^\S+: (\d+) ranks? on cpu by torch", output, re.M)]


@pytest.mark.parametrize(
    "told",
    [
        pytest.param({"GLOO_SOCKET_IFNAME": "eth0"}, id="told the interface"),
        pytest.param({}, id="not told"),
    ],
)
def test_torchrun(
    told: dict[str, str], hosts: MakeHosts, tiny_values: Values, tmp_path: Path
) -> None:
    """The names are enough: to its own a host would answer on loopback, where no peer hears it."""
    made, config = hosts(2), write_config(tmp_path, tiny_values)
    command = [*torchrun(made[0], config, "2"), "strategy.name=fsdp"]
    codes = finish(*(start(host, command, config, **told) for host in made))
    output = "".join(log_of(host, config).read_text() for host in made)
    assert codes == [0, 0] and "fsdp: 2 ranks on cpu by torchrun" in output, output
    assert losses(tiny_values) == pytest.approx(single(tiny_values, tmp_path), rel=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_deepspeed(hosts: MakeHosts, tiny_values: Values, tmp_path: Path) -> None:
    made, config, hostfile = hosts(2), write_config(tmp_path, tiny_values), tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in made))
    command = [
        *("deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--master_addr", made[0].address),
        *("--node_rank", "NODE", TRAIN, "--config", str(config)),
        *("strategy.name=deepspeed", "strategy.stage=2"),
    ]
    processes = [
        start(host, [word.replace("NODE", str(node)) for word in command], config)
        for node, host in enumerate(made)
    ]
    codes = finish(*processes)
    outputs = [log_of(host, config).read_text() for host in made]
    assert codes == [0, 0] and "2 ranks on cpu by deepspeed" in outputs[0], "".join(outputs)
    assert losses(tiny_values) == pytest.approx(single(tiny_values, tmp_path), rel=1e-5)


def test_a_host_goes_and_comes_back(hosts: MakeHosts, tiny_values: Values, tmp_path: Path) -> None:
    """The run goes on with the hosts there are, and no step of it shows how many there were."""
    first, second = hosts(2)
    # In fp32 the order of sums alone makes 1e-5 of difference in so many steps.
    tiny_values["train"] |= {"steps": STEPS, "learning_rate": 1e-3, "precision": "fp64"}
    reference = single(tiny_values, tmp_path)
    pace = Pace(tmp_path / "pace", STEPS, WITHIN_S)
    tiny_values["strategy"] = pace.strategy
    tiny_values["train"]["micro_batch_size"] = 1
    tiny_values["checkpoint"] = {"every_steps": 20}
    config = write_config(tmp_path, tiny_values)
    survivor = start_elastic(first, first, config)
    start_elastic(second, first, config)

    def said() -> str:
        return log_of(first, config).read_text()

    def wait_until(is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WITHIN_S
        while not is_so():
            assert time.monotonic() < deadline_s and survivor.poll() is None, said()
            time.sleep(0.05)

    def train(num_ranks: int, step: int) -> None:
        """Waits for a start of so many ranks, which then go to that step at once."""
        wait_until(lambda: worlds(said())[-1:] == [num_ranks])
        pace.until(step)
        wait_until(lambda: bool(found := rows(tiny_values)) and found[-1]["step"] >= step)

    train(num_ranks=2, step=30)
    second.kill()
    train(num_ranks=1, step=50)
    second.revive()
    returned = start_elastic(second, first, config)
    train(num_ranks=2, step=70)
    pace.off()
    assert finish(survivor, returned) == [0, 0], said()
    # The first host may have begun alone, before the second came.
    assert worlds(said())[-3:] == [2, 1, 2], said()
    assert losses(tiny_values) == pytest.approx(reference, rel=1e-10)
    ours, theirs = state(Path(tiny_values["run"]["dir"])), state(tmp_path / "single")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-10 * theirs[name].norm(), name
