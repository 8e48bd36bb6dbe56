"""`Trainer`: parameters bound once, stepped many times.

What a step costs beyond the update itself is one look at each gradient's array object; tables, kernels and
hyper-parameters' rows are made once and kept for as long as they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import device
from ..core import arguments
from ..core.names import amount, fitting, named_arrays
from ..core.rates import RATES, overridden
from ..core.step_rows import NormLimit
from ..core.turn import Turn
from ..cpu import ndarray
from ..io import checkpoint
from ..optimizer import Optimizer, create
from .bound_parameters import BoundParameters
from .state import TrainerState

__all__ = ["Trainer"]

Params = Mapping[str, Any] | Sequence[Any]


class Trainer(TrainerState):
    """Updates a fixed set of parameters, in place, as fast as an optimizer can.

    Parameters
    ----------
    params : dict of str to array, or list of array
        The parameters. In a list they are named ``"0"``, ``"1"`` and so on.
    optimizer : Optimizer or str
        An optimizer, or the name of one. It belongs to this trainer from then on.
    clip_global_norm : float, optional
        Gradients are scaled down together when their norm exceeds this: the root of the sum of all their
        squares, after `rescale_grad` and `batch_size`, before everything else.
    skip_nonfinite : bool, default False
        A step whose gradients hold a NaN or an infinity changes nothing and is counted in `skipped_steps`. On
        a GPU it counts as an update too, as below.
    lr_mult, wd_mult : dict of str to float, optional
        Multipliers of learning rate and weight decay by name or pattern, such as ``{"*.bias": 0}``; the last
        one that fits counts. They come before those that the optimizer has by name.
    freeze : str or list of str, optional
        Names or patterns of parameters that stay as they are.
    **optimizer_kwargs
        Arguments for the optimizer, if it is given by name.

    Attributes
    ----------
    optimizer : Optimizer
    params : mapping of str to array
    states : mapping of str to state
        What `Optimizer.create_state_multi_precision` made. To change parameters or states, write into their
        arrays; which arrays they are is settled when the trainer is made.
    grad_norm : float or None
        The norm of the last step's gradients, before clipping; None if neither `clip_global_norm` nor
        `skip_nonfinite` asks for it.
    skipped_steps : int

    Raises
    ------
    TypeError, ValueError
        Something is not an array, cannot be written, shares memory with another parameter, or a pattern
        fits no parameter; the optimizer belongs to another trainer, or its class has a `step` or a `_get_lr`
        of its own, which a trainer does not call.
    RuntimeError
        A method is called while another call of the trainer is under way in the same thread, as by a signal's
        handler or a scheduler; nothing has been changed by it. Other threads wait for their turn.

    Notes
    -----
    A step is made wholly or not at all, whatever comes: an error, an interrupt, a handler that raises.
    `copy.deepcopy` and `pickle` give a trainer of its own that goes on exactly.

    All parameters of a step have the learning rate of the largest count of updates among them; MXNet, and
    `Optimizer.update` with it, has those before it in the list a step behind if counts differ.

    On a GPU, whether gradients are finite is known there and not to the host, which would have to wait for it
    at each step. So a step that `skip_nonfinite` leaves out has been counted by then: schedules of learning
    rates, the bias corrections of Adamax and FTML, and the chance of `stochastic_rounding` go on as after any
    other step, while on the CPU they stay where they were. States and parameters stay as they are on both,
    and ``optimizer.num_update - trainer.skipped_steps`` is how many steps have changed them.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> params = {"weight": np.ones((2, 2)), "bias": np.zeros(2)}
    >>> trainer = numba_opt.Trainer(params, "nag", learning_rate=0.5, momentum=0)
    >>> trainer.step({"weight": np.ones((2, 2)), "bias": np.ones(2)}, batch_size=2)
    >>> params["bias"]
    array([-0.25, -0.25])
    >>> trainer
    Trainer of 2 parameters: 6 elements, 0 B of state, on the CPU
      NAG(learning_rate=0.5, momentum=0.0)
    """

    def __init__(
        self,
        params: Params,
        optimizer: Optimizer | str,
        *,
        clip_global_norm: float | None = None,
        skip_nonfinite: bool = False,
        lr_mult: Mapping[str, float] | None = None,
        wd_mult: Mapping[str, float] | None = None,
        freeze: str | Iterable[str] = (),
        **optimizer_kwargs: Any,
    ) -> None:
        self._params = named_arrays(params)
        self._names = list(self._params)
        on_cuda = set(map(device.on_cuda, self._params.values()))
        self._on_cuda = True in on_cuda
        if len(on_cuda) > 1:
            raise ValueError("params are on the CPU and on GPUs; expected all of them on either")
        self._by_name = isinstance(params, Mapping)
        if isinstance(optimizer, str):
            optimizer = create(optimizer, **optimizer_kwargs)
        elif optimizer_kwargs:
            raise TypeError(
                f"arguments {sorted(optimizer_kwargs)} need an optimizer's name, got {optimizer!r}"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer or a name, got {optimizer!r}")
        if optimizer.rule is None:
            raise TypeError(f"optimizer must have a rule, got {optimizer!r}")
        if own := overridden(type(optimizer), Optimizer, UNASKED):
            raise TypeError(
                f"{type(optimizer).__name__} has a {own[0]} of its own, which Trainer does not call; "
                "expected a rule and hyper only, or use an Updater"
            )
        if optimizer.owner is not None:
            raise ValueError(
                "optimizer belongs to another Trainer, whose updates it counts; "
                "expected one for each Trainer, such as copy.deepcopy(optimizer)"
            )
        self._turn = Turn()
        self._optimizer = optimizer
        optimizer.idx2name = dict(enumerate(self._names))
        optimizer.set_lr_mult({**optimizer.lr_mult, **self._matched("lr_mult", lr_mult or {})})
        optimizer.set_wd_mult({**optimizer.wd_mult, **self._matched("wd_mult", wd_mult or {})})
        self.clip_global_norm = arguments.optional("clip_global_norm", clip_global_norm)
        self.skip_nonfinite = bool(skip_nonfinite)
        self._grad_norm = None
        self._skipped_steps = 0
        self._frozen: set[str] = set()
        self._states = {
            name: optimizer.create_state_multi_precision(i, array)
            for i, (name, array) in enumerate(self._params.items())
        }
        self._totals, self._sums_made, self._bound = None, None, {}
        self._captured: BoundParameters | None = None  # the last one of which a graph was captured
        device.check(self._arrays(range(len(self._names))).without_grads())
        self.freeze(freeze)
        optimizer.give_to(self)

    # ---------------------------------------------------------------- steps

    def step(self, grads: Params | None = None, batch_size: float = 1) -> None:
        """Update the parameters by their gradients.

        Parameters
        ----------
        grads : dict or list, like the parameters
            Arrays of the parameters' shapes and dtypes. A parameter whose gradient is None, or missing from
            a dict, stays as it is, with its state and count. May be left out after `accumulate`.
        batch_size : float, default 1
            Gradients are divided by it.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit; nothing has been changed.
        """
        claim = self._turn.claim("the trainer")
        try:
            self._step(grads, batch_size)
        finally:
            del claim

    def _step(self, grads: Params | None, batch_size: float) -> None:
        batch = self._batch(batch_size)
        if grads is None and self._totals is None:
            raise ValueError("grads must be given, as nothing has been accumulated")
        found = self._unfrozen(self._in_order(grads)) if grads is not None else self._totals or []
        before = None
        if grads is not None and self._totals is not None:
            found, before = self._sums.for_step(self._totals, *self._present(found))
        found = self._unfrozen(found)
        ids = np.fromiter(map(id, found), np.uint64, len(found))
        present = ids != ndarray.NONE
        bound = self._bound.get(present.tobytes())
        if bound is None:
            if not present.any():
                self._grad_norm, self._totals = 0.0 if self._wants_norm else None, None
                return
            bound = self._bind(present)
        if len(bound.positions) < len(found):
            ids, found = ids[present], [found[t] for t in bound.positions]
        after = [] if self._totals is None else [partial(setattr, self, "_totals", None)]
        optimizer = self._optimizer
        rescale = optimizer.rescale_grad / batch
        outcome = bound.step(optimizer, found, ids, rescale, self._limit(), before, after)
        self._grad_norm, self._totals = outcome.norm, None
        if outcome.captured:
            self._captured = bound
        if outcome.skipped:
            self._skipped_steps += 1

    def _bind(self, present: np.ndarray) -> BoundParameters:
        """The parameters that have a gradient, bound."""
        if len(self._bound) >= 8:  # gradients that come and go at random: keep the newest few
            self._skipped_steps += self._bound.pop(next(iter(self._bound))).executor.skipped()
        positions = np.flatnonzero(present).tolist()
        bound = BoundParameters(self.optimizer, self._arrays(positions), positions)
        self._bound[present.tobytes()] = bound
        return bound

    def _limit(self) -> NormLimit | None:
        """Return the limit of the norm of all gradients; None if the norm is not wanted."""
        if not self._wants_norm:
            return None
        limit = math.inf if self.clip_global_norm is None else self.clip_global_norm
        return NormLimit(limit, self.skip_nonfinite)

    def advance(self, batch_size: float = 1) -> None:
        """Count a step that a captured CUDA graph is about to make, and set its hyper-parameters.

        Nothing that changes from step to step is in the graph: kernels read it from the device's memory, and
        this writes it there, on the current stream, if it has changed. With ``sparse_update="exact"`` it also
        lets all rows catch up when there is no more room to record steps. So call it before each replay, on
        the same stream. The step that is captured is not made and not counted; the arrays must be those of
        an earlier step, and this trainer must live as long as the graph. A norm over several devices cannot
        be captured, as one device's graph cannot wait for another's.

        Parameters
        ----------
        batch_size : float, default 1
            Gradients are divided by it.

        Raises
        ------
        ValueError
            No step has been captured, or what it used has been replaced since, as by a checkpoint.

        Examples
        --------
        With PyTorch, gradients being in the same tensors at each step::

            trainer.step(grads)                  # compiles, and makes tables
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                trainer.step(grads)
            for lr in (0.1, 0.05):
                trainer.set_learning_rate(lr)
                trainer.advance()
                graph.replay()
        """
        claim = self._turn.claim("the trainer")
        try:
            if self._captured is None:
                raise ValueError("advance needs a step that has been captured in a CUDA graph")
            rescale, limit = self.optimizer.rescale_grad / self._batch(batch_size), self._limit()
            self._captured.replay(self.optimizer, rescale, limit)
            if limit is not None:
                self._grad_norm = self._captured.executor.norm
        finally:
            del claim

    @staticmethod
    def _batch(batch_size: float) -> float:
        batch = 1.0 if batch_size == 1 else arguments.number("batch_size", batch_size)
        if not batch:
            raise ValueError(f"batch_size must be greater than 0, got {batch_size!r}")
        return batch

    @property
    def _wants_norm(self) -> bool:
        return self.clip_global_norm is not None or self.skip_nonfinite

    def accumulate(self, grads: Params) -> None:
        """Add gradients, in place, to those of earlier calls; the next `step` takes the sum.

        Half-precision gradients of float32 weights, or of weights with a float32 copy, add up in float32.
        Sparse gradients stay so until a dense one is added. On a GPU the sums are there too, in memory that
        is kept for the next ones, and nobody waits for them but where that grows; the step must be on the
        same stream. They are added in the CPU's order, and equal its sums to the bit, but for float64 values
        that are added up in float16 or bfloat16.

        In a CUDA graph together with the step that takes them, calls of this are made again with each replay.
        Make the same calls with the same arrays before the capture. In a graph of its own a call adds to the
        sum, or begins it, as it would have when it was captured: capture and replay graphs in one order.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit; nothing has been added.
        """
        claim = self._turn.claim("the trainer")
        try:
            found = self._unfrozen(self._in_order(grads))
            totals, add = self._sums.plus(self._totals or [None] * len(found), *self._present(found))
            add([partial(setattr, self, "_totals", totals)])
        finally:
            del claim

    def _present(self, grads: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Return the gradients that there are, and the weights that they update, by position."""
        present = [t for t, grad in enumerate(grads) if grad is not None]
        return {t: grads[t] for t in present}, dict(zip(present, self._arrays(present).weights, strict=True))

    def _in_order(self, grads: Params) -> list[Any]:
        """Return gradients as a list beside the parameters, None where there is none or it is not wanted."""
        if self._by_name:
            if not isinstance(grads, Mapping):
                raise TypeError(f"grads must be a dict, as the parameters are, got {type(grads).__name__}")
            try:
                found = [grads[name] for name in self._names]
                complete = len(grads) == len(found)
            except KeyError:
                found = [grads.get(name) for name in self._names]
                complete = False
            unknown = set() if complete else grads.keys() - self._params.keys()
            if unknown:
                raise ValueError(f"grads has {min(unknown, key=repr)!r}, which is not a parameter")
        else:
            if not isinstance(grads, (list, tuple)):
                raise TypeError(f"grads must be a list, as the parameters are, got {type(grads).__name__}")
            found = list(grads)
            if len(found) != len(self._names):
                raise ValueError(f"grads has length {len(found)}; expected {len(self._names)}, as params")
        return found

    def _unfrozen(self, grads: list[Any]) -> list[Any]:
        """Gradients without those of frozen parameters."""
        if not self._frozen:
            return grads
        return [None if name in self._frozen else g for name, g in zip(self._names, grads, strict=True)]

    # ---------------------------------------------------------------- learning rates and names

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate, before multipliers."""
        return self.optimizer.learning_rate

    def set_learning_rate(self, lr: float) -> None:
        """Set the optimizer's learning rate, from the next step on."""
        self.optimizer.set_learning_rate(lr)

    def set_lr_mult(self, lr_mult: Mapping[str, float]) -> None:
        """Set multipliers of the learning rate by name or pattern; all earlier ones are dropped."""
        self.optimizer.set_lr_mult(self._matched("lr_mult", lr_mult))

    def set_wd_mult(self, wd_mult: Mapping[str, float]) -> None:
        """Set multipliers of the weight decay by name or pattern; all earlier ones are dropped."""
        self.optimizer.set_wd_mult(self._matched("wd_mult", wd_mult))

    def freeze(self, patterns: str | Iterable[str]) -> None:
        """Let parameters stay as they are, by name or pattern; their gradients are not looked at."""
        self._frozen |= set(fitting("freeze", patterns, self._names))

    def unfreeze(self, patterns: str | Iterable[str] = "*") -> None:
        """Let parameters move again, by name or pattern."""
        self._frozen -= set(fitting("unfreeze", patterns, self._names))

    def _matched(self, what: str, given: Mapping[str, float]) -> dict[str, float]:
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a dict of name or pattern to number, got {given!r}")
        return {
            name: value
            for pattern, value in given.items()
            for name in fitting(what, str(pattern), self._names)
        }

    # ---------------------------------------------------------------- for people

    def __repr__(self) -> str:
        elements = sum(device.look_at(w, "weight").size for w in self._params.values())
        states = [array for state in self._states.values() for array in checkpoint.leaves(state)]
        held = sum(device.look_at(array, "state").nbytes for array in states)
        frozen = f" ({len(self._frozen)} frozen)" if self._frozen else ""
        return (
            f"Trainer of {len(self._names):,} parameters{frozen}: {elements:,} elements, "
            f"{amount(held)} of state, on {'CUDA' if self._on_cuda else 'the CPU'}\n  {self.optimizer!r}"
        )


# What a trainer does by itself, for all parameters at once.
UNASKED = ("step", "fused_step", "update", "update_multi_precision", *RATES)
