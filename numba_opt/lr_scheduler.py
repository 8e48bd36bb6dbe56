"""Learning-rate schedules: the learning rate as a function of the number of updates.

What belongs here: schedulers, which are pure Python and know nothing of optimizers, arrays or
devices. An optimizer calls ``scheduler(num_update)`` before each update.

The constructors are those of MXNet 2.0, and so are the values in the order of a training run.
Unlike MXNet's, a scheduler here never changes itself: its value depends only on ``num_update``
and on its attributes, which are exactly its constructor's arguments. So one scheduler can be
shared between optimizers, asked about any update in any order, resumed in the middle of a run,
and rebuilt with ``type(scheduler)(**vars(scheduler))``. MXNet's running state (``count``,
``cur_step_ind``, ``base_lr_orig``, ``warmup_final_lr``, ``max_steps``) is gone, its ``power`` is
``pwr`` as in the constructor, and nothing is logged.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import SupportsIndex

from .arguments import count, number

__all__ = [
    "CosineScheduler",
    "FactorScheduler",
    "LRScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
]


class LRScheduler:
    """Base class of the schedulers: the warm-up, then whatever `decayed` says.

    ::

        lr(n) = warmup_begin_lr + (base_lr - warmup_begin_lr) * n / warmup_steps
                                        if n < warmup_steps, with warmup_mode "linear"
        lr(n) = warmup_begin_lr         if n < warmup_steps, with warmup_mode "constant"
        lr(n) = decayed(n)              otherwise

    A subclass overrides `decayed`, and has the warm-up for nothing; or it overrides ``__call__``
    and decides about everything.

    Parameters
    ----------
    base_lr : float, default 0.01
        Learning rate at the start of the decay, which is the end of the warm-up. It may be set
        later, and then counts everywhere. (An optimizer given both a learning rate and a
        scheduler sets it. In MXNet that had, silently, no effect on the warm-up nor on
        `PolyScheduler` and `CosineScheduler`.)
    warmup_steps : int, default 0
        Number of updates before the decay.
    warmup_begin_lr : float, default 0
        Learning rate at the start of the warm-up, at most `base_lr`.
    warmup_mode : {"linear", "constant"}, default "linear"
        Whether the rate rises in equal increments or stays at `warmup_begin_lr`.

    Raises
    ------
    TypeError
        If a rate is not a real number, or a number of updates not an integer.
    ValueError
        If a rate is negative, infinite or NaN, `warmup_steps` is negative, `warmup_begin_lr`
        exceeds `base_lr`, or `warmup_mode` is unknown.

    Examples
    --------
    >>> class InverseScheduler(LRScheduler):
    ...     def decayed(self, num_update):
    ...         return self.base_lr / (1 + num_update - self.warmup_steps)
    >>> scheduler = InverseScheduler(base_lr=1.0, warmup_steps=4)
    >>> [scheduler(n) for n in range(7)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.3333333333333333]
    """

    def __init__(
        self,
        base_lr: float = 0.01,
        warmup_steps: SupportsIndex = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        self.base_lr = number("base_lr", base_lr)
        self.warmup_steps = count("warmup_steps", warmup_steps, minimum=0)
        self.warmup_begin_lr = number("warmup_begin_lr", warmup_begin_lr)
        self.warmup_mode = warmup_mode
        if self.warmup_begin_lr > self.base_lr:
            raise ValueError(
                f"warmup_begin_lr must be at most base_lr, "
                f"got {self.warmup_begin_lr!r} with base_lr {self.base_lr!r}"
            )
        if warmup_mode not in ("linear", "constant"):
            raise ValueError(f"warmup_mode must be 'linear' or 'constant', got {warmup_mode!r}")

    def __call__(self, num_update: int) -> float:
        """Return the learning rate of update `num_update`.

        Parameters
        ----------
        num_update : int
            Largest number of updates that any one weight has had, this one included; at least 0.

        Returns
        -------
        float
            The learning rate.

        Raises
        ------
        TypeError
            If `num_update` is not an integer.
        ValueError
            If `num_update` is negative.
        """
        num_update = count("num_update", num_update, minimum=0)
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        return self.decayed(num_update)

    def get_warmup_lr(self, num_update: int) -> float:
        """Return the learning rate of an update of the warm-up.

        Parameters
        ----------
        num_update : int
            Number of the update, from 0 to ``warmup_steps - 1``.

        Returns
        -------
        float
            The learning rate.

        Raises
        ------
        ValueError
            If `num_update` is not in the warm-up.
        """
        if not 0 <= num_update < self.warmup_steps:
            raise ValueError(
                f"num_update must be from 0 to warmup_steps - 1 = {self.warmup_steps - 1} "
                f"in the warm-up, got {num_update!r}"
            )
        if self.warmup_mode == "constant":
            return self.warmup_begin_lr
        rise = (self.base_lr - self.warmup_begin_lr) * num_update / self.warmup_steps
        return self.warmup_begin_lr + rise

    def decayed(self, num_update: int) -> float:
        """Return the learning rate of an update after the warm-up; for subclasses to override.

        Parameters
        ----------
        num_update : int
            Number of the update, at least `warmup_steps`; it counts the warm-up's updates too.

        Returns
        -------
        float
            The learning rate.

        Raises
        ------
        NotImplementedError
            If the subclass overrides neither this method nor ``__call__``.
        """
        raise NotImplementedError(f"{type(self).__name__} must override decayed or __call__")

    def __repr__(self) -> str:
        """Return the call that makes this scheduler anew."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


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


