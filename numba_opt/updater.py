"""`Updater`: an optimizer together with the states of the parameters that it has met."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .core.rates import Index
from .core.storage import EXPECTED, code_of, compute_dtype, state_dtype
from .cpu import threads
from .cpu.deferred import DeferredSteps
from .errors import CheckpointError
from .io import checkpoint, description
from .io.found import by_index, part, shown
from .optimizer import Optimizer
from .optimizer.states import HasStates, check_lengths

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
        check_lengths(indices, weights, grads, indices)
        fresh = {
            i: self.optimizer.create_state_multi_precision(i, w)
            for i, w in zip(indices, weights, strict=True)
            if i not in self.states
        }
        states = [fresh[i] if i in fresh else self.states[i] for i in indices]
        step = len(indices) if self.optimizer.aggregate_num == math.inf else int(self.optimizer.aggregate_num)
        if step < len(indices):  # check the whole call before its first part is carried out
            self.optimizer.check_call(indices, weights, grads, states)
        for first in range(0, len(indices), max(step, 1)):
            part = slice(first, first + step)
            self.optimizer.update_multi_precision(indices[part], weights[part], grads[part], states[part])
            self.states.update((i, fresh[i]) for i in indices[part] if i in fresh)

    def get_states(self, dump_optimizer: bool = False) -> bytes:
        """Return all states as safetensors, with the optimizer's hyper-parameters and counts if wanted.

        Steps that rows have yet to take (``sparse_update="exact"``) are saved with the states.
        """
        arrays: checkpoint.Arrays = {}
        states = checkpoint.take_apart(list(map(list, self.states.items())), arrays)
        optimizer = description.describe(self.optimizer) if dump_optimizer else None
        pending = self.optimizer.deferred_rows()
        values = {
            "states": states,
            "optimizer": checkpoint.take_apart(optimizer, arrays),
            "histories": checkpoint.take_apart(pending, arrays, "histories"),
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
            raise CheckpointError("a checkpoint of numba_opt, but not of an Updater")
        values = checkpoint.put_together(values, arrays)
        what = "the checkpoint"
        optimizer: HasStates = self.optimizer
        calls: checkpoint.Calls = []
        described = part(values, "optimizer", (Mapping, type(None)), what)
        if described is not None:
            optimizer, calls = description.restoration(optimizer, described)
        pending = by_index(part(values, "histories", list, what), "histories", partial(_recorded, optimizer))
        found = by_index(part(values, "states", list, what), "states", partial(_State.of, optimizer))
        for index, state in found.items():
            state.check_deferred(shown(index), pending.get(index))
        deferred = {index: DeferredSteps.of(rows) for index, rows in pending.items()}
        calls += [
            partial(setattr, self, "states", {index: state.whole for index, state in found.items()}),
            *self.optimizer.deferring(deferred),
        ]
        threads.run([], calls)


class _State(NamedTuple):
    """A parameter's state in a checkpoint, of the form that its optimizer would give it."""

    whole: Any
    last_step: np.ndarray | None = None
    real: np.dtype | None = None  # of recorded steps, where the state tells

    @classmethod
    def of(cls, optimizer: HasStates, what: str, saved: Any) -> _State:
        """A state with arrays of its own; those that were read are views of the bytes."""
        what = f"the checkpoint's {what}"
        whole = _owned(saved, what)
        kind = type(optimizer)
        if (kind.create_state, kind.create_state_multi_precision) != STANDARD:
            return cls(whole)  # whatever it has, each update looks at it
        n, exact = len(optimizer.state_names), optimizer.sparse_update == "exact"
        master, last_step, inner = None, None, whole
        if optimizer.multi_precision and _is_pair(whole) and _is_state(whole[1], n, exact):
            master, inner = whole
        if not _is_state(inner, n, exact):
            raise CheckpointError(f"{what} is {_form(whole)}; expected {_expected(optimizer)}")
        if exact:
            inner, last_step = inner
        dtype = _check_arrays(optimizer, what, master, checkpoint.leaves(inner), last_step)
        return cls(whole, last_step, None if dtype is None else compute_dtype(dtype))

    def check_deferred(self, index: str, rows: np.ndarray | None) -> None:
        """Refuse last_step beyond the steps that are recorded, and steps in another precision."""
        if rows is not None and self.real is not None and rows.dtype != self.real:
            raise CheckpointError(
                f"the checkpoint's histories[{index}] are {rows.dtype}; expected {self.real}, as the state"
            )
        count = 0 if rows is None else len(rows)
        if self.last_step is not None and not np.all((self.last_step >= 0) & (self.last_step <= count)):
            raise CheckpointError(
                f"the checkpoint's last_step of states[{index}] go from {self.last_step.min()} to "
                f"{self.last_step.max()}; expected 0 to {count}, the steps recorded"
            )


