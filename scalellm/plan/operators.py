"""What a step does besides matrix products: bytes moved and operators launched, by running it.

The real decoder runs forward and backward on tensors without data, one and two blocks, one and two
rows; everything else follows, since all costs are linear in both. So a changed model or another
kind of activation checkpointing is counted without a formula that would have to follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalellm.batches import Batch
from scalellm.config import ModelConfig, TrainConfig
from scalellm.dist import World
from scalellm.model import Decoder
from scalellm.plan._fakes import kernels_of
from scalellm.strategies import Options
from scalellm.strategies.single import Single
from scalellm.train.optimizer import make_adamw

_aten = torch.ops.aten
# Their time is counted by the operations, not by the bytes.
_MATRIX_PRODUCTS = {
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
# They read a few rows of a large table, or a few numbers.
_READS_AS_MUCH_AS_IT_WRITES = {_aten.embedding}
_READS_LITTLE = {_aten.nll_loss_forward, _aten.nll_loss_backward, _aten.embedding_dense_backward}


@dataclass(frozen=True)
class Work:
    """Of one micro-batch of one rank, matrix products left out of the bytes."""

    forward_bytes: int
    backward_bytes: int
    num_operators: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0
        self.num_operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        is_query = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))
        if is_query or func.is_view or kind in (_aten.detach, _aten._unsafe_view):
            return out
        self.num_operators += 1
        if kind not in _MATRIX_PRODUCTS:
            written_bytes = _bytes_of(out)
            read_bytes = 0 if kind in _READS_LITTLE else _bytes_of((args, kwargs))
            self.moved_bytes += written_bytes
            is_lookup = kind in _READS_AS_MUCH_AS_IT_WRITES
            self.moved_bytes += written_bytes if is_lookup else read_bytes
        return out


def _bytes_of(tree: Any) -> int:
    tensors = {id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values()
    # An expanded tensor is smaller than it looks.
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def measure_work(
    model: ModelConfig,
    train: TrainConfig,
    micro_batch_size: int,
    *,
    half: bool = False,
    device_type: str = "cpu",
) -> Work:
    """Returns the work of one micro-batch, forward and backward.

    Args:
        half: the parameters that the model computes with are of half precision already.
        device_type: whose kernels are counted, "cpu" or "cuda".
    """
    one_layer = model.model_copy(update={"num_layers": 1, "preset": None})
    mode = train.activation_checkpointing
    points = _points(one_layer, train.precision, mode, half, device_type)
    forward, backward, operators = (
        _at({corner: values[kind] for corner, values in points.items()}, model, micro_batch_size)
        for kind in range(3)
    )
    return Work(forward, backward, operators)


Corner = tuple[int, int]  # (layers, rows)
Points = dict[Corner, tuple[int, int, int]]


def _at(known: dict[Corner, int], model: ModelConfig, rows: int) -> int:
    """Continues the four corners from (1, 1) to (2, 2): a + b L + c R + d L R."""
    per_layer = known[2, 1] - known[1, 1]
    per_row = known[1, 2] - known[1, 1]
    per_both = known[2, 2] - known[2, 1] - per_row
    layers, rows = model.num_layers - 1, rows - 1
    return known[1, 1] + per_layer * layers + per_row * rows + per_both * layers * rows


@lru_cache(maxsize=64)
def _points(
    model: ModelConfig, precision: str, checkpointing: str, half: bool, device_type: str
) -> Points:
    train = TrainConfig.model_validate(
        {"precision": precision, "activation_checkpointing": checkpointing}
    )
    return {
        (layers, rows): _count(
            model.model_copy(update={"num_layers": layers}), train, rows, half, device_type
        )
        for layers, rows in product((1, 2), (1, 2))
    }


def _count(
    model: ModelConfig, train: TrainConfig, rows: int, half: bool, device_type: str
) -> tuple[int, int, int]:
    strategy = Single(World(), train, Options())
    strategy.fill = lambda model: None  # type: ignore[method-assign]  # values do not matter
    with torch.device("meta"):
        decoder = Decoder(model).to(torch.bfloat16 if half else None)
    counter = _Counter()
    # The decoder is on the meta device.
    with kernels_of(device_type), FakeTensorMode(allow_non_fake_inputs=True):
        strategy.setup(decoder, partial(make_adamw, train=train))
        tokens_BT = torch.zeros(rows, model.seq_len, dtype=torch.long)
        with counter:
            loss_sum = strategy.forward(Batch(tokens_BT=tokens_BT, targets_BT=tokens_BT))
            forward_bytes = counter.moved_bytes
            strategy.backward(loss_sum, tokens_BT.numel())
    return forward_bytes, counter.moved_bytes - forward_bytes, counter.num_operators
