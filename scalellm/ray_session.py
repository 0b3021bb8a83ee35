"""A Ray cluster for the length of a `with`: one that runs already, or one of our own, here.

`ray.init` waits for minutes at a wrong address, and a wrong version or token may end the process
from C++. So an address is tried first: by TCP, then by a process that is ended after a time limit.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from scalellm.errors import UserError
from scalellm.ray_local import LOCAL, environment, handlers_kept, local_ray

_AUTO = "auto"
_CONNECT_WITHIN_S = 5.0
_JOIN_WITHIN_S = 20.0
_AGAIN_AFTER_S = 5.0
_GONE = "the lost Ray cluster could not be joined again"
_LATER = "go on from the last checkpoint with --resume auto"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What raylets say of workers that died, which Ray prints although asked not to.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
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
    with environment(_QUIET):
        import ray

        if ray.is_initialized():
            yield _session(is_local=False)
            return
        found = _find(address)
        join = local_ray(num_cpus) if found is None else _join(found, address)
        with join:
            yield _session(is_local=found is None)


@contextmanager
def ray_session_again(
    address: str, within_s: float, is_stopped: Callable[[], bool]
) -> Iterator[Session]:
    """Joins a cluster that was lost: its head answers before it lets anybody in.

    This machine's own node may be missing longer still, and without it nobody here can join.

    Raises:
        UserError: it could not be joined for so long, or `is_stopped`; with the last reason, and
            how to go on.
    """
    deadline_s, said = time.monotonic() + within_s, ""
    with ExitStack() as stack:
        while True:
            try:
                session = stack.enter_context(ray_session(address))
                break
            except UserError as error:
                if is_stopped():
                    raise UserError(f"asked to stop while {_GONE}: {error}; {_LATER}") from None
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"{error}; {_GONE} for {within_s:g} s (cluster.wait_for_nodes_s): {_LATER}"
                    ) from None
                if str(error) != said:
                    said = str(error)
                    print(f"scalellm: trying again: {said}", file=sys.stderr, flush=True)
            time.sleep(_AGAIN_AFTER_S)
        yield session


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
    with environment({"RAY_ADDRESS": found}):
        _try_to_join(address, found)
        with handlers_kept():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def _try_to_join(address: str, found: str) -> None:
    command = [sys.executable, "-c", _JOIN, address]
    try:
        with environment({"RAY_NUM_REDIS_GET_RETRIES": "3"}):  # a second each
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
