"""What a process on a CPU grows by for a sequence of allocations and frees: glibc's heap.

Torch asks the C library for every tensor, and `process.keep_freed_memory` has it serve all of them
from one heap, which grows: what is resident is how far it has reached, holes and all, and beside it
what `process.map_large_blocks` has the library ask the system for, block by block. Small objects
lie elsewhere (`process.stock_small_blocks`). The rules are those of glibc 2.36 (malloc/malloc.c;
from 2.39 on it also frees the least of what it cuts off), in their own numbers, to the byte, for
the thread that allocates, without a cache of its own (`process.begin_anew`) and without fast bins;
the alignment is torch's (c10/core/impl/alloc_cpu.cpp).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from scalellm.plan._bins import SMALL, Bins
from scalellm.plan.allocator import GLOO, MIB, UNTOUCHED, Event
from scalellm.process import KEPT_BYTES

_HEAD, _UNIT, _LEAST = 8, 16, 32  # of a chunk: what it has beside the caller's bytes, and sizes
_GLOO_THREADS, _THREAD_HEAP = 2, 64 * MIB
_PAGE, _PAD = 4096, 128 << 10  # what the heap is extended by, and how much more than was asked
ALIGNMENT = 64  # of a tensor
_STARTS = (0, 32)


def heap_bytes(events: Sequence[Event], mapped_from_bytes: int = KEPT_BYTES) -> int:
    """Returns the most that was resident during all of them, beginning with an empty heap.

    Blocks of `mapped_from_bytes` and more lie outside, unless the heap has room (`process`). How a
    process's heap stands to the alignment before is not known, and decides whether what is cut off
    behind a tensor is large enough to be freed: this is the mean of both.
    """
    own = [event for event in events if event.stream != GLOO]
    heaps = [Heap(mapped_from_bytes, start) for start in _STARTS]
    for heap in heaps:
        heap.play(own)
    reached = sum(heap.reached for heap in heaps) // len(heaps)
    return reached + _gloo_bytes(events, mapped_from_bytes)


def _gloo_bytes(events: Sequence[Event], mapped_from_bytes: int) -> int:
    """What the threads of gloo hold, which take turns, each in heaps of its own of 64 MiB.

    They keep the first of these. What is larger than one, or than what is mapped, comes from the
    system, and goes back.
    """
    most_bytes = min(_THREAD_HEAP, mapped_from_bytes)
    threads = [Heap() for _ in range(_GLOO_THREADS)]
    turns = itertools.cycle(threads)
    largest_bytes = 0
    for event in events:
        if event.stream == GLOO and event.size_bytes > 0:
            if event.size_bytes > most_bytes:
                largest_bytes = max(largest_bytes, event.size_bytes)
            else:
                next(turns).play([event, replace(event, size_bytes=-event.size_bytes)])
    return largest_bytes + sum(min(heap.reached, _THREAD_HEAP) for heap in threads)


class Heap:
    """One heap and its only thread; `reached` is the most that was resident."""

    def __init__(self, mapped_from_bytes: int = KEPT_BYTES, start: int = 0) -> None:
        self.reached = 0
        self._mapped_from_bytes = mapped_from_bytes
        self._highest = 0  # address that was in use
        self._mapped: dict[int, int] = {}  # what is resident of blocks outside, by address
        self._maps = 0
        self._top = self._end = start  # from `_top` on nothing was handed out
        self._used: dict[int, int] = {}  # sizes by address
        self._free = Bins()
        self._places: dict[int, int] = {}  # of a storage's bytes

    # -- what a program asks ----------------------------------------------------------------

    def play(self, events: Iterable[Event]) -> None:
        """Does what tensors do; the streams of `events` are one here."""
        for event in events:
            if event.size_bytes > 0:
                before = self.reached, self._highest
                address = self.memalign(ALIGNMENT, event.size_bytes)
                if event.stream == UNTOUCHED:  # asked for, but not resident
                    self.reached, self._highest = before
                    if address in self._mapped:
                        self._mapped[address] = 0
                self._places[event.number] = address
            else:
                self.free(self._places.pop(event.number))

    def malloc(self, size_bytes: int) -> int:
        """Returns the address of a chunk, whose user's bytes begin 16 later."""
        return self._take(_chunk(size_bytes))

    def memalign(self, alignment: int, size_bytes: int) -> int:
        """As `malloc`, with user's bytes at a multiple of `alignment`."""
        size = _chunk(size_bytes)
        address = self._take(_chunk(size + alignment + _LEAST))
        if address in self._mapped:
            return address
        if (address + _UNIT) % alignment:
            start = -(-(address + _UNIT) // alignment) * alignment - _UNIT
            if start - address < _LEAST:
                start += alignment
            self._used[start] = self._used[address] - (start - address)
            self._used[address] = start - address
            self.free(address)
            address = start
        rest = self._used[address] - size
        if rest > _LEAST:
            self._used[address], self._used[address + size] = size, rest
            self.free(address + size)
        return address

    def free(self, address: int) -> None:
        """Gives a chunk back, together with free neighbours."""
        if address in self._mapped:
            del self._mapped[address]
            return
        free, size = self._free, self._used.pop(address)
        before = free.ends.get(address)
        if before is not None:
            size += free.remove(before)
            address = before
        if address + size == self._top:
            self._top = address
            return
        if address + size in free.sizes:
            size += free.remove(address + size)
        free.add(address, size)

    @property
    def used_bytes(self) -> int:
        """What is handed out of the heap itself, with what each chunk has beside."""
        return sum(self._used.values())

    # -- where it finds a chunk -------------------------------------------------------------

    def _take(self, size: int) -> int:
        address = self._of_its_size(size)
        if address is None:
            address = self._sorted_until(size)
        if address is not None:
            return address
        found = self._free.best_fit(size)
        if found is not None:
            return self._cut(found, size, leaves_rest=size < SMALL)
        return self._from_top(size)

    def _of_its_size(self, size: int) -> int | None:
        """What was freed of exactly this small size."""
        found = self._free.oldest(size) if size < SMALL else None
        if found is not None:
            self._use(found)
        return found

    def _sorted_until(self, size: int) -> int | None:
        """Puts what was freed lately into bins, up to one of exactly this size."""
        free = self._free
        while free.unsorted:
            address = next(iter(free.unsorted))
            found = free.sizes[address]
            is_last_rest = address == free.last_rest and len(free.unsorted) == 1
            if size < SMALL and is_last_rest and found > size + _LEAST:
                return self._cut(address, size, leaves_rest=True)
            if found != size:
                free.sort(address)
                continue
            self._use(address)
            return address
        return None

    def _cut(self, address: int, size: int, *, leaves_rest: bool) -> int:
        rest = self._free.remove(address) - size
        if rest < _LEAST:
            self._used[address] = size + rest
            return address
        self._used[address] = size
        self._free.add(address + size, rest)
        if leaves_rest:
            self._free.last_rest = address + size
        return address

    def _use(self, address: int) -> None:
        self._used[address] = self._free.remove(address)

    def _from_top(self, size: int) -> int:
        missing = size + _LEAST - (self._end - self._top)
        if missing > 0 and size >= self._mapped_from_bytes:
            return self._map(size)
        if missing > 0:
            self._end = -(-(self._end + missing + _PAD) // _PAGE) * _PAGE
        address, self._top = self._top, self._top + size
        self._used[address] = size
        self._highest = max(self._highest, self._top)
        self._look()
        return address

    def _map(self, size: int) -> int:
        """Takes a block of its own from the system; its address is none of the heap's."""
        self._maps += 1
        self._mapped[-self._maps] = -(-size // _PAGE) * _PAGE
        self._look()
        return -self._maps

    def _look(self) -> None:
        self.reached = max(self.reached, self._highest + sum(self._mapped.values()))


def _chunk(size_bytes: int) -> int:
    return max(_LEAST, -(-(size_bytes + _HEAD) // _UNIT) * _UNIT)
