"""Safetensors files written as a stream: one tensor in memory at a time, hashed on the way.

The library's own writer takes all tensors of a file at once (an exported file has 5 GB), leaves the
hash to a second reading, and wraps a full disk in an error without its number.

Format: 8 bytes header length, a JSON header padded with spaces to 8 bytes, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from scalellm.checkpoint.layout import FileEntry

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_CHUNK_BYTES = 4 << 20
# How far the hash may be behind the file, and hold tensors.
_CHUNKS_BEHIND = 16
# The disk begins with a file once this much of it is written.
_SYNC_BYTES = 32 << 20

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], load: Callable[[str], Tensor]
) -> FileEntry:
    """Writes and fsyncs a file of the tensors in `specs`, key -> (dtype, shape).

    Args:
        load: returns the tensor of a key; called once for each, when its bytes are due.

    Raises:
        OSError: the disk is full or refuses.
        ValueError: a loaded tensor is not what `specs` says.
    """
    # Wider elements first, so that all are aligned to their size.
    keys = sorted(specs, key=lambda key: -specs[key][0].itemsize)
    # The hash is taken in a thread of its own, the end of it while the disk is waited for.
    digest = blake3()
    hashing: deque[Future[Any]] = deque()
    with (
        path.open("wb") as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as syncer,
    ):
        early = _EarlySync(file.fileno(), syncer)

        def put(content: bytes | memoryview) -> None:
            hashing.append(hasher.submit(digest.update, content))
            file.write(content)
            early.wrote(len(content))
            if len(hashing) > _CHUNKS_BEHIND:
                hashing.popleft().result()

        put(_header({key: specs[key] for key in keys}))
        for key in keys:
            tensor = load(key)
            if (tensor.dtype, tuple(tensor.shape)) != specs[key]:
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}: {specs[key]}")
            content = _bytes_of(tensor)
            for start in range(0, len(content), _CHUNK_BYTES):
                put(content[start : start + _CHUNK_BYTES])
        size_bytes = file.tell()
        file.flush()
        early.finish()
        for chunk in hashing:
            chunk.result()
    return FileEntry(size_bytes=size_bytes, blake3=digest.hexdigest())


class _EarlySync:
    """Lets the disk work while the rest of a file is copied for it: one fsync after another."""

    def __init__(self, descriptor: int, thread: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._thread = thread
        self._syncing: Future[None] | None = None
        self._waiting_bytes = 0

    def wrote(self, size_bytes: int) -> None:
        self._waiting_bytes += size_bytes
        if self._waiting_bytes < _SYNC_BYTES or (self._syncing and not self._syncing.done()):
            return
        self._check()
        self._syncing = self._thread.submit(os.fsync, self._descriptor)
        self._waiting_bytes = 0

    def finish(self) -> None:
        """Returns when all is on the disk."""
        self._check()
        os.fsync(self._descriptor)

    def _check(self) -> None:
        """Raises what the last fsync met: the system tells of an error only once."""
        if self._syncing is not None:
            self._syncing.result()


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for key, (dtype, shape) in specs.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[key] = {
            "dtype": DTYPE_CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
