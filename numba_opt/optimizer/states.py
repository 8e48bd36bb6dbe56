"""The states of parameters, and the arrays of a call in the order that kernels take them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import device
from ..compiler import rounding
from ..core.call import Arrays
from ..core.rates import HasRates, Index
from ..core.storage import OF_NAME, STOCHASTIC, is_half, state_dtype


class HasStates(HasRates):
    """The part of an optimizer that makes states, and finds them again in what a caller gives."""

    multi_precision: bool
    sparse_update: str
    state_dtype: str | None

    _deferred: dict[Index, Any]  # the steps that rows of parameters have yet to take

    @property
    def state_storage(self) -> str:
        """Code of the states' storage in layouts; empty: stored as their weight."""
        if self.state_dtype is None:
            return ""
        code = OF_NAME[self.state_dtype]
        return code + STOCHASTIC if self.stochastic_rounding and code != "f32" else code

    def create_state(self, index: Index, weight: Any) -> Any:
        """Make the states of one parameter, all zero: None, an array, or a tuple of arrays.

        Parameters
        ----------
        index : int
            The parameter's index.
        weight : array
            The parameter. States have its shape, or ``(rows, 1)`` where `per_row` is set, and its dtype, or
            `state_dtype` if that is given.
        """
        what = f"weight of {self.parameter_label(index)}"
        if self.rule is not None:
            self.checked_rule()  # whose states they are
        made, like = device.arrays_for(weight), device.look_at(weight, what)
        shape = like.shape
        if self.per_row:
            if len(shape) != 2:
                raise ValueError(f"{what} has shape {shape}; expected 2 dimensions")
            shape = (shape[0], 1)
        dtype = state_dtype(self.state_storage, like.dtype)
        zeros = tuple(made.zeros_like(weight, shape, dtype) for _ in self.state_names)
        state = zeros if len(zeros) > 1 else zeros[0] if zeros else None
        if self.sparse_update == "exact":
            self._deferred.pop(index, None)  # a new state owes no steps
            return state, made.zeros_like(weight, like.shape[:1] or (1,), np.dtype(np.int64))
        return state

    def create_state_multi_precision(self, index: Index, weight: Any) -> Any:
        """Make the states, or ``(float32 weight, its states)`` for half precision with `multi_precision`."""
        what = f"weight of {self.parameter_label(index)}"
        dtype = device.look_at(weight, what).dtype
        if is_half(dtype):
            if self.multi_precision:
                master_weight = device.arrays_for(weight).as_single(weight, what)
                return master_weight, self.create_state(index, master_weight)
            what = "states" if self.state_dtype is None else "weights"
            warnings.warn(
                f"{what} in {dtype} can make training inaccurate or slow to converge; "
                "multi_precision=True keeps float32 copies",
                stacklevel=2,
            )
        return self.create_state(index, weight)

    def call_arrays(
        self,
        indices: Sequence[Index],
        weights: Sequence[Any],
        grads: Sequence[Any],
        states: Sequence[Any],
        masters: bool,
        fused: bool = True,
    ) -> Arrays:
        """The arrays of a call in the order that kernels take them, its caller's lists left as they are."""
        rule = self.checked_rule()  # is in order, or states could not be told from what they should be
        model_weights: list[list[Any]] = []
        last_steps: dict[int, Any] = {}
        if masters:
            weights, states, column = self._masters(indices, weights, states)
            model_weights.append(column)
        if self.sparse_update == "exact":
            for index, state in zip(indices, states, strict=True):
                if not (isinstance(state, (tuple, list)) and len(state) == 2):
                    given = type(state).__name__
                    raise TypeError(
                        f"state of {self.parameter_label(index)} is {given}; expected (state, last_step)"
                    )
            last_steps = {t: state[1] for t, state in enumerate(states)}
            states = [state[0] for state in states]
        columns = [*map(tuple, (grads, weights, *self._state_columns(indices, states), *model_weights))]
        return Arrays(
            columns,
            rule,
            self.state_names,
            lambda t: self.parameter_label(indices[t]),
            self.state_storage,
            self.tensor_ids(indices),
            self.sparse_update,
            last_steps,
            fused=fused,
        )

    def tensor_ids(self, indices: Sequence[Index]) -> tuple[int, ...]:
        """Return numbers that tell parameters apart where states are rounded stochastically; else none."""
        if not self.stochastic_rounding:
            return ()
        plain = [int(i) if isinstance(i, (int, np.integer)) else repr(i) for i in indices]
        return tuple(map(rounding.tensor_number, plain))

    def with_deferred(self, arrays: Arrays, indices: Sequence[Index]) -> Arrays:
        """Return the arrays with the steps that rows have yet to take, for parameters whose rows catch up."""
        if not arrays.last_steps:
            return arrays
        length, known = self.coefficient_row_length(), self._deferred
        deferred = {
            t: device.deferred_steps(known.get(indices[t]), arrays.weights[t], length, arrays.label(t))
            for t in arrays.last_steps
        }
        known.update({indices[t]: steps for t, steps in deferred.items()})
        return arrays._replace(deferred=deferred)

    def has_deferred(self) -> bool:
        """Tell whether rows of any parameter have yet to take steps."""
        return any(steps.recorded for steps in list(self._deferred.values()))

    def counting_from(self, counts: dict[Index, int]) -> list[partial[Any]]:
        """Return calls that set the counts of parameters' updates, with no row that has yet to take steps."""
        return [
            partial(setattr, self, "_counts", counts),
            partial(setattr, self, "_counted_groups", ()),
            partial(self._deferred.clear),
        ]

    def deferred_rows(self) -> list[list[Any]]:
        """Return indices of parameters with rows that have yet to take steps, and the steps' coefficients."""
        return [[index, steps.rows()] for index, steps in self._deferred.items() if steps.recorded]

    def deferring(self, deferred: dict[Index, Any]) -> list[partial[Any]]:
        """Return the calls after which rows of some parameters have yet to take these steps."""
        return [partial(setattr, self, "_deferred", deferred)]

    def deferred_of(self, indices: Sequence[Index]) -> list[Any]:
        """Return the steps that rows of some parameters have yet to take; None where there are none."""
        return list(map(self._deferred.get, indices))

    def _masters(
        self, indices: Sequence[Index], weights: Sequence[Any], states: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Master weights in place of half-precision ones, their states, and those weights, or None."""
        columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for index, weight, state in zip(indices, weights, states, strict=True):
            label = self.parameter_label(index)
            own: tuple[Any, ...] = (weight, state, None)
            if is_half(device.look_at(weight, f"weight of {label}").dtype):
                if not (isinstance(state, (tuple, list)) and len(state) == 2):
                    given = type(state).__name__
                    raise TypeError(f"state of {label} is {given}; expected (float32 weight, state)")
                own = (*state, weight)
            for column, value in zip(columns, own, strict=True):
                column.append(value)
        return columns

    def _state_columns(self, indices: Sequence[Index], states: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """The parameters' states as one column for each of the optimizer's states."""
        n = len(self.state_names)
        if n == 1:
            return (states,)
        for index, state in zip(indices, states, strict=True):
            if n == 0 and state is not None:
                raise TypeError(
                    f"state of {self.parameter_label(index)} is {type(state).__name__}; expected None"
                )
            if n > 1 and not (isinstance(state, (tuple, list)) and len(state) == n):
                raise TypeError(
                    f"state of {self.parameter_label(index)} is {type(state).__name__}; "
                    f"expected a tuple of {n} arrays: {', '.join(self.state_names)}"
                )
        return tuple(zip(*states, strict=True)) if n and states else ((),) * n


def check_lengths(indices: Any, *lists: Any) -> None:
    """Refuse lists of a call that are none, or of different lengths, and indices that come twice."""
    for name, values in zip(("indices", "weights", "grads", "states"), (indices, *lists), strict=True):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(values).__name__}")
        if len(values) != len(indices):
            raise ValueError(f"{name} has length {len(values)}; expected {len(indices)}, as indices")
    try:
        different = len(set(indices))
    except TypeError as error:
        raise TypeError(f"indices must be hashable, got {indices!r}") from error
    if different != len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise ValueError(f"indices must be all different, got {twice!r} more than once")
