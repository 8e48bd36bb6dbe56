"""The reader of the CPU: arrays as their caller has them become a call, or an error says why not.

Kernels work on raw addresses, so this is the border where memory safety is decided. Plain NumPy arrays are
read in bulk (`numba_opt.cpu.ndarray`), anything else is looked at one by one (`numba_opt.cpu.arrays`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.call import Arrays, Call, Scan, blank, go_together, tables
from ..core.columns import GRAD, TENSOR_ID, WEIGHT
from . import ndarray
from .arrays import as_array, check_last_step, one_by_one, scan_of
from .row_sparse import is_sparse
from .touched import touched_rows


def read(arrays: Arrays) -> Call:
    """Read the arrays of a call, sparse gradients and all, and check them.

    Raises
    ------
    TypeError
        Something is not an array, or of a dtype that no kernel takes.
    ValueError
        Shapes or dtypes differ, something cannot be written, or arrays share memory.
    """
    arrays = _take_sparse(arrays)
    call = read_dense(arrays)
    for t, steps in call.deferred.items():
        last_step, touched = call.last_steps[t], call.touched.get(t)
        seen = last_step if touched is None else last_step[touched.rows]
        if seen.size and not 0 <= seen.min() <= seen.max() <= steps.recorded:
            raise ValueError(
                f"last_step of {arrays.label(t)} goes from {seen.min()} to {seen.max()}; "
                f"expected 0 to {steps.recorded}, the steps recorded"
            )
    return call


def read_dense(arrays: Arrays) -> Call:
    """Read the arrays of a call whose sparse gradients, if any, have been taken out and looked at."""
    columns: Any = arrays.columns
    replaced: Any = ()
    scan = ndarray.read(columns, arrays.n_state, arrays.rule.per_row) if ndarray.readable() else None
    if scan is None or not _in_order(scan, arrays):
        columns, replaced = one_by_one(arrays)
        scan = scan_of(columns)
    if arrays.tensor_ids:
        scan.addresses[:, TENSOR_ID] = arrays.tensor_ids
    touched = {t: rows for t, rows in arrays.touched.items() if rows is not None}
    return Call(
        arrays.rule,
        scan,
        tables(scan, arrays.n_state, arrays.state_storage),
        arrays.state_storage,
        columns,
        replaced,
        touched,
        arrays.last_steps,
        arrays.deferred,
    )


def _in_order(scan: Scan, arrays: Arrays) -> bool:
    """Tell whether kernels take these arrays together and none that is written shares memory with another."""
    if not go_together(scan, arrays.n_state, arrays.state_storage, arrays.touched):
        return False
    for t, last_step in arrays.last_steps.items():
        shape = arrays.columns[WEIGHT][t].shape[:1] or (1,)
        check_last_step(last_step, f"last_step of {arrays.label(t)}", shape)
    read = [array for rows in arrays.touched.values() if rows is not None for array in rows.arrays()]
    return not ndarray.overlapping(scan, read, list(arrays.last_steps.values()))


def _take_sparse(arrays: Arrays) -> Arrays:
    """Return the arrays without sparse gradients, and with what these touch."""
    given = arrays.columns[GRAD]
    if set(map(type, given)) <= {np.ndarray}:  # most calls have nothing else
        return arrays
    grads, touched = list(given), dict(arrays.touched)
    for t, grad in enumerate(given):
        if is_sparse(grad):
            weight = as_array(arrays.weights[t], f"weight of {arrays.label(t)}")
            rows = touched_rows(grad, weight, f"gradient of {arrays.label(t)}")
            if arrays.sparse_update == "dense":
                grads[t] = rows.dense(weight)
            else:
                grads[t], touched[t] = None, rows
    return arrays.with_grads(grads)._replace(touched=touched)


class PlainReader:
    """Reads plain NumPy arrays from step to step, and knows what has changed.

    It holds addresses and no arrays: every call reads them anew from the array objects that it is given.
    """

    def __init__(self) -> None:
        self.scan = blank(0, 0)
        self._known = False  # whether the scan is one of arrays that were in order
        self._form: tuple[Any, ...] = ()
        self._kept: Arrays | None = None

    def look(self, arrays: Arrays, grads: Sequence[Any], ids: np.ndarray | None) -> int:
        """Return SAME, MOVED, CHANGED, or UNSUPPORTED if it takes a closer look; `ids` are the objects'."""
        if not (grads and arrays.fused and not arrays.last_steps and ndarray.readable()):
            return ndarray.UNSUPPORTED
        known, self._known = self._known, False  # nothing is known if an exception comes in between
        if arrays is not self._kept and not self._is_like_before(arrays):
            known = False
        if ids is None:
            ids, self._kept = ndarray.objects([grads, *arrays.columns[1:]]), None
        else:  # whoever has them keeps the arrays anyway
            self._kept = arrays
        n_state, storage = arrays.n_state, arrays.state_storage
        answer = ndarray.scan(ids, ndarray.known(), ndarray.NONE, n_state, arrays.rule.per_row, *self.scan)
        if answer == ndarray.UNSUPPORTED:
            return answer
        if not (known and answer == ndarray.SAME):
            if not known or answer == ndarray.CHANGED:
                answer = ndarray.CHANGED
                if not go_together(self.scan, n_state, storage, {}):
                    return ndarray.UNSUPPORTED
            if ndarray.overlapping(self.scan):
                return ndarray.UNSUPPORTED
        self._known = True
        return answer

    def _is_like_before(self, arrays: Arrays) -> bool:
        """Tell whether the scan is one of as many arrays of the same kinds; else make it anew."""
        columns, tensors = len(arrays.columns), len(arrays.weights)
        form = (columns, tensors, arrays.rule, arrays.state_storage, arrays.tensor_ids)
        if form == self._form:
            return True
        self.scan, self._form = blank(columns, tensors), form
        if arrays.tensor_ids:
            self.scan.addresses[:, TENSOR_ID] = arrays.tensor_ids
        return False

    def call(self, arrays: Arrays) -> Call:
        """Make a call, which keeps nothing alive, of what the last look has found."""
        found = tables(self.scan, arrays.n_state, arrays.state_storage)
        return Call(arrays.rule, self.scan, found, arrays.state_storage)
