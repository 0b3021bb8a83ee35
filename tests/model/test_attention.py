"""Both kernels against each other and against attention written out in fp64; the cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalellm.config import ModelConfig
from scalellm.model import attention
from scalellm.model.attention import KVCache, attend, choose_kernel, document_mask

KERNELS = ("sdpa", "explicit")


def make_qkv(T: int, S: int, heads: tuple[int, int] = (4, 2), D: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T * 100 + S)
    shapes = ((2, heads[0], T, D), (2, heads[1], S, D), (2, heads[1], S, D))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    )


def one_query_at_a_time(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Causal attention by the definition: no matrix product, no mask, no grouping trick."""
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    out_BHTD = torch.zeros_like(q_BHTD)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        k_ND, v_ND = (x[b, h * G // H, : S - T + t + 1] for x in (k_BGSD, v_BGSD))
        weights_N = torch.softmax((k_ND * q_BHTD[b, h, t]).sum(1) / math.sqrt(D), dim=0)
        out_BHTD[b, h, t] = (weights_N[:, None] * v_ND).sum(0)
    return out_BHTD


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 1), (1, 7), (3, 7)])
def test_kernels_follow_the_definition(kernel: str, heads: tuple[int, int], T: int, S: int) -> None:
    q, k, v = make_qkv(T, S, heads)
    expected = one_query_at_a_time(q.detach(), k.detach(), v.detach())
    torch.testing.assert_close(attend(q, k, v, None, kernel), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [5, 17])
def test_kernels_agree_with_gradients(
    masked: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES_AT_ONCE", at_once)
    documents_BT = torch.tensor([[0] * 5 + [1] * 12, [0] * 16 + [3]])
    mask = document_mask(documents_BT) if masked else None
    results = []
    for kernel in KERNELS:
        q, k, v = make_qkv(17, 17)
        y = attend(q, k, v, mask, kernel)
        y.square().sum().backward()
        results.append((y.detach(), q.grad, k.grad, v.grad))
    for sdpa, explicit in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, explicit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_document_mask_equals_documents_apart(kernel: str) -> None:
    q, k, v = make_qkv(10, 10)
    together = attend(q, k, v, document_mask(torch.tensor([[5] * 4 + [6] * 6] * 2)), kernel)
    apart = [
        attend(*(x[:, :, part] for x in (q, k, v)), None, kernel)
        for part in (slice(0, 4), slice(4, 10))
    ]
    torch.testing.assert_close(together, torch.cat(apart, dim=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_fp64(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in make_qkv(33, 33))
    result = attend(q.to(dtype), k.to(dtype), v.to(dtype), None, kernel)
    assert result.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    expected = attend(q, k, v, None, "explicit")
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_kernel_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_EXPLICIT_MAX_TOKENS", 256)
    assert choose_kernel("cpu", torch.bfloat16, 256) == "explicit"
    assert choose_kernel("cpu", torch.bfloat16, 257) == "sdpa"
    assert choose_kernel("cpu", torch.float32, 16) == "sdpa"
    assert choose_kernel("cpu", torch.float64, 16) == "sdpa"
    assert choose_kernel("cuda", torch.bfloat16, 16) == "sdpa"


@pytest.mark.parametrize("num_tokens", [256, 257])
def test_auto_runs_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(attention, "_EXPLICIT_MAX_TOKENS", 256)
    q, k, v = (x.detach().bfloat16() for x in make_qkv(num_tokens, num_tokens))
    chosen, other = KERNELS[::-1] if num_tokens <= 256 else KERNELS
    auto = attend(q, k, v)
    assert torch.equal(auto, attend(q, k, v, None, chosen))
    assert not torch.equal(auto, attend(q, k, v, None, other))  # rounding tells them apart


def test_cache_refuses_more_than_its_room() -> None:
    cache = KVCache(ModelConfig(vocab_size=8), batch=1, max_tokens=4)
    three, one = torch.ones(1, 4, 3, 16), torch.ones(1, 4, 1, 16)
    cache.layers[0].append(three, three)
    with pytest.raises(ValueError, match="room for 4 tokens, not 6"):
        cache.layers[0].append(three, three)
    cache.layers[0].append(one, one)
    with pytest.raises(ValueError, match="room for 4 tokens, not 5"):
        cache.layers[0].append(one, one)
    assert cache.length == 4
    cache.clear()
    assert cache.length == 0
