"""The inputs and results of a step beside arrays: rows of coefficients, limits of the norm, an outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = tuple[float, ...]  # rescale, clip, wd, the rule's own, and perhaps two for random bits


class StepRows(NamedTuple):
    """The coefficients of a step: the rows that differ, and which one each tensor has."""

    rows: Sequence[Row]
    row_of: Sequence[int]

    @classmethod
    def of(cls, keys: Iterable[Any], row: Callable[..., Row]) -> StepRows:
        """Make rows of coefficients from what they depend on, for each tensor; work out each one once."""
        numbers: dict[Any, int] = {}
        row_of = [numbers.setdefault(key, len(numbers)) for key in keys]
        return cls([row(*key) for key in numbers], row_of)

    @classmethod
    def alike(cls, row: Row, tensors: int) -> StepRows:
        """Make one row for all tensors."""
        return cls([row], [0] * tensors)

    @property
    def rescale(self) -> float:
        """Factor of the gradients, which is the same in all rows of a trainer."""
        return self.rows[0][0]

    def rescaled(self, rescale: float) -> StepRows:
        """Return the rows with another factor of the gradients."""
        return StepRows([(rescale, *row[1:]) for row in self.rows], self.row_of)

    def matrix(self) -> np.ndarray:
        """The rows in double precision."""
        return np.asarray(self.rows, np.float64)


class NormLimit(NamedTuple):
    """A limit of the norm of all gradients (infinity: none), and whether non-finite steps are left out."""

    limit: float
    skip_nonfinite: bool

    def rescale(self, norm: float, rescale: float) -> float | None:
        """Return the factor of gradients that have this norm; None: leave out the step."""
        if not math.isfinite(norm):
            return None if self.skip_nonfinite else rescale
        return rescale * self.limit / norm if norm > self.limit else rescale


class Outcome(NamedTuple):
    """The outcome of a step: the norm, and whether it was skipped or captured."""

    norm: Callable[[], float] | float | None = None  # of the gradients, if it was asked for
    skipped: bool = False
    captured: bool = False  # in a graph, which will make it
