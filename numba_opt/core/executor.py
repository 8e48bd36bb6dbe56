"""The interface of what runs calls, of which the CPU has an implementation and CUDA another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .call import Arrays, Call
from .rules import Rule
from .step_rows import NormLimit, Outcome, StepRows

Limit = NormLimit | None
Before = Callable[[], None] | None
After = Sequence[partial[Any]]  # what counts a step, none of it written in Python


class Executor(ABC):
    """Makes the steps of a rule, on arrays that it is given first; tables and kernels are kept."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @abstractmethod
    def refresh(
        self, arrays: Arrays, grads: Sequence[Any] | None = None, ids: np.ndarray | None = None
    ) -> None:
        """Be ready for some arrays, perhaps with other gradients; nothing is written.

        Whoever has the ids of all objects already gives them, too.

        Raises
        ------
        TypeError, ValueError
            They do not go together, or no kernel takes them.
        """

    @abstractmethod
    def hold(self, calls: Sequence[Call]) -> None:
        """Be ready for calls that somebody else has made of arrays, one for each device."""

    @abstractmethod
    def move(self) -> None:
        """Follow the scans of the calls, in which addresses have changed."""

    @abstractmethod
    def run(self, rows: StepRows, limit: Limit = None, before: Before = None, after: After = ()) -> Outcome:
        """Make a step wholly or, if anything comes first, not at all.

        Parameters
        ----------
        rows : StepRows
            The coefficients.
        limit : NormLimit, optional
            What is asked for of the norm of the gradients.
        before : callable, optional
            What is to happen once nothing can go wrong any more, before the step.
        after : list of partial
            What counts the step.
        """

    @abstractmethod
    def flush(self) -> None:
        """Let all rows take the steps that they have yet to take."""

    def release(self) -> None:  # noqa: B027  on GPUs nothing is held
        """Let go of the caller's arrays."""

    def norm(self) -> float:
        """The norm of the last step's gradients, of which the host knows nothing; waits for a device."""
        raise NotImplementedError("the host knows the norm of a step on the CPU")

    def skipped(self) -> int:
        """Return how many steps a device has left out without the host's knowing; waits for it."""
        return 0

    def out_of_range_rows(self) -> bool:
        """Tell whether a sparse gradient had rows that its parameter has not; waits for the device."""
        return False

    def replay(self, rows: StepRows, limit: NormLimit | None, deferred: Sequence[Any], after: After) -> None:
        """Have all in place for a step that is in a graph."""
        raise NotImplementedError("there are graphs on GPUs only")
