"""Two or three machines in one: each is a set of Linux namespaces, joined by a virtual switch.

A host has its own network, process tree, host name, `/etc/hosts`, `/tmp/ray` and `/dev/shm`; all
other files are shared, as on a cluster with shared storage. Nothing of it is visible outside, not
even its interfaces, so harnesses run side by side and no address is taken; talk to a host from
inside of it. Needs root, iproute2 and util-linux. An empty /tmp/ray is made where there is none.

Nothing has a name that would have to be deleted: namespaces, interfaces and mounts exist as long as
a process in them. The first process of each host watches the process that made it (by a pidfd,
which not even kill -9 outwits) and ends with it; the kernel then ends all the others.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TOKEN = "SCALELLM_TEST_TOKEN"
_TOOLS = ("ip", "unshare", "nsenter", "mount", "env")

# Process 1: no child of its own, it reaps orphans, and ends when its owner has.
_WATCH = """
import select, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
owner = select.poll()
owner.register(int(sys.argv[1]), select.POLLIN)
print("ready", flush=True)
owner.poll()
"""
# The files are unlinked once mounted: Ray and torch find an empty /dev/shm. Without name servers,
# or with some that nobody reaches, every unknown name would take seconds.
_BOOT_HOST = r"""
mkdir -p /tmp/ray
mount -t tmpfs "$MARK" /tmp/ray
mount -t tmpfs "$MARK" /dev/shm
printf '%s\n' "$HOSTS_FILE" > /dev/shm/hosts
: > /dev/shm/resolv.conf
for file in hosts resolv.conf; do
    if [ -e /etc/$file ]; then mount --bind /dev/shm/$file /etc/$file; fi
    rm /dev/shm/$file
done
echo "$NAME" > /proc/sys/kernel/hostname
unset MARK HOSTS_FILE NAME
exec "$@"
"""


@functools.cache
def why_not() -> str:
    """Says why there can be no hosts on this machine; empty if there can."""
    if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
        return "hosts are network namespaces: needs Linux 5.3 or later"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux, coreutils)"
    probe = "mount -t tmpfs p /dev/shm && ip link add type bridge && ip link add type veth"
    command = ["unshare", "-mupn", "--fork", "--mount-proc", "sh", "-c", probe]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"namespaces are forbidden here: {result.stderr.strip()}" if result.returncode else ""


class HostProcess(subprocess.Popen[str]):
    """A process on a host. Its parent out here is nsenter, so signals go to the child of that."""

    def send_signal(self, sig: int) -> None:
        while self.poll() is None:
            if children := _children(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(children[0], sig)
                return
            time.sleep(0.005)  # nsenter has yet to start it


class _Space:
    """Namespaces and the process that keeps them; `pid` is that process, as seen from here."""

    def __init__(self, flags: str, boot: str, environment: Mapping[str, str]) -> None:
        owner = os.pidfd_open(os.getpid())
        try:
            watch = [sys.executable, "-I", "-S", "-c", _WATCH, str(owner)]
            unshare = ["unshare", flags, "--fork", "--kill-child=SIGKILL", "--mount-proc"]
            self._unshare = subprocess.Popen(
                [*unshare, "sh", "-ec", boot, "sh", *watch],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[owner],
                start_new_session=True,  # Ctrl-C is the owner's: it knows the order of ending
            )
        finally:
            os.close(owner)
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces: {self._unshare.communicate()[1]}")
        [self.pid] = _children(self._unshare.pid)

    def ip(self, *commands: str, check: bool = True) -> None:
        """Runs commands of iproute2's `ip` in this network. Raises RuntimeError if one fails."""
        command = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "-batch", "-"]
        lines = "\n".join(commands)
        result = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        if check and result.returncode:
            raise RuntimeError(f"ip: {result.stderr.strip()}")

    def end(self) -> None:
        """Kills all that runs here; no process is left when it returns."""
        if self._unshare.poll() is None:
            for pid in _children(self._unshare.pid):
                os.kill(pid, signal.SIGKILL)
        self._unshare.communicate()


