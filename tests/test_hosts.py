"""The machines that tests make of namespaces: alone, joined, killed, and always gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hosts import TOKEN, Host, HostProcess, Hosts, leftovers, why_not

pytestmark = pytest.mark.cluster

MakeHosts = Callable[[int], Hosts]
WITHIN_S = 60.0
PYTHON = [sys.executable, "-I", "-S", "-c"]

# Answers every line with the same line; says the peer's address first.
ECHO = """
import socket
server = socket.create_server(("", 7000))
print("up", flush=True)
link, (address, _) = server.accept()
link.sendall(f"{address}\\n".encode())
while data := link.recv(100):
    link.sendall(data)
"""
# Says a word when asked by a line of the file `ask`, and what comes back within a second.
ASK = """
import socket, sys
link = socket.create_connection((sys.argv[1], 7000), 5)
link.settimeout(1)
print(link.recv(100).decode().strip(), flush=True)
for line in open(sys.argv[2]):
    try:
        link.sendall(line.encode())
        print(link.recv(100).decode().strip() or "closed", flush=True)
    except TimeoutError:
        print("nothing", flush=True)
    except OSError as error:
        print("closed", flush=True)
"""


class Talk:
    """A connection from one host to another, which is asked line by line."""

    def __init__(self, client: Host, server: Host, folder: Path) -> None:
        self.server = server.start([*PYTHON, ECHO], stdout=subprocess.PIPE)
        assert line(self.server) == "up"
        pipe = folder / f"ask-{time.monotonic_ns()}"
        os.mkfifo(pipe)
        self._client = client.start([*PYTHON, ASK, server.name, str(pipe)], stdout=subprocess.PIPE)
        self.client_address = line(self._client)
        self._ask = pipe.open("w", buffering=1)

    def ask(self, word: str) -> str:
        self._ask.write(f"{word}\n")
        return line(self._client)


def line(process: HostProcess) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def test_a_host_is_a_machine_of_its_own(hosts: MakeHosts, tmp_path: Path) -> None:
    first, second = hosts(2)
    assert [host.run(["hostname"]).stdout for host in (first, second)] == ["host-1\n", "host-2\n"]
    for private in ("/tmp/ray", "/dev/shm"):
        assert first.run(["touch", f"{private}/mine"]).returncode == 0
        assert second.run(["ls", private]).stdout == ""
        assert first.run(["ls", private]).stdout == "mine\n"
        assert not Path(private, "mine").exists()
    assert first.run(["touch", "shared"], cwd=tmp_path).returncode == 0
    assert (tmp_path / "shared").exists()
    assert second.run(["ls"], cwd=tmp_path).stdout == "shared\n"
    seen = first.run(["sh", "-c", "echo /proc/[0-9]*"]).stdout.split()
    assert "/proc/1" in seen and len(seen) == 2
    assert second.run(["sh", "-c", "echo $HERE"], env={"HERE": "yes"}).stdout == "yes\n"


def test_hosts_find_each_other_by_name(hosts: MakeHosts, tmp_path: Path) -> None:
    """And a host finds itself on loopback, as Debian has it: the trap of every rendezvous."""
    first, second = hosts(2)
    assert Talk(first, second, tmp_path).client_address == first.address
    assert Talk(second, first, tmp_path).client_address == second.address
    own = [*PYTHON, "import socket; print(socket.gethostbyname(socket.gethostname()))"]
    assert first.run(own).stdout == "127.0.1.1\n"


def test_harnesses_do_not_meet(hosts: MakeHosts, tmp_path: Path) -> None:
    [alone], [other] = hosts(1), hosts(1)
    assert alone.address == other.address
    for host in (alone, other):
        process = host.start([*PYTHON, ECHO], stdout=subprocess.PIPE)
        assert line(process) == "up"


def test_a_pulled_cable_loses_nothing_that_was_said(hosts: MakeHosts, tmp_path: Path) -> None:
    first, second = hosts(2)
    talk = Talk(first, second, tmp_path)
    assert talk.ask("one") == "one"
    second.unplug()
    assert talk.ask("two") == "nothing"
    second.plug()
    assert eventually(lambda: talk.ask("three").endswith("three"))


@pytest.mark.parametrize(("silent", "peer_hears"), [(False, "closed"), (True, "nothing")])
def test_a_killed_host(hosts: MakeHosts, tmp_path: Path, silent: bool, peer_hears: str) -> None:
    made = hosts(2)
    first, second = made
    talk = Talk(first, second, tmp_path)
    survivor = first.start(["sleep", "1000"])
    # Neither a session of its own nor an empty environment saves a process.
    second.run(["sh", "-c", "setsid env -i sleep 1234567 >/dev/null 2>&1 &"])
    # The shell does not wait until it has dropped its environment.
    assert eventually(lambda: any("sees a mount" in left for left in leftovers(made.token)))
    before = len(leftovers(made.token))

    second.kill(silent=silent)
    assert talk.server.returncode == -signal.SIGKILL
    assert not any("sees a mount" in left for left in leftovers(made.token))
    assert 0 < len(leftovers(made.token)) < before
    assert talk.ask("anyone") == peer_hears
    assert survivor.poll() is None
    with pytest.raises(RuntimeError, match="host-2 is off; call revive"):
        second.run(["true"])

    second.revive()
    assert len(second.run(["sh", "-c", "echo /proc/[0-9]*"]).stdout.split()) == 2
    assert Talk(first, second, tmp_path).client_address == first.address
    with pytest.raises(RuntimeError, match="host-2 is on already"):
        second.revive()


def test_signals_reach_the_command(hosts: MakeHosts) -> None:
    [host] = hosts(1)
    trap = "trap 'exit 3' TERM; echo up; while true; do sleep 0.02; done"
    process = host.start(["sh", "-c", trap], stdout=subprocess.PIPE)
    assert line(process) == "up"
    process.terminate()
    assert process.wait(WITHIN_S) == 3
    early = host.start(["sleep", "1000"])
    early.kill()  # before nsenter had time to start it
    assert early.wait(WITHIN_S) == -signal.SIGKILL


def test_a_command_that_takes_too_long(hosts: MakeHosts) -> None:
    [host] = hosts(1)
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "1000"], timeout=0.2)
    assert len(host.run(["sh", "-c", "echo /proc/[0-9]*"]).stdout.split()) == 2


# -- nothing is left ----------------------------------------------------------------------------

OWNER = """
import os, time

