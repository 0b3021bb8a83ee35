"""The decoder and what can be said of it without running it."""

from scalellm.model.attention import KVCache, cpu_multiplies_bf16
from scalellm.model.count import count_parameters, flops_per_token
from scalellm.model.decoder import Decoder
from scalellm.model.loss import IGNORED_TARGET, RowLosses

__all__ = [
    "IGNORED_TARGET",
    "Decoder",
    "KVCache",
    "RowLosses",
    "count_parameters",
    "cpu_multiplies_bf16",
    "flops_per_token",
]
