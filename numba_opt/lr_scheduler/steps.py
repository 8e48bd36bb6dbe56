"""Schedulers that change the learning rate at certain updates."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import SupportsIndex

from ..core.arguments import count, number
from .base import LRScheduler


class FactorScheduler(LRScheduler):
    """Multiply the learning rate by a factor every `step` updates.

    ::

        k     = floor((max(n, 1) - 1) / step)
        lr(n) = base_lr                                     if k = 0
        lr(n) = max(base_lr * factor^k, stop_factor_lr)     otherwise

    So the rate changes just after every `step` updates, at ``step + 1``, ``2 * step + 1``, ...
    The updates of a warm-up count, and the changes due in it take effect at its end.

    Parameters
    ----------
    step : int
        Number of updates between two changes, at least 1.
    factor : float, default 1
        What a change multiplies the rate by, from 0 to 1.
    stop_factor_lr : float, default 1e-8
        The rate that no change goes below. A `base_lr` that is already below it is left alone
        until the first change, which raises it to `stop_factor_lr`.
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described here and in `LRScheduler`.

    Examples
    --------
    >>> scheduler = FactorScheduler(step=2, factor=0.5, base_lr=1.0)
    >>> [scheduler(n) for n in range(1, 8)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    """

    def __init__(
        self,
        step: SupportsIndex,
        factor: float = 1,
        stop_factor_lr: float = 1e-8,
        base_lr: float = 0.01,
        warmup_steps: SupportsIndex = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        self.step = count("step", step, minimum=1)
        self.factor = number("factor", factor, maximum=1)
        self.stop_factor_lr = number("stop_factor_lr", stop_factor_lr)
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def decayed(self, num_update: int) -> float:
        """Return ``base_lr`` after as many changes as are due before update `num_update`."""
        changes = (max(num_update, 1) - 1) // self.step
        if changes == 0:
            return self.base_lr
        return max(self.base_lr * self.factor**changes, self.stop_factor_lr)


class MultiFactorScheduler(LRScheduler):
    """Multiply the learning rate by a factor after each of the given updates.

    ::

        lr(n) = base_lr * factor^k      with k the number of i for which step[i] < n

    The updates of a warm-up count, and the changes due in it take effect at its end.

    Parameters
    ----------
    step : list or tuple of int
        Strictly increasing numbers of updates, each at least 1; the update after each is the
        first one with the changed rate.
    factor : float, default 1
        What a change multiplies the rate by, from 0 to 1.
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See `LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described here and in `LRScheduler`.

    Examples
    --------
    >>> scheduler = MultiFactorScheduler(step=[2, 5], factor=0.5, base_lr=1.0)
    >>> [scheduler(n) for n in range(1, 8)]
    [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    """

    def __init__(
        self,
        step: Sequence[SupportsIndex],
        factor: float = 1,
        base_lr: float = 0.01,
        warmup_steps: SupportsIndex = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        if not isinstance(step, (list, tuple)):
            raise TypeError(
                f"step must be a list or tuple of integers, got {step!r} of type {type(step).__name__}"
            )
        self.step = [count(f"step[{i}]", value, minimum=1) for i, value in enumerate(step)]
        if not self.step or any(a >= b for a, b in pairwise(self.step)):
            raise ValueError(f"step must be a non-empty, strictly increasing list, got {self.step!r}")
        self.factor = number("factor", factor, maximum=1)
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def decayed(self, num_update: int) -> float:
        """Return ``base_lr`` after as many changes as are due before update `num_update`."""
        return self.base_lr * self.factor ** bisect_left(self.step, num_update)
