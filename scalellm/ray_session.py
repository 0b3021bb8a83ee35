"""A Ray cluster for the length of a `with`: one that runs already, or one of our own, here.

`ray.init` waits for minutes at a wrong address, and a wrong version or token may end the process
from C++. So an address is tried first: by TCP, then by a process that is ended after a time limit.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scalellm.errors import UserError

LOCAL = "local"
_AUTO = "auto"
_CONNECT_WITHIN_S = 5.0
_JOIN_WITHIN_S = 20.0
_END_WITHIN_S = 3.0
_REMOVE_WITHIN_S = 5.0
# In the environment of all that belongs to a cluster of our own: its folder.
_MARK = "SCALELLM_RAY_FOLDER"
# Sockets lie in Ray's folder, 66 characters below it, and their paths end at 107.
_MAX_TMP_CHARS = 24
_LOOPBACK = "127.0.0.1"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What raylets say of workers that died, which Ray prints although asked not to.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_LOCAL = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    # What a dashboard would show, which is off; every process of Ray would send it each second.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill ranks; `check_resources` looks before
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "10",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # for the workers: see _loopback_kept
}
# A token of this process, never on disk. One, because Ray remembers the first it has read.
_TOKEN = secrets.token_hex(32)
_JOIN = """
import json, sys
import ray
try:
    ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
    print(json.dumps(None))
except Exception as error:
    print(json.dumps([type(error).__name__, f"{error} {error.__cause__ or ''}"]))
