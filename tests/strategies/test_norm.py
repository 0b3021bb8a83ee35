"""The norm of gradients: exact to far below any tolerance, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from scalellm.strategies._norm import norm_of


def exact(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm(dtype: torch.dtype) -> None:
    """Of every size about a row of 128, of many magnitudes, and of what is not contiguous."""
    torch.manual_seed(0)
    shapes = [(), (1,), (127,), (128,), (129,), (300, 200), (0,), (3, 5, 7)]
    tensors = [torch.randn(shape) * 10.0 ** (3 - i) for i, shape in enumerate(shapes)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    assert norm_of(tensors) == pytest.approx(exact(tensors), rel=1e-8)
    across = [torch.randn(64, 48).to(dtype).T, *tensors]
    assert norm_of(across) == pytest.approx(exact(across), rel=1e-8)


def test_many_equal_numbers() -> None:
    """All rows round alike here, so their errors of up to half of fp32's last bit do not cancel."""
    tensors = [torch.full((4_000_000,), 0.1)]
    assert norm_of(tensors) == pytest.approx(exact(tensors), rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e17, 1e25])
def test_squares_beyond_the_range_of_fp32(scale: float) -> None:
    tensors = [torch.randn(1000) * scale]
    assert norm_of(tensors) == pytest.approx(exact(tensors), rel=1e-8)
    assert norm_of(tensors) > 0


def test_what_is_not_finite_shows() -> None:
    big = torch.zeros(200)
    big[150] = math.inf
    assert norm_of([torch.ones(3), big]) == math.inf
    big[150] = math.nan
    assert math.isnan(norm_of([torch.ones(3), big]))
    assert norm_of([]) == 0.0
    assert norm_of([torch.zeros(5)]) == 0.0
