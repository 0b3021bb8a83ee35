"""Who asks hears of every checkpoint that is whole, and of no other."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm import checkpoint
from scalellm.checkpoint import Saver, part
from scalellm.dist import World
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece


class Heard:
    """The steps that were heard of, each with whether the thread of the training heard it."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []

    def __call__(self, path: Path) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self.steps.append((checkpoint.open_checkpoint(path).step, is_main))


def saver(root: Path, heard: Heard, *, asynchronous: bool) -> Saver:
    return Saver(root, World(), keep=9, asynchronous=asynchronous, on_saved=heard)


def pieces() -> list[Piece]:
    return [Piece("model.a", torch.ones(2, 2), (2, 2), (0, 0))]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_save_is_heard_of_once_it_is_whole(tmp_path: Path, asynchronous: bool) -> None:
    heard = Heard()
    made = saver(tmp_path, heard, asynchronous=asynchronous)
    for step in (1, 2, 3):
        made.save(step, pieces(), {})
    made.wait()
    assert heard.steps == [(step, not asynchronous) for step in (1, 2, 3)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_failed_is_not_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def write(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    heard = Heard()
    made = saver(tmp_path, heard, asynchronous=asynchronous)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="the disk is full"):
        patch.setattr(part, "write_safetensors", write)
        made.save(1, pieces(), {})
        made.wait()
    assert heard.steps == []
    made.save(2, pieces(), {})
    made.wait()
    assert heard.steps == [(2, not asynchronous)]