"""


@dataclass(frozen=True)
class Session:
    """The cluster in use.

    Attributes:
        address: HOST:PORT of its GCS.
        is_local: it was started here and ends with the `with`.
        hosts: addresses of the nodes that live, sorted.
    """

    address: str
    is_local: bool
    hosts: tuple[str, ...]


@contextmanager
def ray_session(address: str | None, *, num_cpus: int | None = None) -> Iterator[Session]:
    """Joins a Ray cluster, or starts one on this machine's loopback and ends it.

    The cluster of our own has a token, no dashboard, and a folder that is removed in the end. A
    session that this process has already is used as it is, and left.

    Args:
        address: HOST:PORT of a cluster; "auto" for RAY_ADDRESS or the one `ray start` started here;
            "local" for one of our own; None for "auto" if there is one, else "local".
        num_cpus: CPUs a cluster of our own offers; None: the machine's. Others have their own.

    Raises:
        UserError: Ray is not installed, or there is no such cluster, or it cannot be joined.
    """
    if find_spec("ray") is None:
        raise UserError("Ray is not installed; install it with: pip install 'scalellm[ray]'")
    with _environment(_QUIET):
        import ray

        if ray.is_initialized():
            yield _session(is_local=False)
            return
        found = _find(address)
        join = _start_here(num_cpus) if found is None else _join(found, address)
        with join:
            yield _session(is_local=found is None)


def _session(*, is_local: bool) -> Session:
    import ray

    hosts = {str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    address = str(ray.get_runtime_context().gcs_address)
    return Session(address=address, is_local=is_local, hosts=tuple(sorted(hosts)))


def _find(address: str | None) -> str | None:
    """Returns HOST:PORT of a running cluster, or None to start one.

    Raises:
        UserError: nothing answers at an address that the user gave.
    """
    if address not in (None, _AUTO):
        return None if address == LOCAL else _answering(str(address))
    from_environment = os.environ.get("RAY_ADDRESS")
    if from_environment and from_environment != _AUTO:
        return None if from_environment == LOCAL else _answering(from_environment)
    from ray._private.utils import read_ray_address

    noted = read_ray_address()  # by `ray start`, which does not always remove it
    if noted and _answers(*_split(noted)):
        return str(noted)
    if address is None:
        return None
    raise UserError(
        "no Ray cluster runs on this machine; start one with `ray start --head`, or give the "
        "HOST:PORT of one"
    )


def _answering(address: str) -> str:
    host, port = _split(address)
    if not _answers(host, port):
        raise UserError(
            f"no Ray cluster answers at {address} within {_CONNECT_WITHIN_S:g} s; give the "
            "HOST:PORT that `ray start --head` printed, or local to start one here"
        )
    return address


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"{address!r} is no address of a Ray cluster; give HOST:PORT of its head, such as "
            "10.0.0.1:6379, auto or local"
        )
    return host.strip("[]"), int(port)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_WITHIN_S).close()
    except OSError:
        return False
    return True


@contextmanager
def _join(found: str, asked: str | None) -> Iterator[None]:
    import ray

    # Ray looks for a token by itself only at an address it was not given explicitly.
    address = found if asked == found else _AUTO
    with _environment({"RAY_ADDRESS": found}):
        _try_to_join(address, found)
        with _handlers_kept():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def _try_to_join(address: str, found: str) -> None:
    command = [sys.executable, "-c", _JOIN, address]
    try:
        with _environment({"RAY_NUM_REDIS_GET_RETRIES": "3"}):  # a second each
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_JOIN_WITHIN_S, check=False
            )
        problem = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{found} answers, but did not let this process join a Ray cluster within "
            f"{_JOIN_WITHIN_S:g} s; give the port of the cluster's GCS (6379 unless changed), not "
            "of its dashboard or client server"
        ) from None
    except (IndexError, ValueError):
        problem = ["", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]]
    if problem is not None:
        raise _explained(found, *problem)


def _explained(found: str, kind: str, message: str) -> UserError:
    message = " ".join(message.split())
    if kind == "AuthenticationError" or "token" in message.lower():
        return UserError(
            f"the Ray cluster at {found} asks for its token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as on its nodes"
        )
    if "ersion mismatch" in message:
        return UserError(
            f"the Ray cluster at {found} runs another version: {message[:400]}; install the same "
            "versions of Ray and Python here and there"
        )
    return UserError(
        f"cannot join the Ray cluster at {found}: {message[:300]}; is this machine one of its "
        f"nodes (`ray start --address={found}`)?"
    )


@contextmanager
def _start_here(num_cpus: int | None) -> Iterator[None]:
    import ray

    base = tempfile.gettempdir()
    parent = base if len(base) <= _MAX_TMP_CHARS else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="slm-ray-", dir=parent))
    token = {} if _has_own_token() else {"RAY_AUTH_TOKEN": _TOKEN}
    try:
        with _environment(_LOCAL | token | {_MARK: str(folder)}), _loopback_kept():
            with _handlers_kept():
                _refresh_auth_mode()
                ray.init(
                    address=LOCAL,
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level="ERROR",
                    log_to_driver=False,
                    _node_ip_address=_LOOPBACK,
                    _temp_dir=str(folder),
                )
            _end_idle_helpers()
            yield
    finally:
        ray.shutdown()
        _end_the_rest(folder)
        _remove(folder)


def _end_idle_helpers() -> None:
    """Ends what collects lines for drivers that want them, asks for more machines, or shows pages.

    None has anything to do here, and the first takes more of a core than any other helper.
    """
    from ray._private import worker

    node = worker._global_node
    assert node is not None
    node.kill_log_monitor(check_alive=False)
    node.kill_monitor(check_alive=False)
    node.kill_dashboard(check_alive=False)


def _has_own_token() -> bool:
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def _refresh_auth_mode() -> None:
    """Makes Ray read RAY_AUTH_MODE again, as `ray.init` does where it sets it itself."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


@contextmanager
def _loopback_kept() -> Iterator[None]:
    """Keeps Ray from replacing 127.0.0.1 by this host's own address and listening on all.

    It does not on systems where it knows no clusters, so it is told to be on one.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _end_the_rest(folder: Path) -> None:
    """Ends what `ray.shutdown` has left.

    A signal to the whole group ends Ray's node manager before it can end its helpers, which then
    look for it for up to a minute.
    """
    deadline_s = time.monotonic() + _END_WITHIN_S
    while (left := _processes_of(folder)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(folder: Path) -> list[int]:
    """Processes of the cluster in `folder`, where the system shows them (Linux)."""
    mark, found = f"{_MARK}={folder}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_marked = mark in (process / "environ").read_bytes() + b"\0"
            # What this process has started itself is its own business.
            if is_marked and _parent_of(process) != os.getpid():
                found.append(int(process.name))
    return found


def _parent_of(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _remove(folder: Path) -> None:
    """Removes Ray's folder, while its last processes may still write there."""
    deadline_s = time.monotonic() + _REMOVE_WITHIN_S
    while folder.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Puts back the signal handlers that `ray.init` replaces: SIGTERM would skip ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.getsignal(number) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