class Host:
    """One machine. `name` and `address` are what its peers call it."""

    def __init__(self, hosts: Hosts, number: int) -> None:
        self.name = f"host-{number}"
        self.address = f"192.168.66.{number}"
        # Kept when it is revived: its peers remember it for half a minute.
        self._hardware_address = f"02:00:00:00:00:{number:02x}"
        self._port = f"port{number}-{hosts.token[:8]}"
        self._hosts = hosts
        self._space: _Space | None = None
        self._processes: list[HostProcess] = []

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: Any = None,
        stderr: Any = subprocess.STDOUT,
    ) -> HostProcess:
        """Starts a command with this process's environment and `env`; it dies with the host."""
        if self._space is None:
            raise RuntimeError(f"{self.name} is off; call revive() first")
        # Entering a mount namespace leads to its root, so the directory is set inside.
        enter = ["nsenter", "-t", str(self._space.pid), "-m", "-u", "-n", "-p"]
        process = HostProcess(
            [*enter, "env", "-C", str(cwd or Path.cwd()), *command],
            env={**os.environ, **(env or {}), TOKEN: self._hosts.token},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        timeout: float = 60.0,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end (options: as for `start`); `stdout` has the errors too.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds and was killed.
        """
        process = self.start(command, **options, stdout=subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def kill(self, *, silent: bool = False) -> None:
        """Ends all processes of this host at once, and its link.

        silent: as when the power fails: the link goes first, so that peers hear of no closed
        connection and can only grow impatient.
        """
        if self._space is None:
            return
        if silent:
            self._hosts.switch.ip(f"link del {self._port}")
        self._space.end()
        for process in self._processes:
            process.wait()
        self._processes.clear()
        self._space = None
        if not silent:  # the kernel does it too, now or some time later
            self._hosts.switch.ip(f"link del {self._port}", check=False)

    def revive(self) -> None:
        """Starts the host, after `kill` or for the first time; nothing of it runs again."""
        if self._space is not None:
            raise RuntimeError(f"{self.name} is on already")
        names = {"HOSTS_FILE": self._hosts_file(), "NAME": self.name, "MARK": self._hosts.mark}
        self._space = _Space("-mupn", _BOOT_HOST, {**names, TOKEN: self._hosts.token})
        peer = f"peer name eth0 address {self._hardware_address} netns {self._space.pid}"
        self._hosts.switch.ip(
            f"link add {self._port} type veth {peer}",
            f"link set {self._port} master {self._hosts.bridge} up",
        )
        self._space.ip(
            "link set lo up",
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "route add default dev eth0",
            # As Docker leaves it on every machine: an address that is no way to the others.
            "link add docker0 type bridge",
            "addr add 172.17.0.1/16 dev docker0",
            "link set docker0 up",
        )

    def unplug(self) -> None:
        """Pulls the cable: nothing gets through, and nobody is told."""
        self._hosts.switch.ip(f"link set {self._port} down")

    def plug(self) -> None:
        self._hosts.switch.ip(f"link set {self._port} up")

    def _hosts_file(self) -> str:
        """Debian's way: a host finds its own name on loopback, which is no use to its peers."""
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name}"]
        for host in self._hosts:
            names = f"{host.name}.test" + ("" if host is self else f" {host.name}")
            lines.append(f"{host.address} {names}")
        return "\n".join(lines)


class Hosts(list[Host]):
    """`with Hosts(2) as (first, second):` two machines that are gone afterwards, come what may.

    `token` is in the environment of all that ran on them, see `leftovers`.
    """

    def __init__(self, count: int) -> None:
        self.token = uuid.uuid4().hex
        self.mark = f"hosts-{self.token}"
        self.bridge = f"switch-{self.token[:8]}"
        super().__init__(Host(self, number) for number in range(1, count + 1))

    def __enter__(self) -> Hosts:
        self.switch = _Space("-mpn", 'exec "$@"', {TOKEN: self.token})
        try:
            self.switch.ip(f"link add {self.bridge} type bridge", f"link set {self.bridge} up")
            for host in self:
                host.revive()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all hosts and waits until the last process is gone."""
        for host in self:
            host.kill()
        self.switch.end()


def leftovers(token: str) -> list[str]:
    """Lists what is left of the hosts with this token: interfaces, processes, mounts."""
    names = [name for _, name in socket.if_nameindex()]
    found = [f"interface {name}" for name in names if name.endswith(token[:8])]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TOKEN}={token}".encode() in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"process {folder.name}: {words}")
            # Also what dropped its environment, but still sees the mounts.
            elif f"hosts-{token}" in (folder / "mountinfo").read_text():
                found.append(f"process {folder.name} sees a mount of the hosts")
        except OSError:
            continue  # it ended meanwhile
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