STANDARD = (HasStates.create_state, HasStates.create_state_multi_precision)


def _recorded(optimizer: HasStates, what: str, rows: Any) -> np.ndarray:
    """The steps that some rows of a parameter have yet to take, as a checkpoint has them."""
    if optimizer.sparse_update != "exact" or optimizer.rule is None:
        raise CheckpointError(
            f"the checkpoint has {what}, of an optimizer with sparse_update='exact'; "
            f"this one has {optimizer.sparse_update!r}"
        )
    length = optimizer.coefficient_row_length()
    fits = isinstance(rows, np.ndarray) and rows.dtype in (np.float32, np.float64) and rows.ndim == 2
    if not fits or rows.shape[1] != length or np.isnan(rows).any():
        expected = f"numbers of float32 or float64, {length} in each row"
        raise CheckpointError(f"the checkpoint's {what} is {shown(rows)}; expected {expected}")
    return rows


def _check_arrays(
    optimizer: HasStates,
    what: str,
    master: np.ndarray | None,
    states: list[np.ndarray],
    last_step: np.ndarray | None,
) -> np.dtype | None:
    """Refuse arrays that do not belong together; the weight's dtype, if they tell it."""
    stored = None
    if optimizer.state_dtype is not None:
        stored = state_dtype(optimizer.state_storage, np.dtype(np.float32))
    weight = states[0].dtype if states and stored is None else None
    if master is not None:
        weight = np.dtype(np.float32)
        _check(f"float32 weight of {what}", master, weight, master.shape)
    shape = master.shape if master is not None else states[0].shape if states else None
    if weight is not None and not code_of(weight):
        raise CheckpointError(f"{what} is {weight}; expected {EXPECTED}")
    for state in states:
        expected = (*shape[:1], 1) if optimizer.per_row and shape else shape
        _check(what, state, stored or weight, expected)
    if last_step is not None:
        rows = last_step.shape[:1] if shape is None else shape[:1] or (1,)
        _check(f"last_step of {what}", last_step, np.dtype(np.int64), rows)
    return weight


def _check(what: str, array: np.ndarray, dtype: Any, shape: Any) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise CheckpointError(f"{what} is {shown(array)}; expected one of {dtype}, shape {shape}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], np.ndarray)


def _is_state(value: Any, n: int, exact: bool) -> bool:
    """Tell whether a value consists of `n` states, with last_step if they are `exact`."""
    if exact:
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], np.ndarray)
        return pair and _is_state(value[0], n, False)
    if n < 2:
        return isinstance(value, np.ndarray) if n else value is None
    return isinstance(value, tuple) and len(value) == n and all(isinstance(a, np.ndarray) for a in value)


def _form(value: Any) -> str:
    """Describe the form of a state."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_form, value))})"
    return "None" if value is None else "array"


def _expected(optimizer: HasStates) -> str:
    """Describe the form that a state of an optimizer should have."""
    names = optimizer.state_names
    form = f"({', '.join(names)})" if len(names) > 1 else names[0] if names else "None"
    if optimizer.sparse_update == "exact":
        form = f"({form}, last_step)"
    return f"{form} or (float32 weight, {form})" if optimizer.multi_precision else form


def _owned(state: Any, what: str) -> Any:
    """A state with arrays that can be written."""
    if isinstance(state, (tuple, list)):
        return tuple(_owned(value, what) for value in state)
    if state is not None and not isinstance(state, np.ndarray):
        raise CheckpointError(f"{what} has {shown(state)}; expected arrays, None and tuples of them")
    return None if state is None else state.copy()


def get_updater(optimizer: Optimizer) -> Updater:
    """Make an `Updater` of an optimizer."""
    return Updater(optimizer)
