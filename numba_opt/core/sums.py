"""Gradients that add up before a step takes their sum: one interface, of the CPU and of GPUs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

Totals = list[Any]  # of all parameters; None where there is none


class Add(Protocol):
    """A call that adds gradients, which have been checked, and then makes calls not written in Python."""

    def __call__(self, after: Sequence[partial[Any]] = ()) -> None: ...


class Sums(ABC):
    """The sums of a trainer's gradients.

    Sparse gradients are put one behind the other and summed when they are used; together with dense ones they
    are added to a dense sum.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    @abstractmethod
    def plus(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Add]:
        """Return the totals as they will be with gradients at some positions, and the call that adds those.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit.
        """

    @abstractmethod
    def for_step(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Callable[[], None] | None]:
        """Return the totals for a step that may fail yet, and a call to make before it, or None."""

    @abstractmethod
    def dense(self, t: int, weight: Any) -> Any:
        """Return the array like its weight in which the sum of a parameter's dense gradients is held."""

    @abstractmethod
    def sparse(self, weight: Any, saved: Any, what: str) -> Any:
        """Make a sparse sum with the content of one that was saved."""

    def out_of_range_rows(self) -> bool:
        """Tell whether a sparse gradient had rows that its parameter has not; waits for the device."""
        return False
