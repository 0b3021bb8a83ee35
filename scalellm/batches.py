"""From a rank's rows of a global batch to micro-batches on the device.

Shapes: B samples, S = T + 1 tokens of a row, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalellm import data
from scalellm.dist import sum_over_ranks
from scalellm.model import IGNORED_TARGET, RowLosses


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device; targets of -100 do not count.

    `mask_B1TS` says what each query may see, where that is not its row's past; documents are in it.
    Of a mixture `sources_B` says which dataset each row is of, and the model leaves the losses of
    the rows in `row_losses`.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    sources_B: Tensor | None = None
    row_losses: RowLosses | None = None
    mask_B1TS: Tensor | None = None


def micro_batches(
    batch: data.Batch, micro_batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, bool]]:
    """Yields `(micro_batch, is_last)`, `micro_batch_size` rows each."""
    rows = len(batch.tokens_BS)
    for start in range(0, rows, micro_batch_size):
        stop = start + micro_batch_size
        yield to_device(batch, slice(start, stop), device), stop >= rows


def global_targets(batch: data.Batch, device: torch.device, *, counts: bool = True) -> int:
    """Returns the targets of the global batch; ranks that each know their own add them up.

    Args:
        counts: whether it is this rank that counts its rows; others may have read the same.
    """
    if batch.global_target_tokens is not None:
        return batch.global_target_tokens
    [total] = sum_over_ranks([float(batch.num_targets_B.sum()) * counts], device)
    return int(total)


def to_device(batch: data.Batch, rows: slice, device: torch.device) -> Batch:
    """Widens stored ids to int64 on the device (a quarter of the bytes cross to a GPU)."""
    tokens_BS = torch.from_numpy(batch.tokens_BS[rows]).to(device).long()
    # Laid out alike whether padded or not: other strides would compile everything once more.
    targets_BT = tokens_BS[:, 1:].contiguous()
    real_targets_B = torch.from_numpy(batch.num_targets_B[rows])
    seq_len = targets_BT.shape[1]
    if bool((real_targets_B < seq_len).any()):
        is_padding_BT = torch.arange(seq_len) >= real_targets_B[:, None]
        targets_BT = targets_BT.masked_fill(is_padding_BT.to(device), IGNORED_TARGET)
    return Batch(
        tokens_BT=tokens_BS[:, :-1].contiguous(),
        targets_BT=targets_BT,
        positions_BT=_optional(batch.positions_BT, rows, device),
        documents_BT=_optional(batch.documents_BT, rows, device),
        sources_B=_optional(batch.sources_B, rows, device),
        row_losses=None if batch.sources_B is None else RowLosses(),
    )


def _optional(array: np.ndarray | None, rows: slice, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(array[rows]).to(device).long()
