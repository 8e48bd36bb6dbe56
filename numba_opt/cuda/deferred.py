"""The steps that some rows of a parameter on a GPU have yet to take, in the device's memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.storage import compute_dtype
from ..cpu.deferred import DeferredSteps
from .arrays import kernels, look

ROOM = 1024  # steps; whoever has recorded so many lets all rows catch up, which costs as much as a dense step


class DeviceDeferredSteps:
    """`numba_opt.cpu.deferred.DeferredSteps` as kernels have it (`numba_opt.cuda.pending.catch_up`).

    The device counts the steps in it, as it alone knows which ones were skipped. `recorded` is how many there
    may be.
    """

    def __init__(self, device: int, rows: np.ndarray) -> None:
        self.device, self.recorded = device, len(rows)
        self.room = max(ROOM, len(rows))
        self.length, self.real = rows.shape[1], rows.dtype
        self.stream: int | None = None  # on which it was last used
        found = kernels()
        self._gpu, self._head = found.driver.device(device), found.loops.COUNT_BYTES
        self._memory = self._gpu.memory(self._head + self.room * self.length * self.real.itemsize)
        self._gpu.assign(self.address, np.array([self.recorded, self.room], np.int64))
        if self.recorded:
            self._gpu.assign(self.address + self._head, np.ascontiguousarray(rows))

    @property
    def address(self) -> int:
        """Address in the device's memory."""
        return int(self._memory.address)

    def rows(self) -> np.ndarray:
        """The coefficients of the recorded steps; waits for the device."""
        content = self._memory.read(self._head + self.recorded * self.length * self.real.itemsize)
        count = int(np.frombuffer(content, np.int64, 1)[0])
        found = np.frombuffer(content, self.real, count * self.length, self._head)
        return found.reshape(count, self.length).copy()

    def __reduce__(self) -> Any:
        """Reduce it to the host's form, which another process or a copy has until it is used."""
        return DeferredSteps.of, (self.rows(),)


def deferred_steps(found: Any, weight: Any, length: int, what: str) -> DeviceDeferredSteps:
    """The steps that rows of a parameter have yet to take, where its weight is.

    Raises
    ------
    ValueError
        They are of a rule with other coefficients.
    """
    view = look(weight, f"weight of {what}")
    real = compute_dtype(view.shadow.dtype)
    if isinstance(found, DeviceDeferredSteps):
        form = (found.device, found.length, found.real)
        if form == (view.device, length, real):
            return found
    rows = found.rows() if found is not None and found.recorded else np.zeros((0, length))
    if rows.shape[1] != length:
        raise ValueError(
            f"{what} has recorded steps of {rows.shape[1]} coefficients; expected {length}: "
            "flush it before its rule changes"
        )
    return DeviceDeferredSteps(view.device, rows.astype(real))
