"""Our safetensors files are the library's: it reads them, and they are what was hashed."""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from torch import Tensor

from scalellm.checkpoint import safetensors_file
from scalellm.checkpoint.safetensors_file import DTYPE_CODES, write_safetensors


def test_the_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for shape in ((), (3,), (2, 5), (0, 4), (2, 3, 4)):
        for dtype in DTYPE_CODES:
            whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
            tensors[f"{dtype}{shape}"] = whole
    tensors["strided"] = torch.randn(6, 4).t()
    tensors["grad"] = torch.randn(3, requires_grad=True)
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    entry = write_safetensors(path, specs, tensors.__getitem__)
    content = path.read_bytes()
    assert (entry.size_bytes, entry.blake3) == (len(content), blake3(content).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype


def test_elements_are_aligned_to_their_size(tmp_path: Path) -> None:
    tensors = {"half": torch.ones(3).half(), "one": torch.ones(1), "wide": torch.ones(2).double()}
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, specs, tensors.__getitem__)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, tensor in tensors.items():
        assert (8 + length + header[key]["data_offsets"][0]) % tensor.element_size() == 0


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2).double()])
def test_another_tensor_than_announced_is_refused(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="a is torch"):
        write_safetensors(tmp_path / "x", {"a": (torch.float32, (2,))}, lambda key: wrong)


def test_a_slow_hash_is_waited_for_and_holds_few_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def __init__(self) -> None:
            self.digest, self.hashed_bytes = blake3(), 0
            self.hexdigest = self.digest.hexdigest

        def update(self, content: bytes) -> None:
            time.sleep(0.002)
            self.hashed_bytes += len(content)
            self.digest.update(content)

    slow = Slow()
    monkeypatch.setattr(safetensors_file, "blake3", lambda: slow)
    monkeypatch.setattr(safetensors_file, "_CHUNK_BYTES", 64)
    tensors = {f"t{number}": torch.full((256,), float(number)) for number in range(10)}
    behind_bytes = []

    def load(key: str) -> Tensor:
        behind_bytes.append((len(behind_bytes)) * 1024 - slow.hashed_bytes)
        return tensors[key]

    path = tmp_path / "x.safetensors"
    specs = dict.fromkeys(tensors, (torch.float32, (256,)))
    entry = write_safetensors(path, specs, load)
    assert entry.blake3 == blake3(path.read_bytes()).hexdigest()
    assert 0 < max(behind_bytes) <= (safetensors_file._CHUNKS_BEHIND + 1) * 64


def test_a_failed_write_leaves_no_thread_behind(tmp_path: Path) -> None:
    def load(key: str) -> Tensor:
        raise OSError("the tensor is gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="the tensor is gone"):
        write_safetensors(tmp_path / "x", {"a": (torch.float32, (2,))}, load)
    assert threading.active_count() == before


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_disk_that_fails_early_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Linux reports a lost write to one fsync only: none of them may be passed over."""
    calls: list[bool] = []

    def fsync(descriptor: int) -> None:
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors_file.os, "fsync", fsync)
    monkeypatch.setattr(safetensors_file, "_SYNC_BYTES", 1000)

    def load(key: str) -> Tensor:
        time.sleep(0.05)  # time for an fsync
        return torch.ones(256)

    specs = dict.fromkeys("ab", (torch.float32, (256,)))
    with pytest.raises(OSError, match="Input/output error"):
        write_safetensors(tmp_path / "x", specs, load)
    assert calls == [False, False, True][:failing]
