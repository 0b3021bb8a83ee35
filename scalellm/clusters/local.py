"""Ranks on this machine, started by torchrun's own API."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from scalellm.errors import EXIT_FAILURE, EXIT_STOPPED_BY_SIGNAL, ConfigError

MAX_RANKS = 1024


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs `python -m scalellm ARGUMENTS` in `nproc` ranks and returns the run's exit code.

    The ranks find each other by the environment that torchrun sets. If one fails, the others are
    ended, and its exit code is returned. SIGTERM and SIGINT are passed on to the ranks, which save.
    """
    if not 1 <= nproc <= MAX_RANKS:
        raise ConfigError(f"--nproc={nproc} ranks is not between 1 and {MAX_RANKS}")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a failed rank is forty lines about a sentence that the rank has printed itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "scalellm", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), EXIT_FAILURE)
    except SignalException:
        return EXIT_STOPPED_BY_SIGNAL
    return 0
