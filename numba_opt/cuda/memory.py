"""A GPU's memory as steps need it: scratch, numbers that are written from the host, coefficients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..core.step_rows import NormLimit
from .arrays import kernels
from .buffer import HEAD, OUT, ROOM, SKIPPED

RING = 3  # copies of a table that may be on their way at once


class Scratch:
    """Some of a device's memory, which is only replaced by more."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self.memory: Any = None

    def has(self, words: int) -> bool:
        """Tell whether so many words fit."""
        return self.memory is not None and bool(self.memory.size >= 8 * words)

    def resize(self, words: int) -> int:
        """The address of so many words."""
        if not self.has(words):
            self.memory = self._gpu.memory(8 * words + words)  # some more, so that it happens rarely
        return self.address

    @property
    def address(self) -> int:
        """Address of the memory."""
        return int(self.memory.address)


class Mirror:
    """Numbers in the device's memory, and what they are written from."""

    def __init__(self, gpu: Any, words: int) -> None:
        self.memory = gpu.memory(8 * words)
        self._gpu, self._words = gpu, words
        self._ring: list[Any] = []

    def write(self, words: np.ndarray, stream: int) -> None:
        """Have the numbers copied when the stream gets there; what is copied may change at once."""
        if len(self._ring) < RING:
            self._ring.append(self._gpu.pinned(8 * self._words))
        else:
            self._ring.append(self._ring.pop(0))
            self._ring[-1].settle()
        self._ring[-1].words[:] = words
        self.memory.fill(self._ring[-1], stream)


class CoefficientBuffer:
    """A device's buffer of coefficients."""

    def __init__(self, gpu: Any) -> None:
        found = kernels()
        self.loops, self._launch_of = found.loops, found.driver.Launch
        self._gpu = gpu
        self._written: Any = None
        self._numbers = np.zeros(0)  # that launches take there
        self._launches: list[Any] = []
        self._earlier: Any = 0  # counts of buffers that were too small
        self.memory: Any = None
        self.address = self.room = 0

    def resize(self, rows: np.ndarray) -> None:
        """Have room for such rows. Whoever has the address must ask again."""
        if self.holds(rows):
            return
        self._earlier = self.outputs()[SKIPPED:]
        self.room = -(-(HEAD + rows.size) // ROOM) * ROOM
        self.memory = self._gpu.memory(8 * (OUT + 3 * self.room))
        self.address = int(self.memory.address)
        self._written, self._numbers = None, np.zeros(self.room)
        kernel = self.loops.set_coefficients()
        self._launches = [
            self._launch_of(
                *(self._gpu, kernel, 1, 1, (self.address, self.room, first)),
                self._numbers[first : first + ROOM],
            )
            for first in range(0, self.room, ROOM)
        ]

    def holds(self, rows: np.ndarray) -> bool:
        """Tell whether there is room for such rows."""
        return HEAD + rows.size <= self.room

    def has(self, rows: np.ndarray, limit: NormLimit | None) -> bool:
        """Tell whether these rows are there, with this limit, or will be once streams get there."""
        return (limit, rows.tobytes()) == self._written

    def write(self, rows: np.ndarray, limit: NormLimit | None, stream: int) -> None:
        """Have rows written when the stream gets there, if they are not there already."""
        if self.has(rows, limit):
            return
        numbers = self._numbers
        most, guard = limit or (0.0, False)
        numbers[:HEAD] = most, rows[0, 0], guard, 0.0
        numbers[HEAD : HEAD + rows.size] = rows.ravel()
        for launch in self._launches:
            launch(stream)
        self._written = limit, rows.tobytes()

    def outputs(self) -> np.ndarray:
        """Return what kernels have written; waits for everything on the device."""
        if self.memory is None:
            return np.zeros(OUT)
        out = np.frombuffer(self.memory.read(8 * OUT), np.float64).copy()
        out[SKIPPED:] += self._earlier
        return out


class NoBuffer(NamedTuple):
    """A stand-in for a buffer where kernels need none."""

    address: int = 0
    room: int = 0


NO_BUFFER = NoBuffer()
