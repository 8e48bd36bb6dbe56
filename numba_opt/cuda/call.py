"""The reader of GPUs: arrays as their caller has them become a call for each device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

from ..core.call import Arrays, Call
from ..core.columns import GRAD, WEIGHT
from ..cpu.reader import read_dense
from .arrays import View, address_of, look
from .touched import DeviceTouchedRows, arrays_of, is_sparse, touched_rows


class DeviceCall(NamedTuple):
    """The arrays of a call that are on one device. In the call, NumPy arrays stand for them."""

    device: int
    members: list[int]  # positions of what is there
    call: Call
    made_on: set[int] = set()  # streams on which arrays are said to be in the making


def read(arrays: Arrays) -> list[DeviceCall]:
    """Read the arrays of a call, all of it checked, by device.

    Raises
    ------
    TypeError, ValueError
        As `numba_opt.cpu.reader.read`; or an array is on the host, or on another device than its weight.
    """
    arrays, given = _take_sparse(arrays)
    views = _views(arrays)
    touched: dict[int, DeviceTouchedRows] = {}
    for t, grad in given.items():
        weight = views[WEIGHT][t]
        assert weight is not None
        touched[t] = touched_rows(grad, weight, f"gradient of {arrays.label(t)}", arrays.sparse_update)
    last_steps = {t: look(array, f"last_step of {arrays.label(t)}") for t, array in arrays.last_steps.items()}
    for t, view in last_steps.items():
        _check_device(view, views[WEIGHT][t], f"last_step of {arrays.label(t)}")
    arrays = arrays._replace(
        touched={**arrays.touched, **touched},
        last_steps={t: view.shadow for t, view in last_steps.items()},
    )
    where = [view.device for view in views[WEIGHT] if view is not None]
    calls = []
    for device in sorted(set(where)):
        members = [t for t, place in enumerate(where) if place == device]
        held = [found for column in views for t in members if (found := column[t]) is not None]
        held += [found for t in members if t in touched for found in touched[t].views]
        held += [last_steps[t] for t in members if t in last_steps]
        call = read_dense(_part(arrays, views, members))
        calls.append(DeviceCall(device, members, call, {found.stream for found in held if found.stream}))
    return calls


def _take_sparse(arrays: Arrays) -> tuple[Arrays, dict[int, Any]]:
    """Return the arrays without sparse gradients, and those gradients by position."""
    given = arrays.columns[GRAD]
    sparse = {t: grad for t, grad in enumerate(given) if is_sparse(grad)}
    rest = [None if t in sparse else grad for t, grad in enumerate(given)]
    return arrays.with_grads(rest)._replace(touched={**arrays.touched, **dict.fromkeys(sparse)}), sparse


def _views(arrays: Arrays) -> list[list[View | None]]:
    """Return the views of all arrays of a call, each one where its weight is."""
    names = arrays.names()
    views = [
        [
            None if value is None and arrays.may_lack(c, t) else look(value, f"{name} of {arrays.label(t)}")
            for t, value in enumerate(column)
        ]
        for c, (name, column) in enumerate(zip(names, arrays.columns, strict=True))
    ]
    for name, column in zip(names, views, strict=True):
        for t, (view, weight) in enumerate(zip(column, views[WEIGHT], strict=True)):
            if view is not None:
                _check_device(view, weight, f"{name} of {arrays.label(t)}")
    return views


def _check_device(view: View, weight: View | None, what: str) -> None:
    """Refuse an array that is not where its weight is."""
    if weight is not None and view.device != weight.device and view.shadow.size:
        raise ValueError(
            f"{what} is on CUDA device {view.device}; expected device {weight.device}, as the weight"
        )


def _part(arrays: Arrays, views: list[list[View | None]], members: list[int]) -> Arrays:
    """The arrays at some positions, with what stands for them."""

    def own(given: Any) -> dict[int, Any]:
        return {k: given[t] for k, t in enumerate(members) if t in given}

    return arrays._replace(
        columns=[[None if (v := column[t]) is None else v.shadow for t in members] for column in views],
        label=lambda k: arrays.label(members[k]),
        tensor_ids=tuple(arrays.tensor_ids[t] for t in members) if arrays.tensor_ids else (),
        touched=own(arrays.touched),
        last_steps=own(arrays.last_steps),
        deferred=own(arrays.deferred),
    )


# ---------------------------------------------------------------- from step to step


class SeenColumn:
    """The arrays of a column, by their objects and addresses; none is kept alive by it."""

    def __init__(self, column: Sequence[Any]) -> None:
        self._gone: list[Any] = []
        self._read = _reader(column)
        self._ids, self._places = list(map(id, column)), list(map(self._read, column))
        whole = column if self._read in READERS else _all_arrays(column)
        self._refs = [weakref.ref(value, self._gone.append) for value in whole]

    def same(self, column: Sequence[Any]) -> bool:
        """Tell whether these are the same arrays, where they were."""
        if self._gone or list(map(id, column)) != self._ids:
            return False
        return list(map(self._read, column)) == self._places


def _reader(column: Sequence[Any]) -> Callable[[Any], Any]:
    """Return the function that says most quickly where each of these arrays is."""
    for read_place in READERS:
        with suppress(AttributeError):  # one of them is not of that library
            list(map(read_place, column))
            return read_place
    return _place_of


def _interface_address(array: Any) -> int:
    return array.__cuda_array_interface__["data"][0]


# Of PyTorch, of CuPy, of others.
READERS = methodcaller("data_ptr"), attrgetter("data.ptr"), _interface_address


def _all_arrays(column: Sequence[Any]) -> Iterator[Any]:
    """All arrays of a column, and sparse gradients with theirs."""
    for value in column:
        if value is not None:
            yield value
            if is_sparse(value):
                yield from arrays_of(value)


def _place_of(value: Any) -> Any:
    """Return the address of an array, or the ids and addresses of those that a sparse gradient is made of."""
    if value is None:
        return 0
    if is_sparse(value):
        return [(id(array), address_of(array)) for array in arrays_of(value)]
    return address_of(value)
