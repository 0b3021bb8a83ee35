"""What the environment of a training process says to libraries, before they load."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Read by OpenMP when torch loads. Its own default lets a waiting thread spin for milliseconds,
    # which costs up to six times the speed when anything else runs on the machine (docs/log.md).
    "GOMP_SPINCOUNT": "20000",
    # Read at torch's first allocation. Tensors of 2 MiB and more then lie on huge pages, where
    # Linux gives them to who asks ("madvise", the usual setting). A step asks for hundreds of
    # megabytes anew, and the page faults of 4 KiB take up to a fifth of it (docs/log.md).
    "THP_MEM_ALLOC_ENABLE": "1",
    # Read when torch loads. DDP warns on every rank that walking the graph found nothing.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_environment() -> None:
    """Sets `ENVIRONMENT`, but for what the user has set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
