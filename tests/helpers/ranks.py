"""The one helper for tests over several processes.

Ranks are forked (0.1 s, where a spawned one imports torch for seconds) and meet over a file, so no
port is taken. OpenMP's threads do not survive a fork, and a child that counts on them hangs,
so each rank computes in one. A rank that raises fails the test
with its traceback; a rank that hangs is killed after `TIMEOUT_S`, and the test says where it was.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
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
        stack = store.with_suffix(f".{rank}.stack")
        process = context.Process(
            target=_rank_main, args=(theirs, rank, world_size, store, stack, function, arguments)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _results(pipes)
    except TimeoutError as error:
        stacks = [_stack(process, store, rank) for rank, process in enumerate(processes)]
        raise AssertionError("\n\n".join([str(error), *stacks])) from None
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
            raise TimeoutError(f"ranks {sorted(waiting)} gave no answer in {TIMEOUT_S} s")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failed, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if failed:
                raise AssertionError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return results


def _stack(process: multiprocessing.process.BaseProcess, store: Path, rank: int) -> str:
    """Where a rank's threads are; it must not have ended."""
    stack = store.with_suffix(f".{rank}.stack")
    if not process.is_alive() or not stack.exists():
        return f"rank {rank} has ended or not begun"
    os.kill(process.pid or 0, signal.SIGUSR1)
    time.sleep(1)
    lines = stack.read_text().splitlines()
    ours = [line for line in lines if "/_pytest/" not in line and "/pluggy/" not in line]
    return "\n".join([f"rank {rank} is at", *ours])


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: Path,
    stack: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    gc.freeze()  # and nothing of the parent's in the child: freeing a process group waits for them
    faulthandler.register(signal.SIGUSR1, stack.open("w"))
    torch.set_num_threads(1)
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
