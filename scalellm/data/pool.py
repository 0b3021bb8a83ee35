"""Work in other processes: ordered, bounded in memory, and ended with their parent.

Processes are spawned, not forked: a fork of a program with threads (torch, tokenizers) may hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, TypeVar

from scalellm.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")
# Enough that a worker never waits for the parent, few enough to hold in memory.
_AHEAD_PER_WORKER = 2


def ordered_map(
    function: Callable[[In], Out],
    items: Iterable[In],
    num_workers: int,
    setup: Callable[..., None],
    setup_args: tuple[Any, ...] = (),
) -> Generator[Out, None, None]:
    """Yields `function(item)` for every item, in order, computed by worker processes.

    With one worker, or no more items than workers, everything runs in this process. At most
    `_AHEAD_PER_WORKER` items a worker are under way. Close the generator to end the workers early.

    Args:
        function: a function at module level; it and the items are pickled.
        num_workers: processes; 1 starts none.
        setup: run first in every worker (and here, where none is started).

    Raises:
        UserError: a worker died.
    """
    iterator = iter(items)
    first = list(islice(iterator, num_workers + 1)) if num_workers > 1 else []
    if len(first) <= num_workers:
        setup(*setup_args)
        yield from map(function, (item for part in (first, iterator) for item in part))
        return
    executor = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(setup, setup_args),
    )
    pending: deque[Future[Out]] = deque()
    try:
        for item in (item for part in (first, iterator) for item in part):
            with _interrupts_held():  # a worker is born deaf to them: its imports take a second
                pending.append(executor.submit(function, item))
            if len(pending) >= _AHEAD_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise _died("a worker process") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of this block; processes started in it never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call_in_process(function: Callable[..., Out], *args: Any) -> Out:
    """Runs one call in a process of its own, so that Ctrl-C ends even a long call into C++.

    Raises:
        UserError: the process died.
        Exception: what the function raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args), daemon=True)
    with _interrupts_held():
        process.start()
    sender.close()
    try:
        done, value = receiver.recv()
    except EOFError:
        raise _died("the process that trains the tokenizer") from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if not done:
        raise value
    return value


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt like Ctrl-C, so that `finally` blocks run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _died(who: str) -> UserError:
    return UserError(
        f"{who} died, most often because memory ran out; use fewer workers (--workers 1) or "
        "close other programs"
    )


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _end_with_parent()
    try:
        result = (True, function(*args))
    except Exception as error:
        result = (False, error)
    sender.send(result)


def _start_worker(setup: Callable[..., None], setup_args: tuple[Any, ...]) -> None:
    _end_with_parent()
    setup(*setup_args)


def _end_with_parent() -> None:
    # Ctrl-C reaches the whole group; the parent decides. A killed parent cannot: watch it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
