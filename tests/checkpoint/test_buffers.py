"""The copy a background save writes from: right values, in memory used again, given back."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalellm import checkpoint
from scalellm.checkpoint import buffers, saver
from scalellm.checkpoint.buffers import Buffers
from scalellm.checkpoint.write import save
from scalellm.dist import World
from scalellm.metrics import rss_bytes
from scalellm.strategies import Piece

MIB = 1 << 20


def piece_of(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def tensors(seed: int) -> list[Tensor]:
    """Of every kind: large and small, strided, a number, nothing, of other types, with gradient."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        random(300, 400),
        random(300, 400).t(),
        random(8, 8, 8)[:, 2:5, ::2],
        torch.tensor(float(seed)),
        torch.tensor(seed),
        torch.empty(0, 4),
        random(7).bfloat16(),
        random(9).double(),
        random(5, 3).requires_grad_(),
    ]


def pieces(seed: int) -> list[Piece]:
    return [piece_of(f"model.t{number}", tensor) for number, tensor in enumerate(tensors(seed))]


def copied(made: Buffers, state: Iterable[Piece]) -> list[Piece]:
    return made.begin(state).result()


def addresses(copies: list[Piece]) -> list[int]:
    return [piece.tensor.data_ptr() for piece in copies]


@pytest.mark.parametrize(("slab_bytes", "batch_bytes"), [(64 * MIB, 8 * MIB), (4096, 1000)])
def test_copies_are_equal_contiguous_and_apart(
    monkeypatch: pytest.MonkeyPatch, slab_bytes: int, batch_bytes: int
) -> None:
    monkeypatch.setattr(buffers, "_SLAB_BYTES", slab_bytes)
    monkeypatch.setattr(buffers, "_BATCH_BYTES", batch_bytes)
    made = Buffers()
    for seed in (1, 2):
        copies = copied(made, pieces(seed))
        ranges = []
        for piece, original in zip(copies, pieces(seed), strict=True):
            assert torch.equal(piece.tensor, original.tensor)
            assert piece.tensor.dtype == original.tensor.dtype
            assert piece.tensor.is_contiguous() and not piece.tensor.requires_grad
            start = piece.tensor.data_ptr()
            ranges.append((start, start + piece.tensor.nbytes))
        ranges = sorted(pair for pair in ranges if pair[0] != pair[1])
        for (_, end), (start, _) in itertools.pairwise(ranges):
            assert end <= start


def test_the_same_state_goes_to_the_same_memory() -> None:
    made = Buffers()
    first = addresses(copied(made, pieces(1)))
    assert addresses(copied(made, pieces(2))) == first


def test_another_shape_or_type_under_a_name_gets_other_memory() -> None:
    made = Buffers()
    for tensor in (torch.ones(6), torch.full((2, 3), 2.0), torch.full((2, 3), 3.0).double()):
        [copy] = copied(made, [piece_of("model.a", tensor)])
        assert torch.equal(copy.tensor, tensor) and copy.tensor.dtype == tensor.dtype


def test_a_state_that_has_grown_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save of a run that has not taken a step has no moments."""
    monkeypatch.setattr(buffers, "_SLAB_BYTES", 4096)
    made = Buffers()
    copied(made, pieces(1)[:1])
    more = [*pieces(2), piece_of("model.more", torch.ones(3000))]
    for piece, original in zip(copied(made, more), more, strict=True):
        assert torch.equal(piece.tensor, original.tensor)


def test_tensors_made_on_the_way_live_until_they_are_copied() -> None:

    def passing() -> Iterator[Piece]:
        for number in range(20):
            yield piece_of(f"model.{number}", torch.full((100_000,), float(number)))

    for number, piece in enumerate(copied(Buffers(), passing())):
        assert torch.equal(piece.tensor, torch.full((100_000,), float(number)))


def test_an_error_of_the_state_is_heard() -> None:
    def broken() -> Iterator[Piece]:
        yield piece_of("model.a", torch.ones(4))
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        Buffers().begin(broken())


def test_a_save_in_flight_is_not_overwritten_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save is held before its first byte while the second one is asked for."""
    opened, places = threading.Event(), []

    def hold(root: Path, step: int, pieces: Any, *arguments: Any) -> Path:
        held = list(pieces)
        places.append(addresses(held))
        opened.wait(30)
        return save(root, step, held, *arguments)

    monkeypatch.setattr(saver, "save", hold)
    made = checkpoint.Saver(tmp_path, World(), keep=9, asynchronous=True)
    tensor = torch.full((400, 400), 1.0)
    made.save(1, [piece_of("model.a", tensor)], {})
    made.wait_for_copy()
    tensor.fill_(2.0)
    second = threading.Thread(target=made.save, args=(2, [piece_of("model.a", tensor)], {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # it waits
    opened.set()
    second.join(30)
    made.close()
    assert places[0] == places[1]
    for step in (1, 2):
        found = checkpoint.open_checkpoint(tmp_path / f"step-{step:08d}")
        assert torch.equal(
            found.read("model.a", (0, 0), (400, 400)), torch.full((400, 400), float(step))
        )


def test_what_is_saved_may_change_after_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both `save` and what computes next go on beside the copy; `wait_for_copy` does not."""
    may_copy, move = threading.Event(), buffers._move

    def held(batch: Any) -> None:
        may_copy.wait(30)
        move(batch)

    monkeypatch.setattr(buffers, "_move", held)
    made = checkpoint.Saver(tmp_path, World(), keep=9, asynchronous=True)
    tensor = torch.full((400, 400), 1.0)
    made.save(1, [piece_of("model.a", tensor)], {})
    waiting = threading.Thread(target=made.wait_for_copy)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    may_copy.set()
    waiting.join(30)
    assert not waiting.is_alive()
    tensor.fill_(2.0)
    made.wait()
    found = checkpoint.open_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(found.read("model.a", (0, 0), (400, 400)), torch.ones(400, 400))
    made.wait_for_copy()  # nothing is under way: returns
    made.close()


def test_memory_is_held_once_and_given_back(tmp_path: Path) -> None:
    tensor = torch.ones(24 * MIB)
    made = checkpoint.Saver(tmp_path, World(), keep=1, asynchronous=True)
    before_bytes = rss_bytes()
    held_bytes = []
    for step in (1, 2, 3):
        made.save(step, [piece_of("model.a", tensor)], {})
        made.wait()
        held_bytes.append(rss_bytes() - before_bytes)
    assert held_bytes[0] > 90 * MIB
    assert held_bytes[2] < held_bytes[0] + 24 * MIB  # not a copy a save
    made.close()
    # Another test may have told the C library to keep what is free.
    ctypes.CDLL(None).malloc_trim(0)
    assert rss_bytes() - before_bytes < 24 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_state_goes_to_pinned_memory() -> None:
    made = Buffers()
    for seed in (1, 2):
        on_gpu = [piece_of(piece.name, piece.tensor.cuda()) for piece in pieces(seed)]
        mixed = [piece_of("model.first", torch.tensor(float(seed))), *on_gpu]
        copies = copied(made, mixed)
        for piece, original in zip(copies, mixed, strict=True):
            assert piece.tensor.device.type == "cpu"
            assert torch.equal(piece.tensor, original.tensor.cpu())
        assert all(piece.tensor.is_pinned() for piece in copies[1:] if piece.tensor.numel())
