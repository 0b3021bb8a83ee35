"""The one helper for tests over several processes.

Ranks are forked (0.1 s, where a spawned one imports torch for seconds) and meet over a file, so no
port is taken. Fork is safe because conftest keeps torch at one thread. A rank that raises fails the
test with its traceback; a rank that hangs is killed after `TIMEOUT_S`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as tdist

TIMEOUT_S = 120


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any
) -> list[Any]:
    """Calls `function(*arguments)` in `world_size` joined processes; returns their results."""
    context = multiprocessing.get_context("fork")
    gc.collect()  # what earlier tests left goes here, where its threads are
    store = folder / f"store-{uuid.uuid4().hex}"
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(theirs, rank, world_size, store, function, arguments)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _results(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=TIMEOUT_S)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} gave no answer in {TIMEOUT_S} s")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failed, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if failed:
                raise AssertionError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return results


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    gc.freeze()  # and nothing of the parent's in the child: freeing a process group waits for them
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    try:
        tdist.init_process_group(
            "gloo", store=tdist.FileStore(str(store), world_size), rank=rank, world_size=world_size
        )
        answer = (False, function(*arguments))
        tdist.barrier()
        tdist.destroy_process_group()
    except BaseException:
        answer = (True, traceback.format_exc())
    # Plain pickle: the pipe's own would share tensors by file descriptors of a process that ends.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skip exit handlers that belong to the parent (pytest's among them)
