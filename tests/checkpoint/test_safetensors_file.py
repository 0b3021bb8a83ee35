"""Our safetensors files are the library's: it reads them, and they are what was hashed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scalellm.checkpoint.layout import sha256_of
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
    assert (entry.size_bytes, entry.sha256) == (path.stat().st_size, sha256_of(path))
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
