"""Shared fixtures: a tiny real dataset, a tiny config, and rank processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

# First of all: fork after a multi-threaded matrix product would hang in the child (see ranks.py).
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has Ctrl-C ignored, and so would all they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
from helpers.hosts import Hosts, why_not
from helpers.ranks import run_ranks

from scalellm.config import Config, parse_config

# How long an example takes says more of the machine's other work than of the code.
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = {
    "data": {"lanes": 4},
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "seq_len": 32},
    "train": {
        "steps": 6,
        "global_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "grad_clip": 0.5,
    },
    "metrics": {"tensorboard": False},
}


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A char dataset of a few real Python files: about 60,000 tokens and a validation split."""
    from scalellm.data.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("tiny")
    library = Path(os.__file__).parent
    source = folder / "text"
    source.mkdir()
    for name in ("abc", "bisect", "heapq", "keyword", "stat", "this", "contextlib"):
        (source / f"{name}.py").write_text((library / f"{name}.py").read_text(encoding="utf-8"))
    options = PrepareOptions(
        sources=(str(source),),
        out=folder / "data",
        tokenizer="char",
        val_fraction=0.1,
        num_workers=1,
    )
    prepare(options, progress=False)
    return folder / "data"


@pytest.fixture
def tiny_values(tiny_dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """Plain values of a config that trains in a second; change them, then `parse_config`."""
    values = {section: dict(content) for section, content in TINY.items()}
    values["data"]["path"] = str(tiny_dataset)
    values["run"] = {"dir": str(tmp_path / "run"), "threads": 1}
    return values


@pytest.fixture
def tiny_config(tiny_values: dict[str, Any]) -> Config:
    return parse_config(tiny_values)


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(function, world_size, *arguments)`: each rank's return value, in rank order."""

    def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        return run_ranks(function, world_size, tmp_path, *arguments)

    return run


@pytest.fixture
def hosts() -> Iterator[Callable[[int], Hosts]]:
    """`first, second = hosts(2)`: machines that end with the test; see helpers/hosts.py."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(Hosts(count))
