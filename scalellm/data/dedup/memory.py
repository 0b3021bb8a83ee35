"""A ledger of the bytes that arrays take, for a cap that is kept and a peak that can be told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Memory:
    """Adds up what its users say they hold.

    Attributes:
        peak_bytes: the most that was held at a time.
    """

    def __init__(self) -> None:
        self._held_bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Counts `size_bytes` while the block runs."""
        self._held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        try:
            yield
        finally:
            self._held_bytes -= size_bytes
