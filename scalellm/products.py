"""Which library multiplies fp32 matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
# fp32 is off by some 5e-7 in the product tried, TF32 by 3e-4 and bf16 by 3e-3.
_LARGEST_ERROR = 1e-5


@contextmanager
def fast_fp32() -> Iterator[bool]:
    """Multiplies fp32 by oneDNN where torch's own choice, MKL, does not know the CPU.

    MKL takes its slow ways on CPUs of other makers than its own: on one of AMD's, oneDNN was up to
    three times as fast, while on Intel's it is slower (docs/log.md). Not timed at start-up: the
    same machine has to make the same choice, or a resumed run would not have the same bits.
    Yields whether oneDNN it is.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    is_free = settings.fp32_precision == "none"  # else somebody has chosen
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if is_free and has_both and _is_of_another_maker(_CPUINFO) and onednn_keeps_fp32():
        with through_onednn():
            yield True
    else:
        yield False


@contextmanager
def through_onednn() -> Iterator[None]:
    """Sends the fp32 products of a `with` on a CPU to oneDNN, which then may round to bf16."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def onednn_keeps_fp32() -> bool:
    """Whether `through_onednn` leaves fp32 what it is: not where units for bf16 make that slower.

    Tried, since oneDNN does not say.
    """
    generator = torch.Generator().manual_seed(0)  # not the run's own
    a = torch.randn(128, 1024, generator=generator)
    b = torch.randn(1024, 256, generator=generator)
    exact = a.double() @ b.double()
    with through_onednn():
        error = float(((a @ b).double() - exact).norm() / exact.norm())
    return error <= _LARGEST_ERROR


def _is_of_another_maker(cpuinfo: Path) -> bool:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    makers = [line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")]
    return bool(makers) and makers[0] != "GenuineIntel"
