"""The readable step: a rule on whole arrays, one parameter after another.

Everything is worked out in copies. What is returned puts them into their places.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..compiler import rounding
from ..compiler.elements import prepare
from ..core import rules
from ..core.call import Call
from ..core.columns import TENSOR_ID
from ..core.rules import Rule
from ..core.step_rows import StepRows
from ..core.storage import STOCHASTIC, compute_dtype

# What stores a state: (its number, array, values, the rows that the array's are, coefficients).
StoreState = Callable[[int, np.ndarray, np.ndarray, "np.ndarray | None", Any], None]


def step(call: Call, step_rows: StepRows) -> list[partial[Any]]:
    """Work out a step of all parameters; return the calls that put its results into their places."""
    rules.check_on_arrays(call.rule)
    written = []
    for t, number in enumerate(step_rows.row_of):
        grad, *arrays = (column[t] for column in call.arrays)
        fresh, row = _copies(arrays), step_rows.rows[number]
        last_step = call.last_steps[t].copy() if t in call.last_steps else None
        if last_step is not None and call.deferred[t].recorded:
            _catch_up(call, t, fresh, last_step)
        if t not in call.touched:
            _apply(call.rule, grad, fresh, row, _state_store(call, t))
        else:
            touched = call.touched[t]
            _apply_to_rows(
                call.rule, touched.rows, touched.summed(fresh[0]), fresh, row, _state_store(call, t)
            )
            if last_step is not None:
                last_step[touched.rows] = call.deferred[t].recorded + 1
                call.deferred[t].with_current(row)
        written += _putting(arrays, fresh)
        if last_step is not None:
            written.append(partial(operator.setitem, call.last_steps[t], ..., last_step))
    return written


def catch_up(call: Call, t: int) -> list[partial[Any]]:
    """Work out the steps that all rows of a parameter have yet to take; return the calls that store them."""
    rules.check_on_arrays(call.rule)
    arrays = [column[t] for column in call.arrays[1:]]
    fresh = _copies(arrays)
    _catch_up(call, t, fresh, call.last_steps[t].copy())
    return _putting(arrays, fresh)


def _copies(arrays: Sequence[Any]) -> list[Any]:
    return [None if array is None else array.copy() for array in arrays]


def _putting(arrays: Sequence[Any], fresh: Sequence[Any]) -> list[partial[Any]]:
    """Return the calls that put other contents into some arrays."""
    pairs = zip(arrays, fresh, strict=True)
    return [partial(operator.setitem, array, ..., new) for array, new in pairs if array is not None]


def _catch_up(call: Call, t: int, arrays: Sequence[Any], last_step: np.ndarray) -> None:
    """Let rows that will be touched or are overdue, or all, take the steps that they have yet to take."""
    steps, rows = call.deferred[t], np.arange(len(last_step))
    if t in call.touched:
        rows = np.union1d(call.touched[t].rows, steps.overdue(len(last_step)))
    for q, row in enumerate(steps.rows()):
        pending = rows[last_step[rows] <= q]
        nothing = np.zeros((len(pending), 1))
        _apply_to_rows(call.rule, pending, nothing, arrays, row, _state_store(call, t))
    last_step[rows] = steps.recorded


def _state_store(call: Call, t: int) -> StoreState:
    """Make the function that stores the states of a parameter."""

    def nearest(k: int, array: np.ndarray, values: np.ndarray, rows: np.ndarray | None, row: Any) -> None:
        array[...] = _as_stored(array, values)

    def stochastic(k: int, array: np.ndarray, values: np.ndarray, rows: np.ndarray | None, row: Any) -> None:
        elements = np.arange(array.size).reshape(array.shape)
        if rows is not None:
            elements = rows[:, None] * array.shape[1] + np.arange(array.shape[1])
        key = rounding.key_of(*np.asarray(row)[-2:], call.scan.addresses[t, TENSOR_ID])
        array[...] = rounding.rounded(values, array.dtype, elements, key, k)

    return stochastic if call.state_storage.endswith(STOCHASTIC) else nearest


def _as_stored(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values from which an array rounds as the kernels do: half precision is made from float32."""
    return values if array.dtype == np.float64 else values.astype(np.float32)


def _apply_to_rows(
    rule: Rule, rows: np.ndarray, values: np.ndarray, arrays: Sequence[Any], row: Any, store_state: StoreState
) -> None:
    """Apply a rule to some rows of a parameter, each of which has a row of `values` for its gradient."""
    whole = [None if array is None else _as_matrix(array) for array in arrays]
    parts = [None if array is None else array[rows] for array in whole]
    grad = np.broadcast_to(values, parts[0].shape)  # type: ignore[union-attr]
    _apply(rule, grad, parts, row, store_state, rows)
    for array, part in zip(whole, parts, strict=True):
        if array is not None:
            array[rows] = part


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


def _apply(
    rule: Rule,
    grad: Any,
    arrays: Sequence[Any],
    row: Any,
    store_state: StoreState,
    rows: np.ndarray | None = None,
) -> None:
    """Apply a rule to arrays: the weight, its states and perhaps its model weight change in place.

    They may be some `rows` of the parameter's.
    """
    weight, *rest = arrays
    real = compute_dtype(weight.dtype).type
    with np.errstate(all="ignore"):
        c = tuple(np.asarray(row)[: rule.row_length()].astype(real))
        w, *state = (array.astype(real) for array in (weight, *rest[: rule.n_state]))
        g = prepare(grad.astype(real), w, *c[:3])
        width = max(1, g.shape[-1]) if rule.per_row else 1
        reduced = (np.sum(np.square(g), axis=1, keepdims=True) / real(width),) if rule.per_row else ()
        new, *states = rule.function(w, g, *state, *reduced, *c[3:])
        for array in (weight, *rest[rule.n_state :]):
            if array is not None:
                array[...] = _as_stored(array, new)
        for k, (array, values) in enumerate(zip(rest, states, strict=False)):
            store_state(k, array, values, rows, row)