class _DecayToFinal(LRScheduler):
    """Fade from `base_lr`, at the warm-up's end, to `final_lr`, from `max_update` on."""

    def __init__(
        self,
        max_update: SupportsIndex,
        base_lr: float,
        final_lr: float,
        warmup_steps: SupportsIndex,
        warmup_begin_lr: float,
        warmup_mode: str,
    ) -> None:
        self.max_update = count("max_update", max_update, minimum=1)
        self.final_lr = number("final_lr", final_lr)
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        if self.warmup_steps > self.max_update:
            raise ValueError(
                f"warmup_steps must be at most max_update, "
                f"got {self.warmup_steps} with max_update {self.max_update}"
            )

    def decayed(self, num_update: int) -> float:
        """Return the mean of ``base_lr`` and ``final_lr``, weighted by what is left to decay."""
        if num_update >= self.max_update:
            return self.final_lr
        share = self._share(num_update - self.warmup_steps, self.max_update - self.warmup_steps)
        if share == 1.0:  # final_lr + (base_lr - final_lr) may miss base_lr by a rounding
            return self.base_lr
        lr = self.final_lr + (self.base_lr - self.final_lr) * share
        low, high = sorted((self.final_lr, self.base_lr))
        return min(max(lr, low), high)

    def _share(self, elapsed: int, total: int) -> float:
        """Return the share of ``base_lr - final_lr`` that is left, from 1 down to 0."""
        raise NotImplementedError


class PolyScheduler(_DecayToFinal):
    """Decay the learning rate along a polynomial.

    ::

        p     = (n - warmup_steps) / (max_update - warmup_steps)
        lr(n) = final_lr + (base_lr - final_lr) * (1 - p)^pwr       if n < max_update
        lr(n) = final_lr                                            otherwise

    Parameters
    ----------
    max_update : int
        The update from which the rate is `final_lr`, at least 1. The warm-up's updates count.
        When it equals `warmup_steps` there is no decay: the rate goes from the warm-up straight
        to `final_lr`.
    base_lr : float, default 0.01
        Learning rate at the start of the decay. It may be set later, and the decay then starts
        from the new one; in MXNet the decay silently kept the constructor's.
    pwr : float, default 2
        Power of the polynomial, at least 0; 1 is a straight line. With 0 the rate stays at
        `base_lr` until `max_update`, where it drops to `final_lr` (MXNet never dropped it).
    final_lr : float, default 0
        Learning rate at the end of the decay; above `base_lr`, the rate rises to it.
    warmup_steps : int, default 0
        Number of updates before the decay, at most `max_update`.
    warmup_begin_lr, warmup_mode
        See `LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described here and in `LRScheduler`.

    Examples
    --------
    >>> scheduler = PolyScheduler(max_update=4, base_lr=1.0)
    >>> [scheduler(n) for n in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    >>> scheduler.base_lr = 2.0
    >>> scheduler(2)
    0.5
    """

    def __init__(
        self,
        max_update: SupportsIndex,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0,
        warmup_steps: SupportsIndex = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        self.pwr = number("pwr", pwr)
        super().__init__(max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def _share(self, elapsed: int, total: int) -> float:
        return math.pow(1 - elapsed / total, self.pwr)


class CosineScheduler(_DecayToFinal):
    """Decay the learning rate along half a period of a cosine.

    ::

        p     = (n - warmup_steps) / (max_update - warmup_steps)
        lr(n) = final_lr + (base_lr - final_lr) * (1 + cos(pi * p)) / 2     if n < max_update
        lr(n) = final_lr                                                    otherwise

    Parameters
    ----------
    max_update : int
        The update from which the rate is `final_lr`, at least 1. The warm-up's updates count.
        When it equals `warmup_steps` there is no decay: the rate goes from the warm-up straight
        to `final_lr`.
    base_lr : float, default 0.01
        Learning rate at the start of the decay. It may be set later, and the decay then starts
        from the new one; in MXNet the decay silently kept the constructor's.
    final_lr : float, default 0
        Learning rate at the end of the decay; above `base_lr`, the rate rises to it.
    warmup_steps : int, default 0
        Number of updates before the decay, at most `max_update`.
    warmup_begin_lr, warmup_mode
        See `LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described here and in `LRScheduler`.

    Examples
    --------
    >>> scheduler = CosineScheduler(max_update=12, base_lr=1.0, warmup_steps=4)
    >>> [round(scheduler(n), 4) for n in (0, 2, 4, 6, 8, 10, 12, 14)]
    [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    def __init__(
        self,
        max_update: SupportsIndex,
        base_lr: float = 0.01,
        final_lr: float = 0,
        warmup_steps: SupportsIndex = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def _share(self, elapsed: int, total: int) -> float:
        return (1 + math.cos(math.pi * elapsed / total)) / 2
