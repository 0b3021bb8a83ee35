"""Tensors in pieces: any division over ranks and files reads back, and no lie about one passes."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from scalellm import checkpoint
from scalellm.checkpoint import part
from scalellm.checkpoint.layout import MANIFEST, checksum
from scalellm.checkpoint.part import write_part
from scalellm.checkpoint.write import commit
from scalellm.dist import World
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece

Box = tuple[tuple[int, int], ...]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def piece_of(name: str, whole: Tensor, box: Box) -> Piece:
    tensor = whole[tuple(slice(start, stop) for start, stop in box)]
    return Piece(name, tensor, tuple(whole.shape), tuple(start for start, _ in box))


def divide(box: Box, choose: Random, depth: int) -> Iterator[Box]:
    """Cuts a box again and again, sometimes into an empty and a full one."""
    if not box or depth == 0:
        yield box
        return
    axis = choose.randrange(len(box))
    start, stop = box[axis]
    middle = choose.randint(start, stop)
    for side in ((start, middle), (middle, stop)):
        yield from divide((*box[:axis], side, *box[axis + 1 :]), choose, depth - 1)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=3),
    choose=st.randoms(use_true_random=False),
    limit_bytes=st.sampled_from([1, 50, 400, 1 << 20]),
)
def test_any_division_reads_back_at_any_rectangle(
    shapes: list[tuple[int, ...]], choose: Random, limit_bytes: int
) -> None:
    wholes: dict[str, Tensor] = {}
    shares: list[list[Piece]] = [[], [], []]
    for number, shape in enumerate(shapes):
        name = f"{choose.choice(['model', 'optim'])}.t{number}"
        wholes[name] = tensor_of(shape, choose.choice(DTYPES))
        for box in divide(tuple((0, size) for size in shape), choose, choose.randint(0, 4)):
            choose.choice(shares).append(piece_of(name, wholes[name], box))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "MAX_FILE_BYTES", limit_bytes)
        temporary, target = Path(folder) / "writing", Path(folder) / "step-00000001"
        temporary.mkdir()
        for rank, share in enumerate(shares):
            write_part(temporary, share, rank)
        commit(temporary, target, 1, {}, world_size=3)
        found = checkpoint.open_checkpoint(target)
        for name, whole in wholes.items():
            for _ in range(4):
                corners = [sorted(choose.choices(range(size + 1), k=2)) for size in whole.shape]
                wanted = whole[tuple(slice(*corner) for corner in corners)]
                read = found.read(name, tuple(low for low, _ in corners), tuple(wanted.shape))
                assert torch.equal(read, wanted) and read.dtype == whole.dtype


def test_keys_say_which_part_they_are(tmp_path: Path) -> None:
    whole = tensor_of((24, 48))
    pieces = [
        piece_of("model.a.weight", whole, ((0, 12), (0, 48))),
        piece_of("model.a.weight", whole, ((12, 24), (0, 48))),
        Piece("model.b", tensor_of((5,)), (5,), (0,)),
        Piece("optim.b.step", torch.tensor(3.0), (), ()),
    ]
    path = checkpoint.save(tmp_path, 1, pieces, {}, World(), keep=1)
    with safe_open(path / "model-00000-000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a.weight[0:12,0:48]", "a.weight[12:24,0:48]", "b"}
        assert torch.equal(file.get_tensor("a.weight[12:24,0:48]"), whole[12:24])
    with safe_open(path / "optimizer-00000-000.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["b.step"]


def test_files_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole tensors share a file; one larger than a file is cut by rows over several."""
    monkeypatch.setattr(part, "MAX_FILE_BYTES", 4096)
    small = [Piece(f"model.s{n}", tensor_of((16, 32)), (16, 32), (0, 0)) for n in range(4)]
    large = Piece("model.large", tensor_of((100, 32)), (100, 32), (0, 0))
    path = checkpoint.save(tmp_path, 1, [*small, large], {}, World(), keep=1)
    files = sorted(path.glob("model-00000-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-00000-{n:03d}.safetensors" for n in range(2 + 4)
    ]
    assert all(file.stat().st_size < 4096 + 400 for file in files)
    found = checkpoint.open_checkpoint(path)
    assert torch.equal(found.read("model.large", (0, 0), (100, 32)), large.tensor)


def flat_pieces(rank: int, world_size: int) -> Iterator[Piece]:
    """ZeRO's way: an equal range of the flattened matrix, as up to three rectangles."""
    whole = tensor_of((7, 5))
    share = -(-35 // world_size)
    cells = range(rank * share, min(35, (rank + 1) * share))
    for row, group in itertools.groupby(cells, key=lambda cell: cell // 5):
        columns = [cell % 5 for cell in group]
        box = ((row, row + 1), (columns[0], columns[-1] + 1))
        yield piece_of("model.a", whole, box)
        yield piece_of("optim.a.exp_avg", whole * 2, box)
    if rank == world_size - 1:
        yield Piece("optim.a.step", torch.tensor(4.0), (), ())


def _save_flat(root: Path) -> None:
    world = World(rank=int(os.environ["RANK"]), world_size=3)
    checkpoint.save(root, 1, flat_pieces(world.rank, 3), {}, world, keep=2)


def test_flat_partitions_of_three_ranks(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    ranks(_save_flat, 3, tmp_path)
    found = checkpoint.open_checkpoint(tmp_path / "step-00000001")
    whole = tensor_of((7, 5))
    for top, left in itertools.product(range(7), range(5)):
        read = found.read("model.a", (top, left), (7 - top, 5 - left))
        assert torch.equal(read, whole[top:, left:])
    assert torch.equal(found.read("optim.a.exp_avg", (0, 0), (7, 5)), whole * 2)
    assert found.read("optim.a.step", (), ()) == 4.0


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([((0, 2), (0, 4))], "cover 8 of 24 elements"),
        ([((0, 4), (0, 4)), ((2, 6), (0, 4))], "cover 32 of 24 elements"),
        ([((0, 6), (0, 4)), ((0, 6), (0, 4))], "given twice"),
    ],
)
def test_a_strategy_that_yields_no_whole_is_found_out(
    tmp_path: Path, boxes: list[Box], words: str
) -> None:
    pieces = [piece_of("model.a", tensor_of((6, 4)), box) for box in boxes]
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path, 1, pieces, {}, World(), keep=1)
    assert not list(tmp_path.iterdir())


def test_pieces_of_two_types_are_found_out(tmp_path: Path) -> None:
    whole = tensor_of((6, 4))
    pieces = [
        piece_of("model.a", whole, ((0, 3), (0, 4))),
        piece_of("model.a", whole.double(), ((3, 6), (0, 4))),
    ]
    with pytest.raises(ValueError, match="pieces of dtype float32 and float64"):
        checkpoint.save(tmp_path, 1, pieces, {}, World(), keep=1)


def lie(path: Path, **changes: Any) -> None:
    """Changes the second piece of model.a and puts the checksum right."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["model.a"]["pieces"][1] |= changes
    manifest["checksum"] = checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    whole = tensor_of((6, 4))
    boxes: list[Box] = [((0, 3), (0, 4)), ((3, 6), (0, 4))]
    pieces = [piece_of("model.a", whole, box) for box in boxes]
    return checkpoint.save(tmp_path, 1, pieces, {}, World(), keep=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": [4, 0]}, "has a piece outside"),
        ({"offsets": [-1, 0]}, "greater than or equal to 0"),
        ({"shape": [-3, -4]}, "greater than or equal to 0"),
        ({"offsets": [3]}, "another number of dimensions"),
        ({"shape": [2, 4]}, "cover 20 of 24 elements"),
        ({"key": "a[0:3,0:4]"}, "without a key of its own"),
        ({"key": ""}, "without a key of its own"),
        ({"file": "model-00001-000.safetensors"}, "not listed"),
        ({"offsets": [2.0, 0]}, "damaged"),
    ],
)
def test_a_lie_about_a_piece_is_refused(halves: Path, changes: dict[str, Any], words: str) -> None:
    lie(halves, **changes)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.open_checkpoint(halves)


def test_overlapping_pieces_are_found_where_they_overlap(halves: Path) -> None:
    lie(halves, offsets=[2, 0])
    found = checkpoint.open_checkpoint(halves)
    for offsets, shape in (((0, 0), (6, 4)), ((2, 1), (1, 2)), ((0, 0), (3, 1))):
        with pytest.raises(CheckpointError, match=r"pieces of model\.a overlap"):
            found.read("model.a", offsets, shape)
    with pytest.raises(CheckpointError, match="cover 0 of 4 elements"):
        found.read("model.a", (5, 0), (1, 4))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("key", "b", "does not contain tensor b"),
        ("shape", [1, 12], "has a piece outside"),
    ],
)
def test_a_lie_about_a_file_is_refused(halves: Path, field: str, value: Any, words: str) -> None:
    lie(halves, **{field: value})
    with pytest.raises(CheckpointError, match=words):
        checkpoint.open_checkpoint(halves).read("model.a", (0, 0), (6, 4))


@pytest.mark.parametrize("change", [{"dtype": "float64"}, {"shape": [4, 6]}])
def test_a_lie_about_a_tensor_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = [Piece("model.a", tensor_of((6, 4)), (6, 4), (0, 0))]
    path = checkpoint.save(tmp_path, 1, whole, {}, World(), keep=1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["model.a"] |= change
    shape = manifest["tensors"]["model.a"]["shape"]
    manifest["tensors"]["model.a"]["pieces"][0]["shape"] = shape
    manifest["checksum"] = checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"holds F32 \[6, 4\] as 'a', the manifest says"):
        checkpoint.open_checkpoint(path).read("model.a", (0, 0), tuple(shape))
