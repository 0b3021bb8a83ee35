"""Ranks on a Ray cluster: `cluster.name: ray`.

Ray Train places the workers, finds out that one is gone, and starts them again, more or fewer if
the run is elastic. Training itself, its files and its checkpoints are those of any other launcher;
Ray is given the path of each checkpoint and the latest metrics, nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from scalellm.clusters._ray_board import Board
from scalellm.clusters._ray_guard import ADDRESS, DRIVER, tell
from scalellm.clusters._ray_story import JOURNAL, Story
from scalellm.clusters._ray_trainer import make_trainer
from scalellm.clusters._ray_worker import LOG_FOLDER, POLL_S
from scalellm.config import Config
from scalellm.cores import available_cores
from scalellm.data import TokenDataset
from scalellm.dist import World
from scalellm.errors import (
    EXIT_FAILURE,
    EXIT_STOPPED_BY_SIGNAL,
    EXIT_USER_ERROR,
    ConfigError,
    UserError,
)
from scalellm.ray_session import Session, ray_session, ray_session_again
from scalellm.train import check_config
from scalellm.train.folder import check_holds_no_run, dump_config

_POLL_S = 1.0
_WAITING_EVERY_S = 30.0
_LOST_AFTER_S = 45.0
# Read by Ray when it is imported, in this process and in those it starts for us.
_RAY_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


def train_on_ray(config: Config, resume: str | None = None) -> int:
    """Trains as `config` says on a Ray cluster; returns the exit code. For a driver of `guard`.

    SIGTERM and Ctrl-C ask all ranks to save and stop.

    Raises:
        UserError: a mistake that shows before any rank starts.
    """
    code = EXIT_FAILURE
    try:
        code = _train_on_ray(config, resume)
    except UserError:
        code = EXIT_USER_ERROR
        raise
    finally:
        tell("code", code)
    return code


def _train_on_ray(config: Config, resume: str | None) -> int:
    usable = usable_ranks(config)
    config = with_absolute_paths(config)
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    cluster = config.cluster
    if cluster.is_elastic:
        # After a loss Ray asks for as many as before first; with less room that is in vain.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    num_cpus = max(available_cores(), round(cluster.ranks.max * cluster.cpus_per_worker + 0.5))
    lost = os.environ.get(ADDRESS)  # of the driver before this one
    _check_before_start(config, resume)
    with (
        _nothing_left(config.run.dir) as remove,
        _stop_asked() as stop,
        (
            ray_session_again(lost, cluster.wait_for_nodes_s, lambda: bool(stop))
            if lost
            else ray_session(cluster.address, num_cpus=num_cpus)
        ) as session,
    ):
        if not session.is_local:
            tell("address", session.address)
        else:  # nobody takes this machine away, or looks at its figures; each costs a process
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        _check_room(config, session)
        driver = _Driver(config, resume, usable, stop, is_local=session.is_local)
        code = driver.run()
        if not driver.has_trained:
            remove()
    return code


def usable_ranks(config: Config) -> dict[int, int]:
    """How many of so many ranks can train: the most that divide the batch and suit the strategy.

    Raises:
        ConfigError: not even the fewest that the cluster may start.
    """
    bounds = config.cluster.ranks
    usable: dict[int, int] = {}
    for world_size in range(bounds.min, bounds.max + 1):
        try:
            check_config(config, World(world_size=world_size, launcher="ray"))
            usable[world_size] = world_size
        except ConfigError:
            if not usable:
                raise
            usable[world_size] = usable[world_size - 1]
    return usable


def with_absolute_paths(config: Config) -> Config:
    """Ranks run elsewhere: what is relative lies in the storage they share."""
    root = (config.cluster.storage_path or Path.cwd()).absolute()
    run = config.run.model_copy(update={"dir": root / config.run.dir})
    data = config.data.with_paths(lambda path: root / path)
    return config.model_copy(update={"run": run, "data": data})


class _Driver:
    """One run: hands it to Ray Train in a thread, and tells what happens meanwhile."""

    def __init__(
        self,
        config: Config,
        resume: str | None,
        usable: dict[int, int],
        stop: list[str],
        *,
        is_local: bool,
    ) -> None:
        import ray

        self._is_local = is_local

        self._config, self._resume, self._usable, self._stop = config, resume, usable, stop
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board)
        self._board: Any = board.remote()
        self._story = Story(config.run.dir, config.cluster.max_failures)
        self._result: int | None = None
        self._error: BaseException | None = None

    @property
    def has_trained(self) -> bool:
        return self._story.has_trained

    def run(self) -> int:
        """Returns the exit code of the run."""
        import ray.train

        thread = threading.Thread(target=self._fit, daemon=True)
        thread.start()
        waiting_since_s, said_s, next_event, told = time.monotonic(), 0.0, 0, False
        while thread.is_alive() and self._story.code is None:
            time.sleep(_POLL_S)
            next_event = self._listen(next_event)
            if self._stop and not told:
                told = True
                self._tell_to_stop()
            if self._story.has_room:
                waiting_since_s = time.monotonic()
            waited_s = time.monotonic() - waiting_since_s
            if waited_s > self._config.cluster.wait_for_nodes_s:
                return self._give_up(waited_s)
            if waited_s > said_s + _WAITING_EVERY_S:
                said_s = waited_s
                _say(f"still waiting for {_needs(self._config)} to start; {_has()}")
            elif waited_s < said_s:
                said_s = 0.0
        time.sleep(_POLL_S if self._story.code is not None else 0.0)  # the last words
        self._listen(next_event)
        if self._story.code is not None:
            ray.get(self._board.kill.remote(), timeout=_LOST_AFTER_S)
            time.sleep(2 * POLL_S)
            return self._story.code
        if self._error is not None:
            words = " ".join(str(self._error).split()) or repr(self._error)
            if isinstance(self._error, ray.train.TrainingFailedError):
                _say(f"Ray Train has failed: {words[:200]}")
                _leave_lost_cluster()  # not a rank, which would be tried again, but Ray itself
            _say(f"Ray Train cannot run this: {words[:300]}")
            return EXIT_FAILURE
        if self._result == EXIT_STOPPED_BY_SIGNAL and not self.has_trained:
            return self._stopped_early()
        return EXIT_FAILURE if self._result is None else self._result

    def _listen(self, start: int) -> int:
        import ray

        try:
            end, events = ray.get(self._board.read.remote(start), timeout=_LOST_AFTER_S)
        except ray.exceptions.RayError:
            _leave_lost_cluster()
        for event in events:
            self._story.take(event)
        self._story.tick()
        return int(end)

    def _tell_to_stop(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):  # `_listen` will find the same
            ray.get(self._board.stop.remote(self._stop[0]), timeout=_LOST_AFTER_S)
        if not self._story.has_room:
            self._story.code = self._stopped_early()

    def _stopped_early(self) -> int:
        """No rank trains that could save."""
        when = "while no rank trained" if self.has_trained else "before any rank trained"
        later = "; go on from the last checkpoint with --resume auto" if self.has_trained else ""
        _say(f"stopped by {self._stop[0]} {when}{later}")
        return EXIT_FAILURE

    def _give_up(self, waited_s: float) -> int:
        _say(
            f"waited {waited_s:.0f} s for room for {_needs(self._config)} "
            f"(cluster.wait_for_nodes_s); {_has()}: add nodes or ask for less, then go on with "
            "--resume auto"
        )
        return EXIT_FAILURE

    def _fit(self) -> None:
        try:
            job = {
                "config": dump_config(self._config),
                "resume": self._resume,
                "restarts": int(os.environ[DRIVER]),
                "run_dir": str(self._config.run.dir),
                "path": [os.getcwd()],
                "usable": self._usable,
                "cpus": self._config.cluster.cpus_per_worker,
                "board": self._board,
            }
            result = make_trainer(self._config, job, is_local=self._is_local).fit()
            self._result = int(result.return_value["code"])
        except BaseException as error:
            self._error = error


def _leave_lost_cluster() -> NoReturn:
    """Ends this process without a word to the guard; `ray.shutdown` might wait for ever."""
    sys.stdout.flush()
    os._exit(EXIT_FAILURE)


def _check_before_start(config: Config, resume: str | None) -> None:
    """What the ranks would find too, but only after Ray has started them.

    And what they could not: ranks that are started again go on with what lies in `run.dir`.
    """
    if config.run.device == "cuda" and not config.cluster.gpus_per_worker:
        raise ConfigError(
            "run.device=cuda needs GPUs reserved for the ranks; set cluster.gpus_per_worker=1"
        )
    for path in config.data.paths.values():
        # Else the driver may not share the storage, or not hold the ranks' credentials.
        if config.cluster.address is None if isinstance(path, str) else path.parent.exists():
            TokenDataset.open(path, "train", config.data.remote)
    if resume is None and os.environ[DRIVER] == "0":
        check_holds_no_run(config.run.dir)


def _check_room(config: Config, session: Session) -> None:
    """A cluster of one machine will not grow; of any other one more nodes may be under way."""
    import ray

    cluster = config.cluster
    has_gpus = ray.cluster_resources().get("GPU", 0.0)
    needs_gpus = cluster.gpus_per_worker * cluster.ranks.min
    if session.is_local and needs_gpus > has_gpus:
        raise ConfigError(
            f"cluster.gpus_per_worker={cluster.gpus_per_worker:g} GPUs for {cluster.ranks.min} "
            f"ranks is more than the {has_gpus:g} of this machine; lower it, or join a cluster "
            "with cluster.address"
        )


def _needs(config: Config) -> str:
    cluster = config.cluster
    ranks = f"{cluster.ranks.min} rank{'s' if cluster.ranks.min > 1 else ''}"
    gpus = f" and {cluster.gpus_per_worker:g} GPUs" if cluster.gpus_per_worker else ""
    others = "".join(f" and {n:g} {what}" for what, n in cluster.resources_per_worker.items())
    nodes = f" on {cluster.nodes} nodes" if cluster.nodes else ""
    return f"{ranks} of {cluster.cpus_per_worker:g} CPUs{gpus}{others} each{nodes}"


def _has() -> str:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    alive = sum(node["Alive"] for node in ray.nodes())
    has = [name for name in ("CPU", "GPU") if name in total]
    parts = [f"{free.get(name, 0):g} of {total[name]:g} {name}s" for name in has]
    return f"free on {alive} nodes: {' and '.join(parts) or 'nothing'}"


@contextmanager
def _stop_asked() -> Iterator[list[str]]:
    """Collects the names of SIGTERM and SIGINT for the length of a `with`; a third one ends us."""
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _nothing_left(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Gives what removes all that this run has put there and was not there before."""
    made = [run_dir / LOG_FOLDER, run_dir / JOURNAL, run_dir]
    new = [path for path in made if not path.exists()]

    def remove() -> None:
        for path in new:
            with suppress(OSError):  # what holds more than that stays
                path.unlink() if path.is_file() else _remove_folder(path)

    def _remove_folder(path: Path) -> None:
        shutil.rmtree(path) if path.name == LOG_FOLDER else path.rmdir()

    yield remove


def _say(words: str) -> None:
    print(f"scalellm: {words}", file=sys.stderr, flush=True)
