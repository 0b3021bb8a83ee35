"""What a process on a CPU grows by for a sequence of allocations and frees: glibc's heap.

Torch asks the C library for every tensor, and `process.keep_freed_memory` has it serve all of them
from one heap that only ever grows: what is resident is how far the heap has reached, holes and all,
and beside it what `process.map_large_blocks` has the library ask the system for, block by block.
A hole is not taken again by a tensor of its own size: the library looks for the size *and* the
alignment, and gives back what was too much only then. What it gave back is taken by the small
objects that torch and autograd make beside a tensor, and where these outlive it, as parts of the
graph do until a backward has ended, the hole stays in pieces. The rules are those of glibc 2.36
(malloc/malloc.c; 2.26 to 2.42 differ in nothing that is seen here), in their own numbers, to the
byte, for the thread that allocates and without a cache of its own (`process.begin_anew`); the
alignment is torch's (c10/core/impl/alloc_cpu.cpp).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from scalellm.plan._bins import SMALL, Bins
from scalellm.plan.allocator import GLOO, MIB, UNTOUCHED, Event, Recorded, What
from scalellm.process import KEPT_BYTES

_HEAD, _UNIT, _LEAST = 8, 16, 32  # of a chunk: what it has beside the caller's bytes, and sizes
_FAST = 128  # the largest that is not joined with its neighbours when it is freed
_FAST_JOINED_FROM = 64 << 10
_GLOO_THREADS, _THREAD_HEAP = 2, 64 * MIB
_PAGE, _PAD = 4096, 128 << 10  # what the heap is extended by, and how much more than was asked
ALIGNMENT = 64  # of a tensor
# What torch makes beside a tensor's bytes (2.13, seen at malloc).
_OBJECTS: dict[What, tuple[int, ...]] = {"storage": (96,), "tensor": (176, 24), "view": (176,)}
# What autograd adds to it; and its node, with an edge of 16 bytes to each tensor it was made of.
_RECORDS: dict[What, tuple[int, ...]] = {"tensor": (184,), "view": (312,)}
_EDGES = (16, 32)
_NODES: dict[What, tuple[tuple[int, ...], ...]] = {
    "storage": ((464, 512, 544, 560, 640, 736), _EDGES),
    "view": ((488,), _EDGES),
}
_DRAWN = 8


def heap_bytes(events: Sequence[Event], mapped_from_bytes: int = KEPT_BYTES) -> int:
    """Returns the most that was resident during all of them, beginning with an empty heap.

    Blocks of `mapped_from_bytes` and more lie outside, unless the heap has room (`process`).

    Which operation a tensor came from is not in the events, but decides what small object lies
    where, and so what later fits where: it is drawn, and this is the mean of some draws.
    """
    own = [event for event in events if event.stream != GLOO]
    heaps = [Heap(seed, mapped_from_bytes) for seed in range(_DRAWN)]
    for heap in heaps:
        heap.play(own)
    return sum(heap.reached for heap in heaps) // _DRAWN + _gloo_bytes(events)


def _gloo_bytes(events: Sequence[Event]) -> int:
    """What the threads of gloo hold, which take turns, each in heaps of its own of 64 MiB.

    They keep the first of these. What is larger than one comes from the system, and goes back.
    """
    threads = [Heap() for _ in range(_GLOO_THREADS)]
    turns = itertools.cycle(threads)
    largest_bytes = 0
    for event in events:
        if event.stream == GLOO and event.size_bytes > 0:
            if event.size_bytes > _THREAD_HEAP:
                largest_bytes = max(largest_bytes, event.size_bytes)
            else:
                next(turns).play([event, replace(event, size_bytes=-event.size_bytes)])
    return largest_bytes + sum(min(heap.reached, _THREAD_HEAP) for heap in threads)


class Heap:
    """One heap and its only thread; `reached` is the most that was resident."""

    def __init__(self, seed: int = 0, mapped_from_bytes: int = KEPT_BYTES) -> None:
        self.reached = 0
        self._mapped_from_bytes = mapped_from_bytes
        self._highest = 0  # address that was in use
        self._mapped: dict[int, int] = {}  # what is resident of blocks outside, by address
        self._maps = 0
        self._random = random.Random(seed)
        self._top = self._end = 0  # from `_top` on nothing was handed out
        self._used: dict[int, int] = {}  # sizes by address; also of what is fast
        self._free = Bins()
        self._fast: dict[int, list[int]] = {}
        self._places: dict[int, int] = {}  # of a storage's bytes
        self._objects: dict[int, list[int]] = {}  # beside them
        self._graphs: dict[Recorded, list[int]] = {"forward": [], "again": []}

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
            elif event.size_bytes < 0:
                self.free(self._places.pop(event.number))
            else:
                self._play_objects(event)

    def _play_objects(self, event: Event) -> None:
        if event.what in ("gone", "graph gone"):
            is_graph = event.what == "graph gone"
            gone = self._graphs[event.recorded] if is_graph else self._objects.pop(event.number, [])
            while gone:
                self.free(gone.pop())
            return
        graph = self._graphs.get(event.recorded, [])
        for sizes in _NODES.get(event.what, ()) if event.recorded else ():
            graph.append(self.malloc(self._random.choice(sizes)))
        is_view = event.what == "view"
        held = graph if is_view else self._objects.setdefault(event.number, [])
        if event.recorded:
            held += map(self.malloc, _RECORDS.get(event.what, ()))
        held += map(self.malloc, _OBJECTS[event.what])

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
        """Gives a chunk back."""
        if address in self._mapped:
            del self._mapped[address]
            return
        size = self._used[address]
        if size <= _FAST:
            self._fast.setdefault(size, []).append(address)
        elif self._join(address) >= _FAST_JOINED_FROM:
            self._join_fast()

    @property
    def used_bytes(self) -> int:
        """What is handed out now, with what each chunk has beside; fast ones too."""
        return sum(self._used.values())

    # -- where it finds a chunk -------------------------------------------------------------

    def _take(self, size: int) -> int:
        address = self._of_its_size(size)
        if address is None and size >= SMALL:
            self._join_fast()
        while address is None:
            address = self._sorted_until(size)
            if address is None:
                found = self._free.best_fit(size)
                if found is not None:
                    address = self._cut(found, size, leaves_rest=size < SMALL)
                elif self._end - self._top >= size + _LEAST or not self._join_fast():
                    address = self._from_top(size)
        return address

    def _of_its_size(self, size: int) -> int | None:
        """What was freed of exactly this small size."""
        fast = self._fast.get(size)
        if fast:
            return fast.pop()
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

    # -- where it puts one ------------------------------------------------------------------

    def _join(self, address: int) -> int:
        """Frees a chunk together with free neighbours; returns the size of all."""
        free, size = self._free, self._used.pop(address)
        before = free.ends.get(address)
        if before is not None:
            size += free.remove(before)
            address = before
        if address + size == self._top:
            self._top = address
            return self._end - address
        if address + size in free.sizes:
            size += free.remove(address + size)
        free.add(address, size)
        return size

    def _join_fast(self) -> bool:
        """Returns whether there were any."""
        any_of_them = False
        for size in sorted(self._fast):
            for address in self._fast.pop(size)[::-1]:
                self._join(address)
                any_of_them = True
        return any_of_them


def _chunk(size_bytes: int) -> int:
    return max(_LEAST, -(-(size_bytes + _HEAD) // _UNIT) * _UNIT)
