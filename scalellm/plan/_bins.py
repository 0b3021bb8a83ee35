"""glibc's free chunks: first in the order in which they were freed, later by size (see `heap`)."""

from __future__ import annotations

SMALL = 1024  # chunks below lie in bins of one size each


class Bins:
    """Chunks by address, and by what they are found by."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.ends: dict[int, int] = {}  # address by the address after the chunk
        self.unsorted: dict[int, None] = {}
        self.last_rest: int | None = None
        self._bins: dict[int, dict[int, list[int]]] = {}  # by bin, then by size
        self._filled = 0  # a bit for each bin

    def add(self, address: int, size: int) -> None:
        self.sizes[address], self.ends[address + size] = size, address
        self.unsorted[address] = None

    def remove(self, address: int) -> int:
        """Returns the size of what is no longer free."""
        size = self.sizes.pop(address)
        del self.ends[address + size]
        if address in self.unsorted:
            del self.unsorted[address]
            return size
        index = _bin(size)
        same = self._bins[index][size]
        same.remove(address)
        if not same:
            del self._bins[index][size]
            if not self._bins[index]:
                self._filled &= ~(1 << index)
        return size

    def sort(self, address: int) -> None:
        del self.unsorted[address]
        size = self.sizes[address]
        index = _bin(size)
        same = self._bins.setdefault(index, {}).setdefault(size, [])
        same.insert(0 if size < SMALL else 1, address)  # the first of a large size stays first
        self._filled |= 1 << index

    def oldest(self, size: int) -> int | None:
        """Of chunks of this small size, sorted."""
        same = self._bins.get(_bin(size), {}).get(size)
        return same[-1] if same else None

    def best_fit(self, size: int) -> int | None:
        """The smallest sorted chunk that is large enough."""
        index = _bin(size)
        fitting = [found for found in self._bins.get(index, ()) if found >= size]
        if fitting and size >= SMALL:
            same = self._bins[index][min(fitting)]
            return same[min(1, len(same) - 1)]
        larger = self._filled >> (index + 1)
        if not larger:
            return None
        index += (larger & -larger).bit_length()
        same = self._bins[index][min(self._bins[index])]
        return same[-1]


# Above SMALL: the most that a bin's number counts to, in units of so many bits, from where.
_STEPS = ((48, 6, 48), (20, 9, 91), (10, 12, 110), (4, 15, 119), (2, 18, 124))


def _bin(size: int) -> int:
    if size < SMALL:
        return size >> 4
    for most, bits, first in _STEPS:
        if size >> bits <= most:
            return first + (size >> bits)
    return 126
