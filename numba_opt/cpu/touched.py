"""The rows of a parameter that sparse gradients touch, and where the parts of each one are.

Each row that is touched takes a step; how its numbers come about, from a block of rows with duplicates or
from entries of a CSR matrix, is left to the kernel, which sums a row's parts just before it needs them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..core.storage import TouchedForm, code_of, compute_dtype
from . import merge
from .csr import as_csr, check_numbers, csr_rows
from .row_sparse import RowSparse, check_block, check_shape


class TouchedRows(NamedTuple):
    """The rows that a gradient touches, as the kernel takes them; it keeps the arrays alive."""

    form: TouchedForm
    data: np.ndarray
    rows: np.ndarray  # the touched ones, once each, in order
    starts: np.ndarray | None  # of each touched row's parts among the places, and the end
    places: np.ndarray | None  # of the parts: rows of the block, or columns
    given: np.ndarray | None = None  # the caller's own row numbers, where they lie in one piece

    @property
    def lines(self) -> int:
        """Number of rows' worth of work: a block's parts, or touched rows."""
        if self.form.kind == "block" and self.places is not None:
            return len(self.places)
        return len(self.rows)

    def arrays(self) -> list[np.ndarray]:
        """All arrays that nothing may be written to: those that a kernel reads, and the caller's."""
        return [a for a in (self.data, self.rows, self.starts, self.places, self.given) if a is not None]

    def summed(self, weight: np.ndarray) -> np.ndarray:
        """Return the sum of each touched row's parts, in the weight's precision."""
        dense = np.zeros((len(self.rows), math.prod(weight.shape[1:])), compute_dtype(weight.dtype))
        with np.errstate(all="ignore"):
            if self.starts is None:
                dense[...] = self.data.reshape(dense.shape)
                return dense
            k = np.repeat(np.arange(len(self.rows)), np.diff(self.starts))
            places: Any = self.places
            if self.form.kind == "block":
                np.add.at(dense, k, self.data.reshape(len(k), -1)[places].astype(dense.dtype))
            else:
                np.add.at(dense, (k, places[: len(k)]), self.data[: len(k)].astype(dense.dtype))
        return dense

    def dense(self, weight: np.ndarray) -> np.ndarray:
        """The gradient as an array like its weight."""
        values = self.summed(weight)
        dense = np.zeros((weight.shape[0], values.shape[1]), weight.dtype)
        dense[self.rows] = values
        return dense.reshape(weight.shape)


def touched_rows(grad: Any, weight: np.ndarray, what: str) -> TouchedRows:
    """Return the rows that a sparse gradient touches; every number in it is checked.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, what is wrong and where it is first wrong.
    """
    check_shape(grad, weight, what)
    if isinstance(grad, RowSparse):
        check_block(grad.rows, grad.values, grad.shape, what)
        values = _readable(grad.values)
        return by_row(values, code_of(values.dtype), grad.rows, grad.shape[0], what)
    found = csr_rows(as_csr(grad, what), what, *grad.shape)
    data = _readable(found.data)
    code = code_of(data.dtype)
    if found.even:
        return TouchedRows(TouchedForm("block", code), data, found.rows, None, None)
    return TouchedRows(TouchedForm("csr", code), data, found.rows, found.starts, found.columns)


def by_row(values: np.ndarray, code: str, numbers: np.ndarray, height: int, what: str) -> TouchedRows:
    """A block of rows, stored as `code` says, and the numbers of the rows they belong to."""
    given = numbers if numbers.flags.c_contiguous else None
    numbers = np.array(numbers)  # what is looked at is what is used, whoever changes the caller's meanwhile
    if len(numbers) != len(values):
        raise ValueError(f"rows of {what} have length {len(numbers)}; expected {len(values)}, as the values")
    rows = numbers.astype(np.int64, copy=False)
    form = TouchedForm("block", code)
    order = merge.look(rows, height)
    if order == merge.GOOD:
        return TouchedRows(form, values, rows, None, None, given)
    if order == merge.BAD:
        check_numbers(numbers, f"rows of {what}", height)
    touched, starts, places = merge.group(rows, height)
    return TouchedRows(form, values, touched, starts, places, given)


def _readable(values: np.ndarray) -> np.ndarray:
    """Values as the kernel can read them."""
    if not code_of(values.dtype):
        values = values.astype(np.float64)
    return np.require(values, requirements=["C", "A"])
