"""`Updater`: an optimizer together with the states of the parameters that it has met."""

from __future__ import annotations

import math
from typing import Any

from . import checkpoint
from .execution import History
from .kernels import threads
from .optimizer import Index, Optimizer

__all__ = ["Updater", "get_updater"]


class Updater:
    """Updates parameters by index, making each one's state when it first comes.

    Parameters
    ----------
    optimizer : Optimizer
        Its `aggregate_num` says how many parameters go into one of its calls.

    Attributes
    ----------
    states : dict
        The states by index.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> updater = numba_opt.get_updater(numba_opt.NAG(learning_rate=0.5, momentum=0))
    >>> weight = np.array([1.0, 2.0])
    >>> updater(0, np.array([1.0, -1.0]), weight)
    >>> weight
    array([0.5, 2.5])
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {optimizer!r}")
        self.optimizer = optimizer
        self.states: dict[Index, Any] = {}

    def __call__(self, index: Any, grad: Any, weight: Any) -> None:
        """Update a weight, or lists of them.

        Parameters
        ----------
        index : int or list of int
        grad, weight : array or list of array
            As many as there are indices.
        """
        many = isinstance(index, (list, tuple))
        indices, grads, weights = (index, grad, weight) if many else ([index], [grad], [weight])
        self.optimizer._check_lengths(indices, weights, grads, indices)
        fresh = {
            i: self.optimizer.create_state_multi_precision(i, w)
            for i, w in zip(indices, weights, strict=True)
            if i not in self.states
        }
        states = [fresh[i] if i in fresh else self.states[i] for i in indices]
        step = len(indices) if self.optimizer.aggregate_num == math.inf else int(self.optimizer.aggregate_num)
        if step < len(indices):  # check the whole call before its first part is carried out
            self.optimizer._check(indices, weights, grads, states)
        for first in range(0, len(indices), max(step, 1)):
            part = slice(first, first + step)
            self.optimizer.update_multi_precision(indices[part], weights[part], grads[part], states[part])
            self.states.update((i, fresh[i]) for i in indices[part] if i in fresh)

    def get_states(self, dump_optimizer: bool = False) -> bytes:
        """All states as safetensors, with the optimizer's hyper-parameters and counts if wanted.

        Steps that rows have yet to take (``sparse_update="exact"``) are saved with the states.
        """
        arrays: checkpoint.Arrays = {}
        states = checkpoint.take_apart(list(map(list, self.states.items())), arrays)
        optimizer = checkpoint.describe(self.optimizer) if dump_optimizer else None
        late = [[i, history.rows()] for i, history in self.optimizer._history.items() if history.recorded]
        values = {
            "states": states,
            "optimizer": checkpoint.take_apart(optimizer, arrays),
            "histories": checkpoint.take_apart(late, arrays, "histories"),
        }
        return checkpoint.to_bytes(arrays, values)

    def set_states(self, states: bytes) -> None:
        """Take the states, and the optimizer's values if they are there, from `get_states`.

        Raises
        ------
        CheckpointError
            The bytes are damaged, or of another optimizer; nothing has been changed.
        """
        arrays, values = checkpoint.from_bytes(states)
        if "states" not in values:
            raise checkpoint.CheckpointError("a checkpoint of numba_opt, but not of an Updater")
        found = {i: _owned(state) for i, state in checkpoint.put_together(values["states"], arrays)}
        optimizer = checkpoint.put_together(values["optimizer"], arrays)
        late = checkpoint.put_together(values["histories"], arrays)
        if optimizer is not None:
            threads.run([], checkpoint.restorer(self.optimizer, optimizer))
        self.states = found
        self.optimizer._history = {i: History.of(rows) for i, rows in late}


def _owned(state: Any) -> Any:
    """A state with arrays that can be written; those that were read are views of the bytes."""
    if isinstance(state, tuple):
        return tuple(map(_owned, state))
    return None if state is None else state.copy()


def get_updater(optimizer: Optimizer) -> Updater:
    """An `Updater` of an optimizer."""
    return Updater(optimizer)
