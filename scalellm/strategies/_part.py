"""A decoder, or the stage of a pipeline that one rank holds of it, under the decoder's own names.

Shapes: B batch, T tokens of a row, S keys that a query may see, C features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalellm.model import Decoder, RowLosses
from scalellm.model.attention import document_mask


class Part(nn.Module):
    """Runs what is left of a decoder: the first part embeds, the last one takes the loss.

    Its parameters are called `module.<name in the decoder>`, which strategies know to shorten.
    """

    def __init__(self, decoder: Decoder, *, is_first: bool = True, is_last: bool = True) -> None:
        super().__init__()
        self.module = decoder
        self.is_first, self.is_last = is_first, is_last

    def forward(
        self,
        x: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mask_B1TS: Tensor | None = None,
        row_losses: RowLosses | None = None,
    ) -> Tensor:
        """Returns the loss or logits as `Decoder.forward` does; of an earlier part x_BTC.

        Args:
            x: the tokens (B, T) of the first part, else what the part before returned.
            positions_BT: None: 0 .. T - 1, which only tokens can tell.
            mask_B1TS: what each query may see, if it is not this row's past.
        """
        decoder = self.module
        if positions_BT is None:
            positions_BT = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        x_BTC = decoder.embed(x, positions_BT, positions_BT.shape[1]) if self.is_first else x
        rotation_2BT1R = decoder.rotation(positions_BT, x_BTC.dtype)
        if mask_B1TS is None and documents_BT is not None:
            mask_B1TS = document_mask(documents_BT)
        for layer in decoder.layers.children():
            x_BTC = layer(x_BTC, rotation_2BT1R, mask_B1TS)
        if self.is_last:
            return decoder.finish(x_BTC, targets_BT, row_losses)
        return x_BTC.contiguous()  # it is sent
