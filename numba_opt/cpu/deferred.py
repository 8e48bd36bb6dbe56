"""Steps that some rows of a parameter have yet to take."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..core.storage import compute_dtype
from .arrays import as_array


class DeferredSteps:
    """The coefficients of steps that some rows of a parameter have yet to take.

    A row's last step says how many of the recorded steps it has taken. `recorded` steps count; the row after
    them is room for the step that is being made. What changes this is returned as calls, none of them written
    in Python, which belong to the step that they record.
    """

    TRIM = 256  # steps; from then on those that every row has taken are forgotten, now and then
    LIMIT = 65_536  # steps; beyond it some of the rows that nobody touches catch up at each step

    def __init__(self, length: int, real: np.dtype) -> None:
        self.recorded = 0
        self._rows = np.zeros((16, length), real)
        self._trim_at = self.TRIM
        self._next = 0  # the row with which the next ones that nobody has touched begin

    @classmethod
    def of(cls, rows: np.ndarray) -> DeferredSteps:
        """Deferred steps with these coefficients."""
        steps = cls(rows.shape[1], rows.dtype)
        steps._rows = np.concatenate([rows, np.zeros_like(steps._rows)])
        steps.recorded = len(rows)
        return steps

    def with_current(self, row: Sequence[float]) -> np.ndarray:
        """The coefficients of the recorded steps and of the step that is being made."""
        if self.recorded == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self.recorded] = row
        return self._rows[: self.recorded + 1]

    @property
    def length(self) -> int:
        """Number of coefficients of a step."""
        return int(self._rows.shape[1])

    def rows(self) -> np.ndarray:
        """The coefficients of the recorded steps."""
        return self._rows[: self.recorded]

    def trim(self, last_step: np.ndarray) -> list[partial[Any]]:
        """Return the calls that forget the steps that every row has taken, now and then."""
        if self.recorded < self._trim_at:
            return []
        passed = max(int(last_step.min(initial=self.recorded)), 0)  # negative ones count as 0
        left = self.recorded - passed
        room = np.zeros((left + 16, self._rows.shape[1]), self._rows.dtype)
        room[:left] = self._rows[passed : self.recorded]
        return [
            partial(np.subtract, last_step, passed, last_step),
            partial(setattr, self, "_rows", room),
            partial(setattr, self, "recorded", left),
            partial(setattr, self, "_trim_at", max(self.TRIM, min(2 * left, left + self.LIMIT // 2))),
        ]

    def overdue(self, height: int) -> np.ndarray:
        """Rows that are to catch up though nobody touches them, so that nothing grows for ever.

        They are as many as it takes to come by each row once in half of LIMIT steps.
        """
        if self.recorded < self.LIMIT or not height:
            return np.zeros(0, np.int64)
        first = self._next % height
        return np.arange(first, min(height, first - (-height // (self.LIMIT // 2))))

    def record(self, height: int) -> list[partial[Any]]:
        """Return the calls that note that the step has been made."""
        return [
            partial(setattr, self, "_next", self._next + len(self.overdue(height))),
            partial(setattr, self, "recorded", self.recorded + 1),
        ]

    def clear(self, last_step: np.ndarray) -> list[partial[Any]]:
        """Return the calls that note that every row has taken every step."""
        return [partial(setattr, self, "recorded", 0), partial(operator.setitem, last_step, ..., 0)]


def deferred_steps(found: Any, weight: Any, length: int, what: str) -> DeferredSteps:
    """The steps that rows of a parameter on the CPU have yet to take, which may come from a GPU.

    Raises
    ------
    ValueError
        They are of a rule with other coefficients.
    """
    if found is None or not found.recorded:
        return DeferredSteps(length, compute_dtype(as_array(weight, f"weight of {what}").dtype))
    if not isinstance(found, DeferredSteps):  # the arrays have come from a GPU
        found = DeferredSteps.of(found.rows())
    if found.length != length:
        raise ValueError(
            f"{what} has recorded steps of {found.length} coefficients; "
            f"expected {length}: flush it before its rule changes"
        )
    return found
