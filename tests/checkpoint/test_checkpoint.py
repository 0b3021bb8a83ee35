"""A checkpoint exists whole or not at all, and no damage to one reaches a model."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm import checkpoint
from scalellm.checkpoint.layout import MANIFEST, Manifest, checksum
from scalellm.dist import World
from scalellm.errors import CheckpointError
from scalellm.strategies import Piece

META = {"tokens": 7}


def pieces(seed: int = 0) -> Iterator[Piece]:
    generator = torch.Generator().manual_seed(seed)
    for name in ("model.a.weight", "optim.a.weight.exp_avg"):
        tensor = torch.randn(6, 4, generator=generator)
        yield Piece(name, tensor, (6, 4), (0, 0))
    yield Piece("optim.a.weight.step", torch.tensor(3.0), (), ())


def save(root: Path, step: int, *, keep: int = 9, seed: int = 0) -> Path:
    return checkpoint.save(root, step, pieces(seed), META, World(), keep)


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    found = checkpoint.open_checkpoint(save(tmp_path, 10))
    assert (found.step, found.meta) == (10, META)
    for piece in pieces():
        read = found.read(piece.name, piece.offsets, piece.global_shape)
        assert torch.equal(read, piece.tensor)
    assert found.names() == {piece.name for piece in pieces()}


def test_any_rectangle_can_be_read(tmp_path: Path) -> None:
    found = checkpoint.open_checkpoint(save(tmp_path, 1))
    whole = next(pieces()).tensor
    assert torch.equal(found.read("model.a.weight", (2, 1), (3, 2)), whole[2:5, 1:3])


def _save_halves(root: Path) -> None:
    world = World(rank=int(os.environ["RANK"]), world_size=2)
    whole = next(pieces()).tensor
    rows = slice(0, 3) if world.is_main else slice(3, 6)
    mine = [Piece("model.a.weight", whole[rows], (6, 4), (rows.start, 0))]
    checkpoint.save(root, 1, mine, META, world, keep=2)


def test_pieces_of_two_ranks_make_one_tensor(
    tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    ranks(_save_halves, 2, tmp_path)
    found = checkpoint.open_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(found.read("model.a.weight", (0, 0), (6, 4)), next(pieces()).tensor)
    assert torch.equal(found.read("model.a.weight", (2, 0), (2, 4)), next(pieces()).tensor[2:4])


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_retention_drops_a_future_that_was_not_taken(tmp_path: Path) -> None:
    """Resumed from step 2 of a run that had got to 10: the new step 3 is the newest now."""
    for step in (1, 2, 10, 3):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.rename(tmp_path / ".step-00000001.replaced")
    checkpoint.clean_up(tmp_path)
    assert checkpoint.open_checkpoint(path).step == 1


def test_saving_the_same_step_again_replaces_it_whole(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    path = save(tmp_path, 1, seed=1)
    found = checkpoint.open_checkpoint(path)
    assert torch.equal(found.read("model.a.weight", (0, 0), (6, 4)), next(pieces(1)).tensor)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    choose = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(40):
            position = choose.randrange(len(original) * 8)
            damaged = bytearray(original)
            damaged[position // 8] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                checkpoint.open_checkpoint(path)
        file.write_bytes(original)
    checkpoint.open_checkpoint(path)


@pytest.mark.parametrize(
    "name", [MANIFEST, "model-00000-000.safetensors", "optimizer-00000-000.safetensors"]
)
def test_a_missing_or_cut_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.open_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.open_checkpoint(path)


def test_latest_passes_over_damage_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / MANIFEST).unlink()
    (tmp_path / ".step-00000003.writing").mkdir()
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    assert len(skipped) == 1 and "step-00000002 is incomplete" in skipped[0]


def test_a_lying_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    honest = json.loads((path / MANIFEST).read_text())

    def refuse(change: str, words: str) -> None:
        lying = json.loads(json.dumps(honest))
        exec(change, {}, {"m": lying})
        lying["checksum"] = checksum(lying)
        (path / MANIFEST).write_text(json.dumps(lying))
        with pytest.raises(CheckpointError, match=words):
            checkpoint.open_checkpoint(path)

    refuse("m['files']['../x'] = m['files'].pop('model-00000-000.safetensors')", "no file of a ch")
    refuse("m['tensors']['model.a.weight']['pieces'][0]['file'] = '/etc/passwd'", "not listed")
    refuse("m['step'] = -1", "damaged")
    refuse("m['format'] = 'other'", "not a scalellm-checkpoint")
    refuse("m['version'] = 99", "version 99, this scalellm reads 1, 2, 3")
    refuse("m['extra'] = 1", "damaged")
    file = "m['files']['model-00000-000.safetensors']"
    refuse(f"{file}['sha256'] = '0' * 64", "needs blake3 and no other hash")
    refuse(f"del {file}['blake3']", "needs blake3 and no other hash")
    refuse(f"{file}['blake3'] = {file}['blake3'].upper()", "damaged")
    refuse("m['version'] = 2", "needs sha256 and no other hash")
    refuse("m['tensors']['model.a.weight']['dtype'] = 'uint8'", "damaged")


def _as_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Its files had no number of their own, its pieces no key."""
    text = json.dumps(manifest).replace("-00000-000.", "-00000.")
    manifest = json.loads(text) | {"version": 1}
    for tensor in manifest["tensors"].values():
        for piece in tensor["pieces"]:
            del piece["key"]
    return manifest


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_are_read_and_verified(tmp_path: Path, version: int) -> None:
    """Both had SHA-256."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text()) | {"version": version}
    for name, entry in manifest["files"].items():
        del entry["blake3"]
        entry["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    if version == 1:
        manifest = _as_version_1(manifest)
        for file in path.glob("*.safetensors"):
            file.rename(path / file.name.replace("-000.", "."))
    manifest["checksum"] = checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    found = checkpoint.open_checkpoint(path)
    for piece in pieces():
        read = found.read(piece.name, piece.offsets, piece.global_shape)
        assert torch.equal(read, piece.tensor)
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: its hash"):
            checkpoint.open_checkpoint(path)
        file.write_bytes(content)


def test_no_pickle_is_ever_written(tmp_path: Path) -> None:
    names = {file.name for file in save(tmp_path, 1).iterdir()}
    assert names == {MANIFEST, "model-00000-000.safetensors", "optimizer-00000-000.safetensors"}
    Manifest.model_validate_json((tmp_path / "step-00000001" / MANIFEST).read_text())


def test_kill_in_mid_save_leaves_the_previous_one(tmp_path: Path) -> None:
    """A writer is killed by SIGKILL after a random time, again and again, while it saves."""
    writer = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from scalellm import checkpoint
        from scalellm.dist import World
        from scalellm.strategies import Piece
        root = Path(sys.argv[1])
        for step in range(1, 10_000):
            tensor = torch.full((256, 1024), float(step))
            pieces = [Piece(f"model.{n}", tensor.clone(), (256, 1024), (0, 0)) for n in range(4)]
            checkpoint.save(root, step, pieces, {"step": step}, World(), keep=2)
            print(step, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        done = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGSTOP)  # somewhere in the middle of the next save
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None and found.step >= done
    value = found.read("model.3", (0, 0), (256, 1024))
    assert torch.equal(value, torch.full((256, 1024), float(found.step)))
    checkpoint.clean_up(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a 1 MiB file system needs root")
def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        save(mount, 1)
        big = [Piece("model.a", torch.zeros(1024, 1024), (1024, 1024), (0, 0))]
        with pytest.raises(CheckpointError, match=r"the disk is full .* free space"):
            checkpoint.save(mount, 2, big, META, World(), keep=2)
        assert [path.name for path in mount.iterdir()] == ["step-00000001"]
        checkpoint.open_checkpoint(mount / "step-00000001")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
