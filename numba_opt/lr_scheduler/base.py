"""The part that all schedulers share: the warm-up."""

from __future__ import annotations

from typing import SupportsIndex

from ..core.arguments import count, number


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
