"""What MKL, torch's library of matrix products on a CPU, packs matrices into and keeps.

A product is taken in blocks of its inner dimension (Goto and van de Geijn 2008, "Anatomy of
High-Performance Matrix Multiplication"), and a buffer holds such a block of both factors. One that
is too small stays, and a larger one is made. Where they come to lie decides which tensors fit
beside them later, so a plan has them in the heap. Seen at malloc (torch 2.13, one thread and two):
with 256 rows 5.93 MiB for 1,024 x 1,024, 8.46 for 1,024 x 2,752 and 16.41 for 1,024 x 8,192.
"""

from __future__ import annotations

from scalellm.plan.allocator import MIB

_FIRST_BYTES = int(6.5 * MIB)  # at the first product of a process, whatever its size
_BASE_BYTES = int(4.2 * MIB)
_INNER = 384


class Packing:
    """The buffers of one process."""

    def __init__(self) -> None:
        self.kept_bytes = 0
        self._largest_bytes = -1

    def multiply(self, rows: int, inner: int, columns: int) -> int:
        """Returns the bytes that this product has the library take and keep."""
        if self._largest_bytes < 0:
            self._largest_bytes, taken_bytes = 0, _FIRST_BYTES
        else:
            block = inner if inner <= _INNER else min(_INNER, inner // 2)
            taken_bytes = _BASE_BYTES + block * (4 * columns + 2 * rows)
            if taken_bytes <= self._largest_bytes:
                return 0
            self._largest_bytes = taken_bytes
        self.kept_bytes += taken_bytes
        return taken_bytes
