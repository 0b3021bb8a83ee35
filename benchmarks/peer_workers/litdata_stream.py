"""litdata's streaming of packed tokens (`TokensLoader`), in the way of its documentation.

The raw ids are optimized into chunks first; then "run N" makes N passes and answers with one
{"tokens", "wall_s", "cpu_s", "first_ms"} for each, in the terms of benchmarks/data.py.
`options.compression` is litdata's own; `options.workers` are its loader's processes. Every pass
reads a copy of the chunks: litdata removes compressed ones while it reads them.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from _worker import next_turn, say

_PIECE_TOKENS = 1 << 20


def piece(job: tuple[str, int, int]) -> torch.Tensor:
    file, start, stop = job
    return torch.from_numpy(np.array(np.memmap(file, np.uint16, "r")[start:stop]))


def optimize(task: dict[str, Any], out: Path) -> None:
    """Writes litdata's own chunks of the ids; tokens can be compressed by whole chunks only."""
    compression = task["options"].get("compression")
    size = len(np.memmap(task["file"], np.uint16, "r"))
    litdata.optimize(
        fn=piece,
        inputs=[
            (task["file"], start, min(start + _PIECE_TOKENS, size))
            for start in range(0, size, _PIECE_TOKENS)
        ],
        output_dir=str(out),
        chunk_bytes="64MB",
        compression=compression,
        compression_level="chunk" if compression else None,
        item_loader=litdata.TokensLoader(block_size=task["seq_len"] + 1),
        num_workers=1,
    )


def passed(task: dict[str, Any], chunks: Path) -> dict[str, float]:
    """Reads about one epoch; rates leave out the first batch, which is timed by itself."""
    began_s = time.perf_counter()
    dataset = litdata.StreamingDataset(
        str(chunks),
        item_loader=litdata.TokensLoader(block_size=task["seq_len"] + 1),
        shuffle=True,
        drop_last=True,
        seed=task["seed"],
    )
    workers = int(task["options"].get("workers", 0))
    loader = litdata.StreamingDataLoader(dataset, batch_size=task["batch"], num_workers=workers)
    batches = iter(loader)
    next(batches)
    warm_s, cpu_s = time.perf_counter(), _cpu_s()
    tokens = sum(batch.long()[:, 1:].numel() for batch in batches)
    wall_s = time.perf_counter() - warm_s
    del batches, loader, dataset
    first_ms = (warm_s - began_s) * 1e3
    return {"tokens": tokens, "wall_s": wall_s, "cpu_s": _cpu_s() - cpu_s, "first_ms": first_ms}


def _cpu_s() -> float:
    """Of all threads, and of worker processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    original, copy = (Path(task["folder"], name) for name in ("chunks", "copy"))
    optimize(task, original)
    say({"ready": True, "versions": {"litdata": metadata.version("litdata")}})
    while True:
        runs = []
        for _ in range(next_turn()):
            shutil.copytree(original, copy)
            runs.append(passed(task, copy))
            shutil.rmtree(copy)
        say({"runs": runs})


if __name__ == "__main__":
    main()
