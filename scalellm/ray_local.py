"""A Ray cluster of our own for the length of a `with`: on this machine's loopback, with a token.

It is without what nobody needs here, which matters on a machine whose cores the ranks share: no
dashboard, no figures, no helpers that only watch.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCAL = "local"
_END_WITHIN_S = 3.0
_REMOVE_WITHIN_S = 5.0
# In the environment of all that belongs to a cluster of our own: its folder.
_MARK = "SCALELLM_RAY_FOLDER"
# Sockets lie in Ray's folder, 66 characters below it, and their paths end at 107.
_MAX_TMP_CHARS = 24
_LOOPBACK = "127.0.0.1"
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


@contextmanager
def local_ray(num_cpus: int | None) -> Iterator[None]:
    """Starts Ray in a folder that is removed in the end; None: all CPUs of the machine."""
    import ray

    base = tempfile.gettempdir()
    parent = base if len(base) <= _MAX_TMP_CHARS else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="slm-ray-", dir=parent))
    token = {} if _has_own_token() else {"RAY_AUTH_TOKEN": _TOKEN}
    try:
        with environment(_LOCAL | token | {_MARK: str(folder)}), _loopback_kept():
            with handlers_kept():
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
def environment(values: dict[str, str]) -> Iterator[None]:
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
def handlers_kept() -> Iterator[None]:
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
