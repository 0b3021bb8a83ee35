"""A Ray cluster whose nodes are hosts of their own, see hosts.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from helpers.hosts import Host, HostProcess
from helpers.paced import PYTHONPATH, Pace

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PORT = 6379
TRAIN = [sys.executable, "launch/train.py"]
# For any one thing; a machine with other work is five times slower than an idle one.
WITHIN_S = 300.0
ENVIRONMENT = {
    "PYTHONPATH": PYTHONPATH,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "5e" * 32,
    "RAY_worker_niceness": "0",
    # A minute in which to lose and find a head is long for a test.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


class RayHosts:
    """`ray start` on each host; the first is the head."""

    def __init__(self, hosts: list[Host], logs: Path, *, dashboard: bool = False) -> None:
        self._logs, self._dashboard = logs, dashboard
        self._nodes: dict[Host, HostProcess] = {}
        self.hosts = hosts
        self.head = hosts[0]
        self.address = f"{self.head.address}:{PORT}"
        for host in hosts:
            self.start_node(host)

    def start_node(self, host: Host, num_cpus: int = 1) -> None:
        """Starts a node and waits until the cluster has it. A head may have 0 CPUs.

        A host has one node at a time: what is left of one that lost its head ends by itself, and
        is waited for.
        """
        if host in self._nodes:
            self._wait_for_end(host)
        port = ["--head", f"--port={PORT}", f"--include-dashboard={self._dashboard}"]
        where = port if host is self.head else [f"--address={self.address}"]
        command = [str(BIN / "ray"), "start", *where, f"--node-ip-address={host.address}"]
        limits = [f"--num-cpus={num_cpus}", "--object-store-memory=80000000", "--block"]
        said = self._logs / f"ray-{host.name}-{uuid.uuid4().hex[:8]}.log"
        with said.open("w") as log:
            node = host.start([*command, *limits], env=ENVIRONMENT, cwd=REPOSITORY, stdout=log)
        wait_until(
            lambda: "--block" in said.read_text() or node.poll() is not None,
            lambda: f"no Ray node on {host.name}: {said.read_text()}",
        )
        assert node.poll() is None, said.read_text()
        self._nodes[host] = node

    def _wait_for_end(self, host: Host) -> None:
        node = self._nodes.pop(host)
        wait_until(lambda: node.poll() is not None, f"the Ray node on {host.name} does not end")

    def train(self, values: dict[str, Any], *words: str, on: Host | None = None) -> Driver:
        """Starts `python launch/train.py` on a host (the head unless said otherwise)."""
        return Driver(on or self.head, self.address, values, self._logs, words)


class Driver:
    """A run: what it says, what it leaves, and the processes of its ranks."""

    def __init__(
        self, host: Host, address: str, values: dict[str, Any], logs: Path, words: tuple[str, ...]
    ) -> None:
        self.run_dir = Path(values["run"]["dir"])
        config = logs / f"{uuid.uuid4().hex[:8]}.yaml"
        config.write_text(yaml.safe_dump(values))
        self._log = logs / f"{uuid.uuid4().hex[:8]}.log"
        with self._log.open("w") as log:
            self.process: HostProcess = host.start(
                [*TRAIN, "--config", str(config), f"cluster.address={address}", *words],
                env=ENVIRONMENT,
                cwd=REPOSITORY,
                stdout=log,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def finish(self) -> int:
        try:
            return self.process.wait(timeout=WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not done within {WITHIN_S:g} s: {self.said}") from None

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        return [row for row in _rows(self.run_dir / "metrics.jsonl") if row["kind"] == kind]

    def losses(self) -> list[float]:
        return losses_in(self.run_dir)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in _rows(self.run_dir / "cluster.jsonl") if row["kind"] == kind]

    def wait_for_step(self, step: int, pace: Pace) -> None:
        """Lets the run go to a step at once, and waits until it is there."""
        pace.until(step)

        def is_there() -> bool:
            assert self.process.poll() is None, self.said
            return any(row["step"] >= step for row in self.rows())

        wait_until(is_there, f"step {step} was not reached")

    def wait_for_start(self, number: int) -> dict[str, Any]:
        """Waits for the ranks to have started so many times; returns what was said of it."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.said
            return len(self.events("started")) >= number

        wait_until(is_there, lambda: f"start {number} was not seen: {self.said}")
        return self.events("started")[number - 1]

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of the newest start, as seen from outside of all hosts."""
        wanted = {f"RANK={rank}".encode(), b"SCALELLM_LAUNCHER=ray"}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
        assert found, f"rank {rank} runs nowhere"
        return max(found)


def losses_in(run_dir: Path) -> list[float]:
    rows = _rows(run_dir / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(is_there: Callable[[], bool], otherwise: str | Callable[[], str]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not is_there():
        words = otherwise if isinstance(otherwise, str) else otherwise()
        assert time.monotonic() < deadline_s, words
        time.sleep(0.1)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that are whole; the last may not be."""
    if path.exists():
        yield from map(json.loads, path.read_text().split("\n")[:-1])
