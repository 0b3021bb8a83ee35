"""Context parallelism: each rank of a group computes some positions of every row.

Only attention looks beyond a position, so it alone communicates, in one of two ways.

- gather: every rank gathers all keys and values and keeps its own queries (Llama 3, Dubey et al.
  2024, section 3.3.2). A rank has two chunks, one from either end of the row, since later queries
  see more keys. Communication grows with the key/value heads; any number of heads will do.
- ulysses: the ranks exchange positions for heads, each attends over whole rows with some of the
  heads, and they exchange back (DeepSpeed-Ulysses, Jacobs et al. 2023). The heads must divide.

Shapes: N ranks of the group, B batch, T positions of the whole row, t = T / N of them here, C = 2 N
chunks of c = T / C positions (gather), H query heads, G key/value heads, D features of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from scalellm.batches import Batch
from scalellm.config import ModelConfig
from scalellm.dist import Group
from scalellm.errors import ConfigError
from scalellm.model.attention import attend, choose_kernel, document_mask
from scalellm.model.decoder import SelfAttention
from scalellm.strategies._context_collectives import (
    GatherRows,
    HeadsForPositions,
    PositionsForHeads,
)

Method = Literal["gather", "ulysses"]

# Queries of one product without documents. Its mask is T times as large and there is one of it;
# torch 2.13's CPU kernel is as fast with 256 as with 2,048 (6,144 earlier keys, fp32).
_QUERIES_AT_ONCE = 512


def check_context(model: ModelConfig, size: int, method: Method, tp: int = 1) -> None:
    """Refuses what cannot be divided among `size` ranks of a context group.

    Args:
        tp: among how many ranks tensor parallelism has divided the heads before.

    Raises:
        ConfigError: the row's length, or for ulysses the heads, are no multiple.
    """
    if size == 1:
        return
    multiple = size if method == "ulysses" else 2 * size
    if model.seq_len % multiple:
        low = model.seq_len // multiple * multiple
        nearest = f"{low:,} or {low + multiple:,}" if low else f"{multiple:,}"
        raise ConfigError(
            f"model.seq_len={model.seq_len:,} tokens are not a multiple of the {multiple:,} chunks "
            f"into which {size:,} context-parallel ranks divide a row ({method}); "
            f"try model.seq_len={nearest}"
        )
    if method != "ulysses":
        return
    for name, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if heads % (size * tp):
            among = f"{size:,} context-parallel ranks"
            if tp > 1:
                among = f"{tp:,} tensor-parallel times {among}"
            raise ConfigError(
                f"model.{name}={heads:,} heads cannot be divided evenly among {among}, as the "
                "method ulysses does; use the method gather"
            )


@dataclass(frozen=True)
class Context:
    """This rank's place in a group that shares the positions of its rows.

    Args:
        group: the process group, ranks in their order.
        rank: this process' number in the group.
        size: N, the number of its ranks.
    """

    group: Group
    rank: int
    size: int
    method: Method

    def positions(self, num_positions: int) -> list[range]:
        """Returns this rank's positions of a row of so many, chunk by chunk, in order.

        Raises:
            ValueError: the row cannot be divided evenly.
        """
        parts = self.size if self.method == "ulysses" else 2 * self.size
        if num_positions % parts:
            raise ValueError(f"a row of {num_positions} positions is not a multiple of {parts}")
        length = num_positions // parts
        chunks = [self.rank]
        if self.method == "gather":
            chunks.append(parts - 1 - self.rank)
        return [range(chunk * length, (chunk + 1) * length) for chunk in chunks]

    def local(self, batch: Batch) -> Batch:
        """Returns this rank's positions of a micro-batch, with the mask for `Block`.

        The loss of what is returned is this rank's share: shares add up over the group, and so do
        the gradients of the weights. Its positions are explicit, and there are no documents in it:
        they are in the mask, of bools, with a query that is here in each row and a key of the whole
        row in each column (ulysses: with a query of the whole row). None: plainly causal.
        """
        T = batch.tokens_BT.shape[1]
        device = batch.tokens_BT.device
        positions_BT = batch.positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(T, device=device).unsqueeze(0)
        chunks = self.positions(T)
        local = replace(
            batch,
            tokens_BT=_pick(batch.tokens_BT, chunks),
            targets_BT=_pick(batch.targets_BT, chunks),
            positions_BT=_pick(positions_BT, chunks),
            documents_BT=None,
        )
        if batch.documents_BT is None:
            return local
        if self.method == "ulysses":
            return replace(local, mask_B1TS=document_mask(batch.documents_BT))
        documents_Bt = _pick(batch.documents_BT, chunks)
        same_BtT = documents_Bt.unsqueeze(2) == batch.documents_BT.unsqueeze(1)
        # By the place in the row: positions begin again with each document.
        places_T = torch.arange(T, device=device)
        places_t = _pick(places_T.unsqueeze(0), chunks).squeeze(0)
        mask_BtT = same_BtT & (places_t.unsqueeze(1) >= places_T)
        return replace(local, mask_B1TS=mask_BtT.unsqueeze(1))

    def mix(
        self,
        q_BHtD: Tensor,
        k_BGtD: Tensor,
        v_BGtD: Tensor,
        mask_B1TT: Tensor | None,
        kernel: str,
    ) -> Tensor:
        """`attend` over the whole rows, of which each rank gives and gets its own positions."""
        if self.method == "ulysses":
            return self._exchange_and_mix(q_BHtD, k_BGtD, v_BGtD, mask_B1TT, kernel)
        kv_2BGTD = GatherRows.apply(torch.stack((k_BGtD, v_BGtD)), self.group, self.size)
        k_BGTD, v_BGTD = kv_2BGTD
        T = k_BGTD.shape[2]
        # Of what no query of a block may see nothing is computed. Without documents one small mask
        # serves all blocks: for long rows one of their size would be the largest tensor there is.
        outputs: list[Tensor] = []
        done = 0
        for begin, end in self._blocks(T):
            rows = slice(done, done + end - begin)
            done = rows.stop
            if mask_B1TT is not None:
                mask_B1qS: Tensor | None = mask_B1TT[:, :, rows, :end]
            else:
                mask_B1qS = _past_of(begin, end, T, q_BHtD, kernel)
            outputs.append(
                attend(
                    q_BHtD[:, :, rows], k_BGTD[:, :, :end], v_BGTD[:, :, :end], mask_B1qS, kernel
                )
            )
        return torch.cat(outputs, dim=2)

    def _blocks(self, num_positions: int) -> list[tuple[int, int]]:
        """Returns (begin, end) of the runs of queries that are attended at once."""
        return [
            (begin, min(begin + _QUERIES_AT_ONCE, chunk.stop))
            for chunk in self.positions(num_positions)
            for begin in range(chunk.start, chunk.stop, _QUERIES_AT_ONCE)
        ]

    def _exchange_and_mix(
        self,
        q_BHtD: Tensor,
        k_BGtD: Tensor,
        v_BGtD: Tensor,
        mask_B1TT: Tensor | None,
        kernel: str,
    ) -> Tensor:
        """Rank i attends with the i-th share of the query heads and with the i-th of the others."""
        shares_BNhtD = [x.unflatten(1, (self.size, -1)) for x in (q_BHtD, k_BGtD, v_BGtD)]
        sizes = [share.shape[2] for share in shares_BNhtD]
        qkv_BhTD = HeadsForPositions.apply(torch.cat(shares_BNhtD, dim=2), self.group, self.size)
        q_BhTD, k_BgTD, v_BgTD = qkv_BhTD.split(sizes, dim=1)
        y_BhTD = attend(q_BhTD, k_BgTD, v_BgTD, mask_B1TT, kernel)
        y_BNhtD: Tensor = PositionsForHeads.apply(y_BhTD, self.group, self.size)
        return y_BNhtD.flatten(1, 2)


def apply(root: nn.Module, context: Context) -> None:
    """Lets every attention in a decoder, or in some of its blocks, `mix` over the group."""
    if context.size == 1:
        return
    for module in root.modules():
        if isinstance(module, SelfAttention):
            mix = functools.partial(_mix_outside_graphs, context, module.kernel)
            module.mix = mix  # type: ignore[method-assign]


@torch.compiler.disable
def _mix_outside_graphs(
    context: Context,
    kernel: str,
    q_BHtD: Tensor,
    k_BGtD: Tensor,
    v_BGtD: Tensor,
    mask_B1TT: Tensor | None,
) -> Tensor:
    """Gloo's collectives cannot be in a graph; what stands before and after them is compiled."""
    return context.mix(q_BHtD, k_BGtD, v_BGtD, mask_B1TT, kernel)