def test_owner(hosts):
    made = hosts(2)
    for host in made:
        host.start(["sleep", "1000"])
        host.run(["sh", "-c", "setsid env -i sleep 1000 >/dev/null 2>&1 &"])
    if pid := os.fork():
        with open("token", "w") as file:
            file.write(made.token)
        os.rename("token", f"token-{pid}")  # whoever finds it finds it whole
    else:
        time.sleep(1000)  # an heir of all open files, which outlives the owner
    ENDING
"""


@pytest.mark.parametrize(
    ("ending", "sends", "code"),
    [
        ("pass", None, 0),
        ("assert not made", None, 1),
        ("os._exit(9)", None, 9),
        ("time.sleep(1000)", signal.SIGINT, 2),
        ("time.sleep(1000)", signal.SIGTERM, -signal.SIGTERM),
        ("time.sleep(1000)", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_nothing_is_left(
    ending: str, sends: signal.Signals | None, code: int, tmp_path: Path
) -> None:
    """However the test ends, and even if it never hears of its end."""
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "test_owner.py").write_text(OWNER.replace("ENDING", ending))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    owner = subprocess.Popen(
        [*command, "--rootdir=.", "test_owner.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    child = 0
    try:
        assert eventually(lambda: any(tmp_path.glob("token-*")) or owner.poll() is not None)
        [file] = tmp_path.glob("token-*")
        child, token = int(file.name.partition("-")[2]), file.read_text()
        if sends is not None:
            assert len(leftovers(token)) >= 9  # per host three, and two sleeps; and the switch's
            owner.send_signal(sends)
        assert owner.wait(WITHIN_S) == code
        assert eventually(lambda: not leftovers(token)), leftovers(token)
    finally:
        if owner.poll() is None:
            owner.kill()
            owner.wait()
        if child:
            os.kill(child, signal.SIGKILL)


def test_the_list_of_leftovers_sees_them() -> None:
    process = subprocess.Popen(["sleep", "1000"], env={**os.environ, TOKEN: "abc123"})
    try:
        assert leftovers("abc123") == [f"process {process.pid}: sleep 1000 "]
        assert leftovers("abc124") == []
    finally:
        process.kill()
        process.wait()


# -- where there can be none --------------------------------------------------------------------


def test_who_may_have_no_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask = why_not.__wrapped__
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ask() == "network namespaces need root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask().startswith("not installed: ip, unshare, nsenter")
    for tool in ("ip", "unshare", "nsenter", "mount", "env"):
        (tmp_path / tool).write_text("#!/bin/sh\necho unshare failed: not permitted >&2; exit 1\n")
        (tmp_path / tool).chmod(0o755)
    assert ask() == "namespaces are forbidden here: unshare failed: not permitted"
