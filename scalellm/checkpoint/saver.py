"""Saving while the training goes on: a copy in memory, then a thread that writes it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from scalellm.checkpoint.buffers import Buffers, Copying
from scalellm.checkpoint.write import save
from scalellm.cores import FAR_BEHIND, step_back
from scalellm.dist import World, side_group
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece

CLOSE_TIMEOUT_S = 60.0


class Saver:
    """Writes the checkpoints of one run, at most one at a time.

    All ranks make one together, call `save` at the same steps and `wait` at the end. A failure
    reaches all of them: the threads agree over a group of their own, so `save` and `wait` raise
    it on every rank or on none. `on_saved` hears the path of every finished one, in the thread
    that wrote it. The memory of a copy is kept for the next one, until `close`.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        *,
        keep: int,
        asynchronous: bool,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self._root = root
        self._world = world
        self._keep = keep
        self._asynchronous = asynchronous
        self._on_saved = on_saved
        self._group = side_group()
        self._buffers = Buffers()
        self._copying: Copying | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    def save(self, step: int, pieces: Iterable[Piece], meta: dict[str, Any]) -> None:
        """Saves `root/step-XXXXXXXX` as things stand; they may change after `wait_for_copy`.

        In the background nothing is waited for but a previous save in flight. After one that failed
        this one is made in the foreground, since it may be the last chance.

        Raises:
            CheckpointError: this save, after the one before it, did not work.
        """
        failed = self._ended()
        if failed is not None and not isinstance(failed, CheckpointError):
            raise failed
        if failed is not None and (self._world.is_main or failed.rank_only):
            print(f"note: {failed}; trying again", flush=True)
        if not self._asynchronous or failed is not None:
            self._write(step, pieces, meta)
            return
        self._copying = self._buffers.begin(pieces)
        arguments = (step, self._copying, copy.deepcopy(meta))
        self._thread = threading.Thread(
            target=self._run, args=arguments, name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Returns once what is being saved has been copied and may change.

        Weights and optimizer state change only in the optimizer's update, so that the copy goes on
        beside the next forward and backward (CheckFreq, Mohan et al. 2021, section 4.1).
        """
        if self._copying is not None:
            self._copying.wait_for_sources()
            self._copying = None

    def wait(self) -> None:
        """Returns once nothing is in flight. Raises CheckpointError if the last save failed."""
        error = self._ended()
        if error is not None:
            raise error

    def _ended(self) -> BaseException | None:
        """Waits for what is in flight; returns why it failed, on every rank or on none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """For every way out: gives a save in flight some time, then gives it up; never raises.

        What is given up is removed by its thread, or by the next `clean_up` if that hangs.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._abandoned.set()
            self._thread = None
        self._copying = None
        self._buffers.free()

    def _run(self, step: int, copying: Copying, meta: dict[str, Any]) -> None:
        step_back(FAR_BEHIND)  # nobody waits for it; training does wait for the copy
        try:
            self._write(step, self._unless_abandoned(copying.result()), meta)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, pieces: Iterable[Piece], meta: dict[str, Any]) -> None:
        path = save(self._root, step, pieces, meta, self._world, self._keep, self._group)
        if self._on_saved is not None:
            self._on_saved(path)

    def _unless_abandoned(self, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self._abandoned.is_set():
                raise InterruptedError("the run has ended before it was written")
            yield piece
