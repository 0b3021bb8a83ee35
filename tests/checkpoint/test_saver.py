"""Saving in the background: the values of the moment, one at a time, and no failure unheard."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalellm import checkpoint
from scalellm.checkpoint import part, saver
from scalellm.checkpoint.saver import Saver
from scalellm.checkpoint.write import save
from scalellm.dist import World, detect
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece

SHAPE = (6, 4)


def pieces_of(tensor: Tensor) -> list[Piece]:
    return [
        Piece("model.a", tensor, SHAPE, (0, 0)),
        Piece("optim.a.exp_avg", tensor.t(), (4, 6), (0, 0)),
    ]


def read(root: Path, step: int) -> Tensor:
    found = checkpoint.open_checkpoint(root / f"step-{step:08d}")
    assert torch.equal(found.read("optim.a.exp_avg", (0, 0), (4, 6)).t(), _a(found))
    return _a(found)


def _a(found: checkpoint.Checkpoint) -> Tensor:
    return found.read("model.a", (0, 0), SHAPE)


def made(root: Path, *, asynchronous: bool = True, world: World | None = None) -> Saver:
    return Saver(root, world or World(), keep=9, asynchronous=asynchronous)


class Gate:
    """Stands before the writing and counts who is inside."""

    def __init__(self, patch: pytest.MonkeyPatch, *, is_open: bool) -> None:
        self.opened = threading.Event()
        self.inside = self.most_inside = 0
        self.pieces: list[Piece] = []
        self.steps: list[int] = []
        if is_open:
            self.opened.set()
        patch.setattr(saver, "save", self._save)

    def _save(self, root: Path, step: int, pieces: Any, *arguments: Any) -> Path:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.opened.wait(30)
        time.sleep(0.02)
        self.pieces = list(pieces)
        result = save(root, step, self.pieces, *arguments)
        self.steps.append(step)
        self.inside -= 1
        return result


def test_the_values_are_those_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, is_open=False)
    tensor, meta = torch.full(SHAPE, 1.0), {"tokens": [1]}
    background = made(tmp_path)
    background.save(1, pieces_of(tensor), meta)
    assert not list(tmp_path.iterdir())  # nothing is written yet, and the training goes on
    background.wait_for_copy()
    tensor.fill_(2.0)
    meta["tokens"].append(2)
    gate.opened.set()
    background.wait()
    assert torch.equal(read(tmp_path, 1), torch.full(SHAPE, 1.0))
    assert checkpoint.open_checkpoint(tmp_path).meta == {"tokens": [1]}


def test_at_most_one_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, is_open=True)
    background = made(tmp_path)
    for step in range(1, 6):
        background.save(step, pieces_of(torch.full(SHAPE, float(step))), {})
        assert gate.steps == list(range(1, step))  # the one before is done, this one is not
    background.wait()
    assert (gate.most_inside, gate.steps) == (1, [1, 2, 3, 4, 5])
    for step in range(1, 6):
        assert torch.equal(read(tmp_path, step), torch.full(SHAPE, float(step)))


def test_in_the_foreground_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, is_open=True)
    tensor = torch.ones(SHAPE)
    made(tmp_path, asynchronous=False).save(1, pieces_of(tensor), {})
    assert torch.equal(read(tmp_path, 1), tensor)
    assert {piece.tensor.data_ptr() for piece in gate.pieces} == {tensor.data_ptr()}


def fill_the_disk(patch: pytest.MonkeyPatch, *, after_files: int = 0) -> None:
    """The files after the first `after_files` meet ENOSPC half-way."""
    honest, written = part.write_safetensors, []

    def write(path: Path, specs: Mapping[str, Any], load: Callable[[str], Tensor]) -> Any:
        written.append(path)
        if len(written) <= after_files:
            return honest(path, specs, load)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(part, "write_safetensors", write)


@pytest.mark.parametrize("hears", ["save", "wait"])
def test_a_full_disk_is_heard_of_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hears: str
) -> None:
    background = made(tmp_path)
    background.save(1, pieces_of(torch.ones(SHAPE)), {})
    background.wait()
    with monkeypatch.context() as patch:
        fill_the_disk(patch, after_files=1)
        background.save(2, pieces_of(torch.ones(SHAPE)), {})
        with pytest.raises(CheckpointError, match=r"the disk is full .* free space, lower"):
            if hears == "wait":
                background.wait()
            else:
                background.save(3, pieces_of(torch.ones(SHAPE)), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    background.wait()  # said once
    background.save(4, pieces_of(torch.ones(SHAPE)), {})
    background.wait()
    assert torch.equal(read(tmp_path, 4), torch.ones(SHAPE))


def test_a_bug_keeps_its_own_error(tmp_path: Path) -> None:
    background = made(tmp_path)
    background.save(1, [Piece("model.a", torch.ones(2, 4), SHAPE, (0, 0))], {})
    with pytest.raises(ValueError, match="cover 8 of 24"):
        background.wait()
    assert not list(tmp_path.iterdir())


def _disk_of_rank_one_is_full(root: Path) -> str:
    world = detect()
    background = made(root, world=world)
    rows = slice(3 * world.rank, 3 * world.rank + 3)
    pieces = [Piece("model.a", torch.ones(SHAPE)[rows], SHAPE, (rows.start, 0))]
    background.save(1, pieces, {})
    background.wait()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            fill_the_disk(patch)
        background.save(2, pieces, {})
        try:
            background.save(3, pieces, {})
        except CheckpointError as error:
            background.close()
            return f"{error.rank_only}: {error}"
    return "saved"


def test_all_ranks_hear_of_one_ranks_disk(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    root = tmp_path / "root"
    first, second = ranks(_disk_of_rank_one_is_full, 2, root)
    assert first.startswith("False: could not save") and "another rank failed" in first
    assert second.startswith("True: could not save") and "the disk is full" in second
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


def _train_and_save(root: Path) -> float:
    """The main threads reduce all the while; a shared group would pair the wrong collectives."""
    world = detect()
    background = made(root, world=world)
    value = torch.ones(SHAPE)
    for step in range(1, 16):
        for _ in range(20):
            total = torch.full((1000,), float(world.rank + 1))
            torch.distributed.all_reduce(total)
            assert total.unique().tolist() == [6.0]
        rows = slice(2 * world.rank, 2 * world.rank + 2)
        background.save(step, [Piece("model.a", value[rows], SHAPE, (rows.start, 0))], {})
        background.wait_for_copy()
        value.add_(1)
    background.wait()
    return float(value[0, 0])


def test_saving_does_not_mix_with_the_trainings_collectives(
    tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    assert ranks(_train_and_save, 3, tmp_path / "root") == [16.0] * 3
    for step in range(7, 16):
        found = checkpoint.open_checkpoint(tmp_path / "root" / f"step-{step:08d}")
        assert torch.equal(_a(found), torch.full(SHAPE, float(step)))


def test_close_gives_up_what_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, is_open=False)
    background = made(tmp_path)
    background.save(1, pieces_of(torch.ones(SHAPE)), {})
    thread = background._thread
    started_s = time.monotonic()
    background.close(timeout_s=0.1)
    assert time.monotonic() - started_s < 5
    gate.opened.set()
    assert thread is not None
    thread.join(30)
    assert not list(tmp_path.iterdir())


def test_close_lets_a_save_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch, is_open=True)
    background = made(tmp_path)
    background.save(1, pieces_of(torch.ones(SHAPE)), {})
    background.close()
    assert torch.equal(read(tmp_path, 1), torch.ones(SHAPE))


def _partner_never_comes(root: Path) -> float:
    world = detect()
    background = made(root, world=world)
    if world.rank == 1:
        return 0.0
    background.save(1, pieces_of(torch.ones(SHAPE)), {})
    started_s = time.monotonic()
    background.close(timeout_s=0.5)
    return time.monotonic() - started_s


def test_close_does_not_wait_for_a_rank_that_is_gone(
    tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    root = tmp_path / "root"
    waited_s, _ = ranks(_partner_never_comes, 2, root)
    assert 0.4 < waited_s < 20
    checkpoint.clean_up(root)
    assert not list(root.iterdir())


def test_kill_in_the_middle_of_a_background_write(tmp_path: Path) -> None:
    """SIGKILL when one file of step 2 is whole and the next is half: step 1 is what there is."""
    writer = textwrap.dedent(
        """
        import sys, time, torch
        from pathlib import Path
        from scalellm.checkpoint import Saver, part
        from scalellm.dist import World
        from scalellm.strategies import Piece

        honest = part.write_safetensors

        def write(path, specs, load):
            if "step-00000002" in str(path) and "optimizer" in path.name:
                path.write_bytes(b"half of it")
                print("half", flush=True)
                time.sleep(600)
            return honest(path, specs, load)

        part.write_safetensors = write
        saver = Saver(Path(sys.argv[1]), World(), keep=2, asynchronous=True)
        for step in (1, 2):
            tensor = torch.full((64, 64), float(step))
            names = ("model.a", "optim.a.exp_avg")
            saver.save(step, [Piece(name, tensor, (64, 64), (0, 0)) for name in names], {})
        saver.wait()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name for path in (tmp_path / ".step-00000002.writing").iterdir()}
    assert left == {"model-00000-000.safetensors", "optimizer-00000-000.safetensors"}
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None and (found.step, skipped) == (1, [])
    assert torch.equal(found.read("model.a", (0, 0), (64, 64)), torch.ones(64, 64))
    checkpoint.clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
