"""What glibc's malloc holds on to while tensors come and go: its rules for large blocks, replayed.

A process never has only what is alive. Freed blocks below one that is still alive stay resident, and the size from
which a block gets pages of its own grows to 32 MiB as such blocks are freed (malloc(3), M_MMAP_THRESHOLD), so that
most tensors of a small model share one heap. There, posix_memalign leaves slivers beside every block; small objects
move into some of them, and the hole of a freed tensor is then too small for the next one of its size.

How many slivers are taken follows from no rule. `TAKEN` is the one number of a plan that was chosen to agree with
measurement (docs/plan.md); it decides a fifth of the peak at most.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort

#: Share of slivers that a small object moves into and stays.
TAKEN = 0.2
#: Blocks below this are not followed.
SMALL = 1024
_SLIVER = 1040  # up to this, freed chunks wait for an object of their size instead of joining their neighbours (tcache)
_ALIGNED = 64  # as torch's allocator asks
_LEAST = 32  # the smallest chunk
_PAGE = 4096
_FIRST_THRESHOLD = 128 * 1024
_LAST_THRESHOLD = 32 * 1024 * 1024
_TOP_PAD = 128 * 1024
_LOOK_AT_TOP = 64 * 1024  # FASTBIN_CONSOLIDATION_THRESHOLD: smaller frees never trim


class Heap:
    """One arena: blocks by best fit in a heap that grows upwards, and large blocks in mappings of their own."""

    def __init__(self) -> None:
        self.threshold = _FIRST_THRESHOLD
        self.trim = _FIRST_THRESHOLD
        self.mapped = 0
        self.end = 0  # of what is in use, where the top begins
        self.extent = 0  # of what is resident
        self.peak = 0
        self._draw = random.Random(0)
        self._blocks: dict[int, tuple[int, int]] = {}  # key -> (start, size); start -1 for a mapping
        self._starts: dict[int, int] = {}  # free block's start -> size
        self._ends: dict[int, int] = {}  # free block's end -> start
        self._sizes: list[tuple[int, int]] = []  # (size, start) of free blocks, sorted

    @property
    def resident(self) -> int:
        """Bytes that the process has now."""
        return self.extent + self.mapped

    def allocate(self, key: int, size: int) -> None:
        """A block of `size` bytes, known as `key` from now on."""
        if size < SMALL:
            return
        used = -(-(size + 8) // 16) * 16  # a header of 8 bytes, in grains of 16
        asked = used + _ALIGNED + _LEAST  # posix_memalign looks for room to move the start in
        place = bisect_left(self._sizes, (asked, 0))
        if place < len(self._sizes):
            room, start = self._sizes[place]
            self._forget(start, room)
        elif asked >= self.threshold and self.end + asked > self.extent:
            pages = -(-asked // _PAGE) * _PAGE
            self._blocks[key] = (-1, pages)
            self.mapped += pages
            self.peak = max(self.peak, self.resident)
            return
        else:
            room, start = asked, self.end
            self.end += asked
            self.extent = max(self.extent, self.end)
        # What is left before and behind the aligned block is free again: a block of the same size never fits into it.
        first = -(-(start + 16) // _ALIGNED) * _ALIGNED - 16
        if 0 < first - start < _LEAST:
            first += _ALIGNED
        self._blocks[key] = (first, used)
        if first > start:
            self._release(start, first - start)
        if start + room > first + used:
            self._release(first + used, start + room - first - used)
        self.peak = max(self.peak, self.resident)

    def free(self, key: int) -> None:
        """Give a block back; one that was too small to follow is nothing."""
        start, size = self._blocks.pop(key, (0, 0))
        if not size:
            return
        if start == -1:
            self.mapped -= size
            if self.threshold < size <= _LAST_THRESHOLD:
                self.threshold, self.trim = size, 2 * size
            return
        self._release(start, size)

    def _release(self, start: int, size: int) -> None:
        if size <= _SLIVER and self._draw.random() < TAKEN:
            return
        if (before := self._ends.get(start)) is not None:
            size += start - before
            self._forget(before, start - before)
            start = before
        if (behind := self._starts.get(start + size)) is not None:
            self._forget(start + size, behind)
            size += behind
        if start + size < self.end:
            self._remember(start, size)
            return
        self.end = start
        if size >= _LOOK_AT_TOP and self.extent - self.end >= self.trim:
            self.extent = self.end + _TOP_PAD

    def _remember(self, start: int, size: int) -> None:
        self._starts[start] = size
        self._ends[start + size] = start
        insort(self._sizes, (size, start))

    def _forget(self, start: int, size: int) -> None:
        del self._starts[start], self._ends[start + size]
        del self._sizes[bisect_left(self._sizes, (size, start))]
