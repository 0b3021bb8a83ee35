"""All ranks verify one checkpoint: each its share, and what one finds damaged none will load."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm import checkpoint
from scalellm.checkpoint import part, verify
from scalellm.checkpoint.layout import MANIFEST, FileEntry
from scalellm.dist import World, barrier, detect
from scalellm.errors import UserError
from scalellm.strategies import Piece

WORLD_SIZE = 3


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints of several files each."""
    monkeypatch.setattr(part, "MAX_FILE_BYTES", 60)
    for step in (1, 2):
        pieces = [Piece(f"model.{n}", torch.full((5, 5), 1.0), (5, 5), (0, 0)) for n in range(3)]
        checkpoint.save(tmp_path / "root", step, pieces, {}, World(), keep=2)
    return tmp_path / "root"


def _hash_shares(root: Path) -> list[str]:
    hashed: list[str] = []
    honest = verify.matches

    def count(path: Path, entry: FileEntry) -> bool:
        hashed.append(path.name)
        return honest(path, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "matches", count)
        found, num_passed_over = checkpoint.latest_together(root, detect())
    assert found is not None and (found.step, num_passed_over) == (2, 0)
    return hashed


def test_each_file_is_hashed_by_one_rank(root: Path, ranks: Callable[..., list[Any]]) -> None:
    shares = ranks(_hash_shares, WORLD_SIZE, root)
    files = sorted(path.name for path in (root / "step-00000002").glob("*.safetensors"))
    assert len(files) == 3 * 2
    assert shares == [files[rank::WORLD_SIZE] for rank in range(WORLD_SIZE)]


def _damage_each(root: Path) -> list[tuple[int, str, str]]:
    """For every file of step 2: what is found when a bit of it flips, what this rank prints."""
    world, answers = detect(), []
    for file in sorted((root / "step-00000002").iterdir()):
        content = file.read_bytes()
        barrier()
        if world.is_main:
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        barrier()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            found, num_passed_over = checkpoint.latest_together(root, world)
        try:
            checkpoint.open_together(root / "step-00000002", world)
            refusal = "opened"
        except UserError as error:
            refusal = str(error)
        barrier()
        if world.is_main:
            file.write_bytes(content)
        assert found is not None and num_passed_over == 1
        answers.append((found.step, printed.getvalue(), refusal))
    barrier()
    assert checkpoint.open_together(root, world).step == 2
    return answers


def test_a_flipped_bit_in_any_file_is_found_by_all_and_said_once(
    root: Path, ranks: Callable[..., list[Any]]
) -> None:
    files = sorted(path.name for path in (root / "step-00000002").iterdir())
    answers = ranks(_damage_each, WORLD_SIZE, root)
    for file, by_rank in zip(files, zip(*answers, strict=True), strict=True):
        assert [step for step, _, _ in by_rank] == [1] * WORLD_SIZE
        printed = [text for _, text, _ in by_rank if text]
        assert len(printed) == 1 and printed[0].startswith("passed over: ")
        assert file in printed[0] and "is damaged" in printed[0]
        refusals = [text for _, _, text in by_rank]
        assert "opened" not in refusals and any(file in text for text in refusals)


def _missing(root: Path) -> tuple[str, str]:
    world = detect()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found, _ = checkpoint.latest_together(root, world)
    assert found is not None and found.step == 1
    try:
        checkpoint.open_together(root / "step-00000002", world)
    except UserError as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), "opened"


def test_a_missing_shard_is_named_by_the_lowest_rank(
    root: Path, ranks: Callable[..., list[Any]]
) -> None:
    (root / "step-00000002" / "model-00000-004.safetensors").unlink()
    answers = ranks(_missing, WORLD_SIZE, root)
    assert [bool(printed) for printed, _ in answers] == [True, False, False]
    assert "'model-00000-004.safetensors' is missing" in answers[0][0]
    assert all("'model-00000-004.safetensors' is missing" in text for _, text in answers)


def _nothing_is_sound(root: Path) -> str:
    found, num_passed_over = checkpoint.latest_together(root, detect())
    assert (found, num_passed_over) == (None, 2)
    with pytest.raises(UserError) as caught:
        checkpoint.open_together(root, detect())
    return str(caught.value)


def test_no_sound_checkpoint_at_all(root: Path, ranks: Callable[..., list[Any]]) -> None:
    for path in root.iterdir():
        (path / MANIFEST).unlink()
    for text in ranks(_nothing_is_sound, 2, root):
        assert "has no complete checkpoint; 2 in it are damaged" in text


def _look_elsewhere(root: Path, elsewhere: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.latest_together(elsewhere if detect().rank == 1 else root, detect())
    return str(caught.value)


def test_storage_that_is_not_shared_is_found_out(
    root: Path, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    for text in ranks(_look_elsewhere, WORLD_SIZE, root, tmp_path / "elsewhere"):
        assert "the ranks see different checkpoints" in text and "all ranks share" in text
