"""What each launcher leaves in the environment of the processes it starts.

`dist` makes a `World` of it; nothing else should need to know.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple

from scalellm.errors import ConfigError


class Names(NamedTuple):
    """The environment variables in which a launcher tells a rank who it is."""

    rank: str
    local_rank: str
    world_size: str
    local_world_size: str


# Launchers that start processes but set no RANK: taken for a plain start, each would train alone.
WITHOUT_RANK = {
    "srun": Names(
        "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"
    ),
    "mpirun": Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": Names("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
}
# What tells the others, the innermost first.
_MARKS = {
    "accelerate": "ACCELERATE_MIXED_PRECISION",
    "torchrun": "TORCHELASTIC_RUN_ID",
    "deepspeed": "CROSS_SIZE",
}


def read_int(name: str, default: int) -> int:
    """Returns an environment variable. Raises ConfigError if it is no whole number."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number") from None


def name(*, has_rank: bool) -> str:
    """Names who started this process, the innermost if there are several."""
    if os.environ.get("SCALELLM_LAUNCHER"):
        return os.environ["SCALELLM_LAUNCHER"]
    for launcher, names in WITHOUT_RANK.items():
        if not has_rank and read_int(names.world_size, 1) > 1:
            return launcher
    for launcher, mark in _MARKS.items():
        if os.environ.get(mark):
            return launcher
    if has_rank:
        return "another launcher"
    return "sbatch" if _is_batch_script_of_tasks() else "python"


def _is_batch_script_of_tasks() -> bool:
    """In the script itself, outside of srun, slurm counts the tasks of the whole job."""
    return (
        "SLURM_PROCID" in os.environ
        and "SLURM_STEP_NUM_TASKS" not in os.environ
        and read_int("SLURM_NTASKS", 1) > 1
    )


def local_world_size(names: Names) -> int | None:
    """Ranks on this host, on which the threads of each depend; None if nobody says."""
    if names.local_world_size == "SLURM_STEP_TASKS_PER_NODE":
        return _slurm_local_world_size(os.environ.get(names.local_world_size, ""))
    # The deepspeed launcher says LOCAL_SIZE.
    return read_int(names.local_world_size, read_int("LOCAL_SIZE", 0)) or None


def _slurm_local_world_size(per_node: str) -> int | None:
    """Reads slurm's "2(x3),1": two tasks on each of three nodes, one on the fourth."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    counts = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    node = read_int("SLURM_NODEID", 0)
    return counts[node] if 0 <= node < len(counts) else None


def accelerate_asks(*, has_rank: bool) -> dict[str, str]:
    """Returns what `accelerate launch` was told, which it puts into the environment and forgets.

    Keys: `processes` (several, but it started this one alone), `strategy`, `stage`, `precision`.
    """
    asks = {}
    # Without a GPU and without --multi_gpu it starts one process, whatever --num_processes says;
    # all it does for several is to name where they would meet.
    if not has_rank and "MASTER_ADDR" in os.environ:
        asks["processes"] = "several"
    for strategy in ("deepspeed", "fsdp", "megatron_lm"):
        if os.environ.get(f"ACCELERATE_USE_{strategy.upper()}", "").lower() == "true":
            asks["strategy"] = strategy
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage and asks.get("strategy") == "deepspeed":
        asks["stage"] = stage
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        asks["precision"] = precision
    return asks


def restarts() -> int:
    """How often the ranks were started before, by a launcher that starts them again."""
    # Not TORCHELASTIC_RESTART_COUNT: torchrun starts again after a mistake too, such as a run.dir
    # that holds another run.
    return read_int("SCALELLM_RESTARTS", 0)


told: set[str] = set()  # what this process has said


def tell(kind: str, **values: Any) -> None:
    """Says to a cluster that watches this rank what happened; to nobody, if none does.

    One JSON line on the file descriptor SCALELLM_EVENTS_FD: `{"kind": kind, **values}`.
    """
    told.add(kind)
    descriptor = read_int("SCALELLM_EVENTS_FD", -1)
    if descriptor < 0:
        return
    line = json.dumps({"kind": kind, **values}) + "\n"
    try:
        os.write(descriptor, line.encode())
    except OSError:  # nobody listens any more; training does not depend on it
        os.environ.pop("SCALELLM_EVENTS_FD")
