"""One rank that trains on one long row under a memory cap of its own; see test_context_memory.py.

`python long_row.py RANK SIZE STORE CAP_MIB METHOD` prints the losses of the steps, or
"out of memory". The cap is set by the kernel (RLIMIT_DATA, all private writable memory), so many
MiB above what the process has once everything is imported, built and was used once.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as tdist

from scalellm.batches import Batch
from scalellm.config import ModelConfig
from scalellm.errors import is_out_of_memory
from scalellm.model import Decoder
from scalellm.strategies._context import Context, apply
from scalellm.strategies._part import Part

ROW_TOKENS = 4096
STEPS = 2
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=2048,
    seq_len=ROW_TOKENS,
)


def step(part: Part, context: Context, batch: Batch) -> float:
    """Returns the mean loss before the step."""
    local = context.local(batch)
    loss = part(local.tokens_BT, local.targets_BT, positions_BT=local.positions_BT)
    (loss / batch.targets_BT.numel()).backward()
    total = loss.detach().clone()
    tdist.all_reduce(total)
    with torch.no_grad():
        for parameter in part.parameters():
            tdist.all_reduce(parameter.grad)
            parameter -= 2.0 * parameter.grad  # type: ignore[operator]  # it has one
            parameter.grad = None
    return total.item() / batch.targets_BT.numel()


def draw(num_tokens: int) -> Batch:
    """A row in which each token tells the next but for a little noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(4, (1, num_tokens + 1), generator=generator)
    tokens_BS = (torch.arange(num_tokens + 1) * 7 + noise) % 256
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:].contiguous())


def private_bytes() -> int:
    """What RLIMIT_DATA counts."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


def cap(above_bytes: int) -> None:
    limit = private_bytes() + above_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(rank: int, size: int, store: str, cap_mib: int, method: Any) -> None:
    torch.set_num_threads(1)
    tdist.init_process_group("gloo", store=tdist.FileStore(store, size), rank=rank, world_size=size)
    context = Context(None, rank, size, method)
    torch.manual_seed(0)
    decoder = Decoder(MODEL)
    apply(decoder, context)
    part = Part(decoder)
    step(part, context, draw(64))
    if cap_mib:
        cap(cap_mib << 20)
    batch = draw(ROW_TOKENS)
    try:
        print(*[step(part, context, batch) for _ in range(STEPS)])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print("out of memory")
        return  # of two ranks the other one waits: the test ends it
    tdist.barrier()


if __name__ == "__main__":
    number, ranks, path, mebibytes, way = sys.argv[1:]
    main(int(number), int(ranks), path, int(mebibytes), way)
    sys.stdout.flush()
    os._exit(0)  # in Python's teardown gloo's threads may abort the rank, or keep it
