"""The reader in docs/checkpoint-format.md, as printed there, reads what is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm import checkpoint
from scalellm.checkpoint import part
from scalellm.dist import World
from scalellm.strategies import Piece

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoint-format.md"


def test_the_printed_reader_reads_a_checkpoint_of_several_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "MAX_FILE_BYTES", 64)
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tensors = {"model.a": whole, "optim.a.exp_avg": whole.double() * 2}
    pieces = [
        Piece(name, tensor[rows, columns], (6, 8), (rows.start, columns.start))
        for name, tensor in tensors.items()
        for rows in (slice(0, 2), slice(2, 6))
        for columns in (slice(0, 5), slice(5, 8))
    ]
    pieces.append(Piece("optim.a.step", torch.tensor(3.0), (), ()))
    path = checkpoint.save(tmp_path, 1, pieces, {}, World(), keep=1)
    assert len(list(path.glob("model-*"))) > 3
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    for name, tensor in tensors.items():
        read = names["read"](path, name)
        assert (read == tensor.numpy()).all() and read.dtype == tensor.numpy().dtype
    assert names["read"](path, "optim.a.step") == 3.0
