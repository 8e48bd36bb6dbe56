"""The memory of a device and of its blocks, of which every byte that may be used is known.

A device's addresses are beyond what any process has, so neither kernels that use the host's memory nor host
code that uses a device's go unnoticed. (Host code ends by a signal, as it does where there is a GPU.) Some of
the host's memory can be made a device's as well, as managed memory is: for libraries that a test lets compute
on the CPU.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

FIRST = 1 << 54  # the first address of device 0; no process of x86-64 or of ARM has any as high
APART = 1 << 48  # from one device's first address to the next one's
GAP = 64  # bytes between two allocations, which are nobody's
ALIGNED = 256  # what allocations begin at a multiple of
FRESH, GONE = 0xCD, 0xDD  # what memory holds that nobody has written yet, and that is no longer anybody's
SIZES = (1, 2, 4, 8)


class _Process:
    """The process's memory from an address on, as an array of so many bytes an element."""

    def __init__(self, size: int, first: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": ((1 << 47) // size - 2,),
            "typestr": f"<u{size}",
            "data": (first, False),
            "strides": None,
        }


PROCESS = {size: np.asarray(_Process(size, 16)) for size in SIZES}


class DeviceMemory:
    """All memory that the kernels of one device may use."""

    def __init__(self, number: int, size: int = 1 << 28) -> None:
        self.number = number
        self.first = FIRST + number * APART
        content = np.zeros(size // 8, np.uint64)  # which takes no memory before it is written
        self.content = {k: content.view(f"u{k}") for k in SIZES}
        self._cursor = ALIGNED
        self._sizes: dict[int, int] = {}  # by address
        self._managed: dict[int, int] = {}
        self._known()

    def _known(self) -> None:
        """Sort what there is, for quick answers."""
        pairs = sorted((start, size) for start, size in (self._sizes | self._managed).items() if size)
        self._starts = [start for start, _ in pairs]
        self._ends = [start + size for start, size in pairs]
        self._arrays = np.array(self._starts, "i8"), np.array(self._ends, "i8")

    def allocate(self, size: int, offset: int = 0) -> int:
        """The address of so many bytes, `offset` bytes beyond a multiple of 256."""
        room = size + offset + GAP
        room += -room % ALIGNED
        whole = len(self.content[1])
        for _ in range(2 + len(self._sizes)):
            if self._cursor + room > whole:
                self._cursor = ALIGNED
            taken = self._end_of(self._cursor, room)
            if not taken:
                place, self._cursor = self._cursor + offset, self._cursor + room
                self.content[1][place : place + size] = FRESH
                self._sizes[self.first + place] = size
                self._known()
                return self.first + place
            self._cursor = taken
        raise MemoryError(f"no {size} bytes are left on the device")

    def _end_of(self, place: int, room: int) -> int:
        """Where the last allocation ends that is within a stretch; 0 if there is none."""
        k = bisect.bisect_left(self._starts, self.first + place + room) - 1
        if k < 0 or self._ends[k] + GAP <= self.first + place:
            return 0
        return self._ends[k] - self.first + GAP + -(self._ends[k] - self.first + GAP) % ALIGNED

    def free(self, address: int) -> bool:
        """Take an allocation back; False if there is none."""
        size = self._sizes.pop(address, None)
        if size is None:
            return False
        self.view(address, size)[:] = GONE
        self._known()
        return True

    def owns(self, address: int) -> bool:
        """Whether something begins or is there."""
        k = bisect.bisect_right(self._starts, address) - 1
        empty = address in self._sizes or address in self._managed
        return empty or (k >= 0 and address < self._ends[k])

    def holds(self, address: int, size: int) -> bool:
        """Whether so many bytes are within one allocation."""
        k = bisect.bisect_right(self._starts, address) - 1
        return size == 0 or (k >= 0 and address + size <= self._ends[k])

    def manage(self, start: int, size: int) -> None:
        """Let kernels use memory of the host; no longer if there are no bytes of it."""
        if size:
            self._managed[start] = size
        else:
            self._managed.pop(start, None)
        self._known()

    def view(self, address: int, size: int) -> np.ndarray:
        """Some bytes, for whoever plays the device."""
        if address >= FIRST:
            return self.content[1][address - self.first :][:size]
        return PROCESS[1][address - 16 :][:size]

    # ------------------------------------------------------------ what kernels do

    def outside(self, places: np.ndarray, size: int) -> np.ndarray | None:
        """Which accesses of so many bytes are not within one allocation; None if all are."""
        low, high = int(places.min()), int(places.max()) + size
        k = bisect.bisect_right(self._starts, low) - 1
        if k >= 0 and high <= self._ends[k]:
            return None
        if not self._starts:
            return np.arange(len(places))
        starts, ends = self._arrays
        where = np.searchsorted(starts, places, "right") - 1
        bad = (where < 0) | (places + size > ends[where])
        return np.flatnonzero(bad) if bad.any() else None

    def load(self, places: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """`count` words of so many bytes from each place on, all of which have been checked."""
        parts = []
        for memory, at, which in self._reach(places, size):
            found = [memory.take(at + k) for k in range(count)]
            if which is None:
                return found
            parts.append((which, found))
        out = [np.empty(len(places), f"u{size}") for _ in range(count)]
        for which, found in parts:
            for column, part in zip(out, found, strict=True):
                column[which] = part
        return out

    def store(self, places: np.ndarray, size: int, values: list[Any]) -> None:
        """The same for words to be written, where the last of several threads wins."""
        for memory, at, which in self._reach(places, size):
            for k, value in enumerate(values):
                memory[at + k] = value if which is None or np.ndim(value) == 0 else value[which]

    def _reach(self, places: np.ndarray, size: int) -> Any:
        """Where words are: arrays, positions in them, and which of the places these are (None for all)."""
        low, high = int(places.min()), int(places.max())
        if low >= FIRST:
            return [(self.content[size], (places - self.first) // size, None)]
        if high < FIRST:
            return [(PROCESS[size], (places - 16) // size, None)]
        ours = places >= FIRST
        own, managed = np.flatnonzero(ours), np.flatnonzero(~ours)
        return [
            (self.content[size], (places[own] - self.first) // size, own),
            (PROCESS[size], (places[managed] - 16) // size, managed),
        ]


class SharedMemory:
    """The shared memory of all blocks of a launch, with what has been written of it."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        content = np.full(max(size, 16) * blocks // 8, 0xCDCDCDCDCDCDCDCD, np.uint64)
        self._content = {k: content.view(f"u{k}") for k in SIZES}
        self._written = np.zeros(content.nbytes, bool)

    def unwritten(self, places: np.ndarray, size: int) -> np.ndarray | None:
        """Which of these have a byte that nobody has written; None if none has."""
        known = self._written[places]
        for byte in range(1, size):
            known &= self._written[places + byte]
        return None if known.all() else np.flatnonzero(~known)

    def load(self, places: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        return [self._content[size].take(places // size + k) for k in range(count)]

    def store(self, places: np.ndarray, size: int, values: list[Any]) -> None:
        for k, value in enumerate(values):
            self._content[size][places // size + k] = value
            for byte in range(size):
                self._written[places + (k * size + byte)] = True
