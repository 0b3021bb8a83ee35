"""Causal attention: which kernel runs, and the key/value cache of generation.

Shapes: B batch, T queries, S keys (S >= T, the queries are the last T of them), H query heads,
G key/value heads (G divides H), D features of a head, L layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.config import ModelConfig

# The longest rows for which explicit matmul-softmax beats PyTorch's CPU flash kernel in bf16 (torch
# 2.13, one thread). On a CPU with native bf16 products (Zen 5) explicit took 6.7 against 18.6 ms at
# 256 tokens and 23 against 38 at 1,024; there the probabilities it keeps for the backward are about
# as large as all other activations of a block, so longer rows take SDPA for memory's sake. Without
# native bf16 (Xeon Cascade Lake; 2,048 tokens, 6 heads of 64, forward and backward): 63 against 162
# ms at 128, 117 against 120 at 256, 235 against 207 at 512. In fp32 flash wins, or ties, at every
# length there: 34 against 32 ms at 128, 58 against 50 at 256, 223 against 102 at 1,024.
EXPLICIT_MAX_TOKENS_NATIVE_BF16 = 1024
EXPLICIT_MAX_TOKENS_EMULATED_BF16 = 256

# Of a causal product, in the explicit kernel.
_QUERIES_AT_ONCE = 256

_HALF_TYPES = (torch.bfloat16, torch.float16)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions; without them bf16 is slower than fp32."""
    capabilities: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


_EXPLICIT_MAX_TOKENS = (
    EXPLICIT_MAX_TOKENS_NATIVE_BF16 if cpu_multiplies_bf16() else EXPLICIT_MAX_TOKENS_EMULATED_BF16
)


def choose_kernel(device_type: str, dtype: torch.dtype, num_keys: int) -> str:
    """Returns `"explicit"` for short rows in half precision on the CPU, else `"sdpa"`."""
    short = num_keys <= _EXPLICIT_MAX_TOKENS
    return "explicit" if device_type == "cpu" and dtype in _HALF_TYPES and short else "sdpa"


def document_mask(documents_BT: Tensor) -> Tensor:
    """Returns the bool mask (B, 1, T, T) in which a token sees its own document's past and itself.

    Args:
        documents_BT: the number of each token's document inside its row, any integer type.
    """
    same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return same_BTT.tril().unsqueeze(1)


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask_B1TS: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Softmax attention scaled by 1/sqrt(D), with grouped queries where G < H.

    Args:
        mask_B1TS: True where a query may see a key, causality included; None: plainly causal,
            that is, query t sees keys 0 .. S - T + t.
        kernel: `"sdpa"`, `"explicit"` or `"auto"` (see `choose_kernel`).

    Returns:
        The mixed values, (B, H, T, D) in the type of `q_BHTD`.
    """
    if kernel == "auto":
        kernel = choose_kernel(q_BHTD.device.type, q_BHTD.dtype, k_BGSD.shape[2])
    num_queries, num_keys = q_BHTD.shape[2], k_BGSD.shape[2]
    if mask_B1TS is None and 1 < num_queries < num_keys:
        whole_SS = torch.ones(num_keys, num_keys, dtype=torch.bool, device=q_BHTD.device)
        mask_B1TS = whole_SS.tril()[-num_queries:].view(1, 1, num_queries, num_keys)
    if kernel == "explicit":
        return _explicit(q_BHTD, k_BGSD, v_BGSD, mask_B1TS)
    return _sdpa(q_BHTD, k_BGSD, v_BGSD, mask_B1TS)


def _sdpa(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    groups = q_BHTD.shape[1] // k_BGSD.shape[1]
    # On CUDA only the flash kernel takes grouped heads, and it takes neither masks nor fp32: the
    # others would fall back to the unfused kernel, which costs more than repeating the keys.
    grouped = q_BHTD.device.type != "cuda" or (mask_B1TS is None and q_BHTD.dtype in _HALF_TYPES)
    if groups > 1 and not grouped:
        k_BGSD = k_BGSD.repeat_interleave(groups, dim=1)
        v_BGSD = v_BGSD.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask_B1TS,
        is_causal=mask_B1TS is None and q_BHTD.shape[2] > 1,
        enable_gqa=groups > 1 and grouped,
    )


def _explicit(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    if mask_B1TS is not None or T != S or T <= _QUERIES_AT_ONCE:
        return _scores_and_mix(q_BHTD, k_BGSD, v_BGSD, mask_B1TS)
    # What no query of a chunk may see is not computed: 3/8 of the work at four chunks.
    ends = [*range(_QUERIES_AT_ONCE, T, _QUERIES_AT_ONCE), T]
    chunks = zip(q_BHTD.split(_QUERIES_AT_ONCE, dim=2), ends, strict=True)
    return torch.cat(
        [_scores_and_mix(q, k_BGSD[:, :, :end], v_BGSD[:, :, :end], None) for q, end in chunks],
        dim=2,
    )


def _scores_and_mix(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1TS: Tensor | None
) -> Tensor:
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    # The queries of a group stand under one another, so that no key is copied.
    q_BGND = (q_BHTD * D**-0.5).reshape(B, G, H // G * T, D)
    scores_BHTS = (q_BGND @ k_BGSD.transpose(2, 3)).view(B, H, T, S)
    bias_B1TS = torch.zeros(1, 1, T, S, dtype=scores_BHTS.dtype, device=q_BHTD.device)
    if mask_B1TS is not None:
        bias_B1TS = bias_B1TS.masked_fill(~mask_B1TS, -torch.inf)
    elif T > 1:
        bias_B1TS = bias_B1TS.fill_(-torch.inf).triu_(S - T + 1)
    weights_BHTS = torch.softmax(scores_BHTS + bias_B1TS, dim=-1, dtype=scores_BHTS.dtype)
    return (weights_BHTS.view(B, G, H // G * T, S) @ v_BGSD).view(B, H, T, D)


class LayerCache:
    """The keys and values one layer has seen, in memory allocated once."""

    def __init__(self, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        self._k_BGSD, self._v_BGSD = k_BGSD, v_BGSD
        self.length = 0

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T more tokens and returns all keys and values so far, (B, G, S, D) each.

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        end, room = self.length + k_BGTD.shape[2], self._k_BGSD.shape[2]
        if end > room:
            raise ValueError(f"the cache has room for {room} tokens, not {end}; make it larger")
        self._k_BGSD[:, :, self.length : end] = k_BGTD
        self._v_BGSD[:, :, self.length : end] = v_BGTD
        self.length = end
        return self._k_BGSD[:, :, :end], self._v_BGSD[:, :, :end]


class KVCache:
    """Keys and values of every layer, so that a decoder reads each token once.

    Args:
        config: the decoder's shape.
        batch: rows decoded together.
        max_tokens: room per row, in tokens; 2 * L * B * G * max_tokens * D numbers are allocated.
        dtype: the weights' type.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, 2, batch, config.kv_heads, max_tokens, config.head_size)
        self.layers = [LayerCache(*kv) for kv in torch.zeros(shape, dtype=dtype, device=device)]
        self.max_tokens = max_tokens

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forgets every token and keeps the memory."""
        for layer in self.layers:
            layer.length = 0
