"""What all trainers read: our dataset, the very same rows as plain ids, the initial weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from scalellm.config import DataConfig
from scalellm.data import TokenDataset, TokenStream
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.model import Decoder

_BYTES_PER_TOKEN = 4
_LEAST_BYTES, _MOST_BYTES = 4_000_000, 40_000_000


def write_files(args: argparse.Namespace, folder: Path) -> None:
    """Leaves `data/`, `ids.npy` (rows of T + 1 ids) and `weights.npz` in `folder`.

    The rows stand in the order in which `scalellm train` reads its shards: all train on the same.
    """
    import torch

    print("preparing the data ...", file=sys.stderr, flush=True)
    config = args.model
    # One batch more than is trained: the last gate stands behind it.
    num_batches = args.warmup + args.rounds * args.steps + 1
    size_bytes = num_batches * args.batch * config.seq_len * _BYTES_PER_TOKEN
    prepare(
        PrepareOptions(
            sources=("stdlib",),
            out=folder / "data",
            vocab_size=config.vocab_size,
            num_workers=1,
            limit_bytes=min(max(size_bytes, _LEAST_BYTES), _MOST_BYTES),
        ),
        progress=False,
    )
    with TokenStream(
        TokenDataset.open(folder / "data", "train"),
        seq_len=config.seq_len,
        global_batch_size=args.batch,
        seed=args.seed,
        lanes=DataConfig().lanes,
    ) as stream:
        rows = [batch.tokens_BS.copy() for batch, _ in (next(stream) for _ in range(num_batches))]
    np.save(folder / "ids.npy", np.concatenate(rows))
    torch.manual_seed(args.seed)
    weights = Decoder(config).state_dict()
    np.savez(folder / "weights.npz", **{name: w.numpy() for name, w in weights.items()})
