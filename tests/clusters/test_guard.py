"""A driver that Ray has ended is started again; a small script stands in for it here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.clusters import _ray_guard
from scalellm.clusters._ray_guard import ADDRESS, DRIVER, guard, is_driver, tell
from scalellm.config import ClusterConfig

# Started in place of Python: without packages it is there in 20 ms.
SCRIPT = f"""#!{sys.executable} -SE
import os, signal, sys, time

number = int(os.environ["{DRIVER}"])

def tell(words):
    os.write(int(os.environ["{_ray_guard._TELL}"]), f"{{words}}\\n".encode())

def note(*words):
    with open(LOG, "a") as log:
        print(*words, file=log)

def on_stop(action):
    signal.signal(signal.SIGTERM, lambda *_: (action(), os._exit(9)))

note(number, repr(os.environ["{ADDRESS}"]), *sys.argv[1:])
exec(ACTS[min(number, len(ACTS) - 1)])
"""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
DONE = "tell('code 0')"
AGAIN_AFTER_S = 0.1


class Drivers:
    """Each start runs the next line of Python, the last one again and again."""

    def __init__(self, folder: Path) -> None:
        self.path, self._log = folder / "driver", folder / "log"
        self._log.touch()

    def act(self, *acts: str) -> None:
        known = f"LOG = {str(self._log)!r}\nACTS = {acts!r}\n"
        head, _, rest = SCRIPT.partition("\n")
        self.path.write_text(f"{head}\n{known}{rest}")
        self.path.chmod(0o755)

    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    def wait_for(self, line: str) -> None:
        deadline_s = time.monotonic() + 30
        while line not in self.log():
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.01)


@pytest.fixture
def drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drivers:
    made = Drivers(tmp_path)
    monkeypatch.setattr(sys, "executable", str(made.path))
    monkeypatch.setattr(_ray_guard, "_AGAIN_AFTER_S", AGAIN_AFTER_S)
    return made


def cluster(**values: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"name": "ray", "workers": 1, **values})


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_exit_code_is_the_one_delivered(
    drivers: Drivers, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the process itself ends with means nothing: Ray's C++ may end it after its last word."""
    drivers.act(f"tell('code {code}'); {DIES}")
    assert guard(["a.yaml", "train.steps=3"], cluster()) == code
    assert drivers.log() == ["0 '' -m scalellm train a.yaml train.steps=3"]
    assert capfd.readouterr() == ("", "")


def test_a_lost_driver_is_followed_by_one_that_knows_the_cluster(
    drivers: Drivers, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        drivers.act(f"tell('address {address}'); {DIES}", "os._exit(1)", DONE)
        assert guard(["a.yaml"], cluster()) == 0
    words = f"'{address}' -m scalellm train a.yaml"
    assert drivers.log() == ["0 '' -m scalellm train a.yaml", f"1 {words}", f"2 {words}"]
    said = capfd.readouterr().err.splitlines()
    assert [
        line.startswith("scalellm: lost the Ray cluster, or the driver was") for line in said
    ] == [*(True, True)]
    assert "(failure 1 of at most 3)" in said[0] and "(failure 2 of at most 3)" in said[1]


@pytest.mark.parametrize("max_failures", [0, 1])
def test_too_many_lost_drivers(
    drivers: Drivers, max_failures: int, capfd: pytest.CaptureFixture[str]
) -> None:
    drivers.act(DIES)
    assert guard([], cluster(max_failures=max_failures)) == 1
    assert len(drivers.log()) == max_failures + 1
    said = capfd.readouterr().err.splitlines()
    limit = f"(cluster.max_failures={max_failures})"
    assert said[-1] == f"scalellm: lost the Ray cluster {max_failures + 1} times {limit}"


def test_any_number_of_lost_drivers(drivers: Drivers) -> None:
    drivers.act(*[DIES] * 6, DONE)
    assert guard([], cluster(max_failures=-1)) == 0
    assert len(drivers.log()) == 7


def test_the_next_driver_waits_for_the_cluster(drivers: Drivers) -> None:
    """Bound but not listening: connections are refused, and nobody else takes the port."""
    listening_s: list[float] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        drivers.act(
            f"tell('address 127.0.0.1:{server.getsockname()[1]}'); {DIES}",
            "note(time.time()); tell('code 0')",
        )

        def listen() -> None:
            listening_s.append(time.time())
            server.listen()

        timer = threading.Timer(6 * AGAIN_AFTER_S, listen)
        timer.start()
        assert guard([], cluster(wait_for_nodes_s=60)) == 0
        timer.join()
    assert float(drivers.log()[-1]) > listening_s[0]


def test_a_cluster_that_never_answers(drivers: Drivers, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        drivers.act(f"tell('address {address}'); {DIES}", DONE)
        started_s = time.monotonic()
        assert guard([], cluster(wait_for_nodes_s=0.5)) == 1
        assert time.monotonic() - started_s > 0.5
    assert len(drivers.log()) == 1
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"scalellm: the Ray cluster at {address} has not answered for 0.5 s "
        "(cluster.wait_for_nodes_s); start it, then go on with --resume auto"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_driver_which_says_what_comes_of_it(
    drivers: Drivers, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    drivers.act(
        f"signal.signal({int(number)}, lambda *_: (tell('code 3'), os._exit(9)));"
        f"os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    )
    assert guard([], cluster()) == 3
    assert len(drivers.log()) == 1
    assert signal.getsignal(number) == before


def test_a_driver_that_is_lost_after_a_signal_is_not_started_again(drivers: Drivers) -> None:
    drivers.act("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    assert guard([], cluster()) == 1
    assert len(drivers.log()) == 1


def test_a_signal_ends_the_wait_for_the_cluster(drivers: Drivers) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        drivers.act(f"tell('address {address}'); {DIES}", "time.sleep(60); tell('code 0')")
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            assert guard([], cluster(wait_for_nodes_s=60)) == 1
        finally:
            timer.cancel()  # with the guard gone, the signal would end the tests
    assert len(drivers.log()) <= 2  # one may come, is told at once, and has nothing to save


def test_a_driver_is_not_in_our_group_and_is_told_when_we_are_killed(drivers: Drivers) -> None:
    python = os.readlink(f"/proc/{os.getpid()}/exe")  # sys.executable is the stand-in
    drivers.act(
        "on_stop(lambda: note('told')); note('ready', os.getpgrp() == os.getpid()); time.sleep(60)"
    )
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from scalellm.clusters._ray_guard import guard
from scalellm.config import ClusterConfig
sys.executable = {str(drivers.path)!r}
guard([], ClusterConfig.model_validate({{"name": "ray", "workers": 1}}))
"""
    process = subprocess.Popen([python, "-c", code])
    drivers.wait_for("ready True")
    process.kill()
    process.wait()
    drivers.wait_for("told")


def test_what_a_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_driver()
    reading, writing = os.pipe()
    monkeypatch.setenv(DRIVER, "0")
    monkeypatch.setenv(_ray_guard._TELL, str(writing))
    tell("address", "10.0.0.1:6379")
    tell("code", 3)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.read() == "address 10.0.0.1:6379\ncode 3\n"
    assert is_driver()


def test_a_mistake_is_said_once_and_ends_with_2(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    """The real driver, which finds it before it needs Ray."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_values))
    words = ["strategy.name=ddp", "cluster.name=ray", "cluster.workers=3"]
    command = [sys.executable, "-m", "scalellm", "train", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("scalellm: ") == 1 and "train.global_batch_size=8" in done.stderr
    assert not Path(tiny_values["run"]["dir"]).exists()