def _pick(x_BT: Tensor, chunks: list[range]) -> Tensor:
    return torch.cat([x_BT[:, chunk.start : chunk.stop] for chunk in chunks], dim=1)


def _past_of(begin: int, end: int, T: int, q_BHtD: Tensor, kernel: str) -> Tensor | None:
    """Returns what the queries begin .. end - 1 see of the keys 0 .. end - 1."""
    if begin == 0:
        return None  # a square: `attend` takes it to be causal
    device = q_BHtD.device
    if kernel == "auto":
        kernel = choose_kernel(device.type, q_BHtD.dtype, end)
    # SDPA keeps a mask for the backward, in the type of the queries: a copy of each, given bools.
    dtype = torch.bool if kernel == "explicit" else q_BHtD.dtype
    # The last queries of a row whose last end - begin positions these would be.
    strip_11qT = _causal_strip(min(_QUERIES_AT_ONCE, T), T, dtype, device)
    return strip_11qT[:, :, begin - end :, T - end :]


@functools.lru_cache(maxsize=2)
def _causal_strip(q: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns (1, 1, q, T): what the last q queries of a row see, as bools or as numbers to add."""
    with torch.inference_mode(False):  # or no backward could use it later
        hidden_qT = torch.ones(q, T, dtype=torch.bool, device=device).triu_(T - q + 1)
        if dtype == torch.bool:
            strip_qT = ~hidden_qT
        else:
            strip_qT = torch.zeros(q, T, dtype=dtype, device=device)
            strip_qT.masked_fill_(hidden_qT, -torch.inf)
    return strip_qT.view(1, 1, q, T)
