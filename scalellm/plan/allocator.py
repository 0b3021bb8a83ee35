"""What torch's CUDA allocator takes from the driver for a sequence of allocations and frees.

Tensors need less than the allocator reserves ("max reserved", what nvidia-smi shows too, less the
CUDA context): sizes are rounded, each stream has memory of its own, and what was freed in pieces
does not hold what is larger than the pieces. The rules are those of torch's CUDACachingAllocator
(c10/cuda/CUDACachingAllocator.cpp, 2.13), in its own numbers; streams are told apart by the
collectives, as FSDP does.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
_ROUND = 512
_SMALL = MIB  # the largest size of the small pool
_SMALL_SEGMENT, _SEGMENT = 2 * MIB, 20 * MIB
_OWN_SEGMENT = 10 * MIB  # from here on a segment holds one allocation, rounded to 2 MiB


# Streams on a CPU: of a thread of gloo's own, what is asked for and never written to, and what a
# library of products keeps.
GLOO, UNTOUCHED, LIBRARY = "gloo", "untouched", "library"


@dataclass(frozen=True)
class Event:
    """An allocation (`size_bytes` > 0) or the free of it; `stream` is whose memory it takes."""

    number: int
    size_bytes: int
    stream: str = "compute"


def reserved_bytes(events: Iterable[Event], *, expandable: bool = False) -> int:
    """Returns the most that is reserved; nothing is ever given back, as there is no shortage.

    Args:
        expandable: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
    """
    pools: dict[tuple[str, bool], _Pool] = {}
    places: dict[int, tuple[_Pool, int]] = {}
    for event in events:
        if event.size_bytes < 0:
            pool, start = places.pop(event.number)
            pool.free(start)
            continue
        size = -(-event.size_bytes // _ROUND) * _ROUND
        key = (event.stream, size <= _SMALL)
        pool = pools.setdefault(key, _Pool(is_small=key[1], expandable=expandable))
        places[event.number] = (pool, pool.allocate(size))
    return sum(pool.reserved for pool in pools.values())


class _Pool:
    """The blocks of one stream, in one address space; segments never touch each other."""

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.reserved = 0
        self._is_small, self._expandable = is_small, expandable
        self._end = 0  # of the address space
        self._sizes: dict[int, int] = {}  # of all blocks, by their start
        self._free: list[tuple[int, int]] = []  # (size, start), sorted: the best fit is the first
        self._is_free: dict[int, bool] = {}
        self._after: dict[int, int] = {}  # neighbours in a segment
        self._before: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        found = bisect.bisect_left(self._free, (size, -1))
        if found < len(self._free):
            _, start = self._free.pop(found)
        else:
            start = self._extend(size) if self._expandable else self._add_segment(size)
        self._is_free[start] = False
        self._split(start, size)
        return start

    def free(self, start: int) -> None:
        self._is_free[start] = True
        for first in (start, self._before.get(start)):
            if first is not None and self._is_free[first]:
                self._join(first)
                start = first
        bisect.insort(self._free, (self._sizes[start], start))

    def _join(self, first: int) -> None:
        """Makes one of a free block and the free one after it; neither is in the list of frees."""
        second = self._after.get(first)
        if second is None or not self._is_free[second]:
            return
        for start in (first, second):
            self._forget(start)
        self._sizes[first] += self._sizes.pop(second)
        del self._is_free[second], self._before[second]
        following = self._after.pop(second, None)
        if following is None:
            del self._after[first]
        else:
            self._after[first], self._before[following] = following, first

    def _forget(self, start: int) -> None:
        entry = (self._sizes[start], start)
        index = bisect.bisect_left(self._free, entry)
        if index < len(self._free) and self._free[index] == entry:
            del self._free[index]

    def _split(self, start: int, size: int) -> None:
        rest = self._sizes[start] - size
        if rest < (_ROUND if self._is_small or self._expandable else _SMALL + 1):
            return
        new = start + size
        self._sizes[start], self._sizes[new], self._is_free[new] = size, rest, True
        following = self._after.get(start)
        if following is not None:
            self._after[new], self._before[following] = following, new
        self._after[start], self._before[new] = new, start
        bisect.insort(self._free, (rest, new))

    def _add_segment(self, size: int) -> int:
        if self._is_small:
            segment = _SMALL_SEGMENT
        else:
            segment = _SEGMENT if size < _OWN_SEGMENT else -(-size // (2 * MIB)) * 2 * MIB
        start = self._end
        self._end += segment
        self.reserved += segment
        self._sizes[start] = segment
        return start

    def _extend(self, size: int) -> int:
        """Maps more pages after the last block, and with it if it is free."""
        page = _SMALL_SEGMENT if self._is_small else _SEGMENT
        last = max(self._sizes) if self._sizes else None
        is_last_free = last is not None and self._is_free[last]
        have = self._sizes[last] if last is not None and is_last_free else 0
        mapped = -(-(size - have) // page) * page
        start = self._end
        self._end += mapped
        self.reserved += mapped
        if last is not None and is_last_free:
            self._forget(last)
            self._sizes[last] += mapped
            return last
        self._sizes[start] = mapped
        if last is not None:
            self._after[last], self._before[start] = start, last
        return start
