"""fp32 products by oneDNN, where that is faster and still fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scalellm import products
from scalellm.dist import ranks

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "_CPUINFO", cpuinfo)
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("a torch without a choice")
    return cpuinfo


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t: 85\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
        (None, False),
    ],
)
def test_a_cpu_that_mkl_does_not_know_multiplies_by_onednn(
    maker: Path, text: str | None, chosen: bool
) -> None:
    if text is not None:
        maker.write_text(text)
    with products.fast_fp32() as is_onednn:
        assert is_onednn == (chosen and products.onednn_keeps_fp32())
        assert MATMUL.fp32_precision == ("bf16" if is_onednn else "none")
    assert MATMUL.fp32_precision == "none"


def test_what_is_chosen_is_fp32(maker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the small, and of the transposed ones that a backward makes."""
    maker.write_text("vendor_id : AuthenticAMD\n")
    torch.manual_seed(0)
    with ranks("cpu", process_group=False):
        for rows, inner, columns in [(7, 384, 1024), (256, 1024, 384), (1, 2048, 3)]:
            a, b = torch.randn(rows, inner), torch.randn(columns, inner)
            for left, right in [(a, b.T), (a.T.contiguous().T, b.T), (a[:, ::2], b[:, ::2].T)]:
                exact = left.double() @ right.double()
                error = ((left @ right).double() - exact).norm() / exact.norm()
                assert error < 2e-6

    monkeypatch.setattr(products, "_LARGEST_ERROR", 0.0)  # a CPU whose oneDNN rounds to bf16
    with products.fast_fp32() as is_onednn:
        assert not is_onednn and MATMUL.fp32_precision == "none"


def test_what_a_user_has_chosen_stays(maker: Path) -> None:
    maker.write_text("vendor_id : AuthenticAMD\n")
    MATMUL.fp32_precision = "ieee"
    try:
        with products.fast_fp32() as is_onednn:
            assert not is_onednn and MATMUL.fp32_precision == "ieee"
    finally:
        MATMUL.fp32_precision = "none"
