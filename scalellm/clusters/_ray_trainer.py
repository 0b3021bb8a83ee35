"""The run as Ray Train sees it: workers, where they are placed, and what happens to them."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from scalellm.clusters._ray_causes import NODE_DIED, cause_of_loss
from scalellm.clusters._ray_worker import LOG_FOLDER, POLL_S, work
from scalellm.config import ClusterConfig, Config

# Ranks that are to make room save first; those whose peers are gone may hang in a collective.
_LEAVE_WITHIN_S = 120.0
_FAIL_WITHIN_S = 5.0
_LEAVE_POLL_S = 0.2
# How long Ray may take to notice that a node is gone, after its peers have.
_NODE_DEATH_S = 2.0


def make_trainer(config: Config, job: dict[str, Any], *, is_local: bool) -> Any:
    """Returns a Ray Train trainer whose `fit()` runs `work(job)` on every worker.

    Args:
        is_local: the cluster was started for this run and ends with it.
    """
    import ray.train
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class SharedGpus(Backend):
        """Every rank of a node sees the GPUs of all of them, as under any launcher."""

        share_cuda_visible_devices = True

    class Ranks(BackendConfig):
        """No process group: the ranks make it themselves."""

        @property
        def backend_cls(self) -> type[Backend]:
            return SharedGpus

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ not in unused]

    # Each keeps an actor, which wakes a hundred times a second. We give Ray no datasets; and where
    # the cluster ends with its driver, no placement group stays behind.
    unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if is_local else set())
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    cluster = config.cluster
    bounds = cluster.ranks
    return Trainer(
        work,
        train_loop_config=job,
        backend_config=Ranks(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(bounds.min, bounds.max) if cluster.is_elastic else bounds.max,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(cluster),
            placement_strategy=_placement(cluster),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
            storage_path=str(config.run.dir / LOG_FOLDER),
            # We count failures ourselves: a user's mistake and a node taken away are none.
            failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[_watcher(job["board"])],
        ),
    )


def _watcher(board: Any) -> Any:
    """Returns what Ray's controller calls when a group of workers starts, fails and ends."""
    import ray
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Watcher(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            self._nodes = [worker.metadata.node_ip for worker in worker_group.get_workers()]
            ray.get(board.begin.remote(self._nodes))

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            errors = worker_group_status.errors
            causes = {rank: cause_of_loss(error) for rank, error in errors.items()}
            lost = {rank: text for rank, text in causes.items() if text}
            if errors and not lost:  # those who are left spoke first
                time.sleep(_NODE_DEATH_S)
                alive = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
                gone = [rank for rank, node in enumerate(self._nodes) if node not in alive]
                lost = dict.fromkeys(gone, NODE_DIED)
            if lost:
                ray.get(board.lost.remote(lost))

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            started_s = time.monotonic()
            while True:
                num_left, has_died = ray.get(board.leave.remote("a change of the cluster"))
                patience_s = _FAIL_WITHIN_S if has_died else _LEAVE_WITHIN_S
                if not num_left:
                    return
                if time.monotonic() - started_s > patience_s:
                    break
                time.sleep(_LEAVE_POLL_S)
            ray.get(board.kill.remote())
            time.sleep(2 * POLL_S)

    return Watcher()


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    resources = {"CPU": cluster.cpus_per_worker, **cluster.resources_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def _placement(cluster: ClusterConfig) -> str:
    """Ray's word for it; `nodes` of one worker each are meant to be so many."""
    if cluster.nodes is None or cluster.nodes == 1:
        return "STRICT_PACK" if cluster.nodes == 1 else cluster.placement.upper()
    return "STRICT_SPREAD" if cluster.workers_per_node == 1 else "SPREAD"
