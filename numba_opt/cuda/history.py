"""The steps that some rows of a parameter on a GPU have yet to take, in the device's memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..cpu import execution
from . import arrays as cuda_arrays

ROOM = 1024  # steps; whoever has recorded so many lets all rows catch up, which costs as much as a dense step


class Kind(NamedTuple):
    """What a history is made for."""

    device: int
    length: int  # of rows of hyper-parameters
    real: np.dtype


class History:
    """`numba_opt.cpu.execution.History` as kernels have it (`numba_opt.cuda.kernels.late`).

    The device counts the steps in it, as it alone knows which ones were skipped. `recorded` is how many there
    may be.
    """

    def __init__(self, kind: Kind, rows: np.ndarray) -> None:
        self.kind, self.recorded = kind, len(rows)
        self.room = max(ROOM, len(rows))
        self.stream: int | None = None  # on which it was last used
        loops, driver = cuda_arrays.kernels().loops, cuda_arrays.kernels().driver
        self._gpu, self._head = driver.device(kind.device), loops.COUNT
        self._memory = self._gpu.memory(loops.COUNT + self.room * kind.length * kind.real.itemsize)
        self._gpu.assign(self.address, np.array([self.recorded, self.room], np.int64))
        if self.recorded:
            self._gpu.assign(self.address + loops.COUNT, np.ascontiguousarray(rows, kind.real))

    @property
    def address(self) -> int:
        """Where it is."""
        return int(self._memory.address)

    def rows(self) -> np.ndarray:
        """The recorded steps' hyper-parameters; waits for the device."""
        _, length, real = self.kind
        content = self._memory.read(self._head + self.recorded * length * real.itemsize)
        count = int(np.frombuffer(content, np.int64, 1)[0])
        return np.frombuffer(content, real, count * length, self._head).reshape(count, length).copy()

    def __reduce__(self) -> Any:
        """In another process, and in a copy, the host has it until it is used."""
        return execution.History.of, (self.rows(),)


def on_device(found: Any, kind: Kind, what: str) -> History:
    """A parameter's history where its weight is, with the steps of the one that it had, if there was one.

    Raises
    ------
    ValueError
        That one is of a rule with other hyper-parameters.
    """
    if isinstance(found, History) and found.kind == kind:
        return found
    rows = found.rows() if found is not None and found.recorded else np.zeros((0, kind.length))
    if rows.shape[1] != kind.length:
        raise ValueError(
            f"{what} has recorded steps of {rows.shape[1]} hyper-parameters; expected {kind.length}: "
            "flush it before its rule changes"
        )
    return History(kind, rows)
