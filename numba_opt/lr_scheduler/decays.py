"""Schedulers that fade from one learning rate to another."""

from __future__ import annotations

import math
from typing import SupportsIndex

from ..core.arguments import count, number
from .base import LRScheduler


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
    max_update, base_lr, final_lr, warmup_steps
        See `PolyScheduler`.
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
