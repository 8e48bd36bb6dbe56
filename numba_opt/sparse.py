"""Sparse gradients: `RowSparse`, what a CSR matrix becomes, and the table that the kernel for rows takes.

A sparse gradient says which rows of a parameter it touches, and each of those takes a step; how a row's
numbers come about, from a block of rows with duplicates or from entries of a CSR matrix, is left to the
kernel, which sums a row's parts just before it needs them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import device
from .kernels import merge

__all__ = ["RowSparse"]


class RowSparse:
    """A gradient that is zero but for some rows.

    Parameters
    ----------
    rows : array of int, shape (n,)
        Row numbers, in any order; those that come more than once are summed.
    values : array, shape (n, ...)
        The rows, of any floating-point dtype.
    shape : tuple of int
        The shape of the whole.

    Raises
    ------
    TypeError, ValueError
        `rows` are not whole numbers within the shape, or `values` does not fit.

    Examples
    --------
    >>> import numpy as np, numba_opt
    >>> grad = numba_opt.RowSparse([2, 0, 2], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], (4, 2))
    >>> grad
    RowSparse of shape (4, 2): 3 rows, float64
    >>> grad.to_dense()
    array([[2., 2.],
           [0., 0.],
           [4., 4.],
           [0., 0.]])
    >>> weight = np.ones((4, 2))
    >>> optimizer = numba_opt.GroupAdaGrad(learning_rate=0.5)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update([0], [weight], [grad], [state])
    >>> weight.round(3)
    array([[0.5, 0.5],
           [1. , 1. ],
           [0.5, 0.5],
           [1. , 1. ]])
    """

    def __init__(self, rows: Any, values: Any, shape: Sequence[int]) -> None:
        self.rows = np.asarray(rows)
        if self.rows.size == 0 and not isinstance(rows, np.ndarray):
            self.rows = self.rows.astype(np.int64)
        self.values = np.asarray(values)
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"shape must be of at least one dimension, none negative, got {shape!r}")
        _check_block(self, "RowSparse")

    @classmethod
    def from_csr(cls, matrix: Any) -> RowSparse:
        """The rows of a CSR matrix that hold an entry; duplicate entries are summed."""
        parts = _csr_parts(matrix, "matrix")
        rows, dense = parts.summed(np.zeros((0, matrix.shape[1]), matrix.dtype))
        return cls(rows, dense.astype(matrix.dtype, copy=False), matrix.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def to_dense(self) -> np.ndarray:
        """The gradient as an ordinary array."""
        dense = np.zeros(self.shape, self.dtype)
        np.add.at(dense, self.rows, self.values)
        return dense

    def coalesce(self) -> RowSparse:
        """The same with each row once, in order."""
        rows, inverse = np.unique(self.rows, return_inverse=True)
        values = np.zeros((len(rows), *self.shape[1:]), self.dtype)
        np.add.at(values, inverse, self.values)
        return RowSparse(rows, values, self.shape)

    def __repr__(self) -> str:
        return f"RowSparse of shape {self.shape}: {len(self.rows):,} rows, {self.dtype}"


class Parts(NamedTuple):
    """What the kernel needs to know of a gradient; it keeps the arrays alive."""

    form: str
    data: np.ndarray
    rows: np.ndarray  # the touched ones, once each, in order
    starts: np.ndarray | None  # of each touched row's parts among the places, and the end
    places: np.ndarray | None  # of the parts: rows of the block, or columns

    def arrays(self) -> list[np.ndarray]:
        """All arrays whose addresses a kernel gets."""
        return [a for a in (self.data, self.rows, self.starts, self.places) if a is not None]

    def summed(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The touched rows and, for each of them, the sum of its parts in the weight's precision."""
        real = np.float64 if weight.dtype == np.float64 else np.float32
        dense = np.zeros((len(self.rows), math.prod(weight.shape[1:])), real)
        if self.starts is None:
            dense[...] = self.data.reshape(dense.shape)
            return self.rows, dense
        k = np.repeat(np.arange(len(self.rows)), np.diff(self.starts))
        places: Any = self.places
        if self.form.startswith("block"):
            np.add.at(dense, k, self.data.reshape(len(k), -1)[places].astype(real))
        else:
            np.add.at(dense, (k, places[: len(k)]), self.data[: len(k)].astype(real))
        return self.rows, dense


def is_sparse(grad: Any) -> bool:
    """Whether a gradient is one that this module deals with."""
    if isinstance(grad, RowSparse):
        return True
    scipy_sparse = sys.modules.get("scipy.sparse")
    return scipy_sparse is not None and scipy_sparse.issparse(grad)


def joined(sum_so_far: Any, grad: Any, weight: Any, what: str) -> Any:
    """A sum of gradients and one more, as a new array or as rows, which are summed when they are used."""
    weight = device.as_array(weight, what)
    parts_of(grad, weight, what)
    if not isinstance(grad, RowSparse):
        grad = RowSparse.from_csr(_as_csr(grad, what))
    if sum_so_far is None:
        return RowSparse(grad.rows.copy(), grad.values.copy(), grad.shape)
    if isinstance(sum_so_far, RowSparse):
        rows = np.concatenate([sum_so_far.rows, grad.rows])
        return RowSparse(rows, np.concatenate([sum_so_far.values, grad.values]), grad.shape)
    dense = sum_so_far.copy()
    np.add.at(dense, grad.rows, grad.values)
    return dense


def copied(grad: Any) -> Any:
    """A gradient that changing another one does not change."""
    return grad.copy() if isinstance(grad, np.ndarray) else grad


def as_dense(grad: Any) -> Any:
    """A gradient as an array."""
    return grad.to_dense() if isinstance(grad, RowSparse) else grad


def parts_of(grad: Any, weight: np.ndarray, what: str) -> Parts:
    """What a sparse gradient touches; every number in it is checked.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, what is wrong and where it is first wrong.
    """
    if grad.shape != weight.shape:
        raise ValueError(f"{what} has shape {grad.shape}; expected {weight.shape}, as the weight")
    if isinstance(grad, RowSparse):
        return _block_parts(grad, what)
    return _csr_parts(_as_csr(grad, what), what)


def _as_csr(grad: Any, what: str) -> Any:
    if grad.format == "csr":
        return grad
    warnings.warn(
        f"{what} is a scipy.sparse matrix of format {grad.format!r}, converted to CSR at each update, "
        "because rows are what is updated",
        stacklevel=2,
    )
    return grad.tocsr()


def _check_block(grad: RowSparse, what: str) -> None:
    """Refuse row numbers that are not whole numbers, and values of another shape."""
    rows, values = grad.rows, grad.values
    if rows.dtype.kind not in "iu":
        raise TypeError(f"rows of {what} are {rows.dtype}; expected integers")
    if rows.ndim != 1:
        raise ValueError(f"rows of {what} have shape {rows.shape}; expected one dimension")
    if values.dtype.kind != "f" and not device.is_half(values.dtype):
        raise TypeError(f"values of {what} are {values.dtype}; expected floating-point numbers")
    expected = (len(rows), *grad.shape[1:])
    if values.shape != expected:
        raise ValueError(f"values of {what} have shape {values.shape}; expected {expected}")
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= grad.shape[0]):
        k = int(np.flatnonzero((rows < 0) | (rows >= grad.shape[0]))[0])
        raise ValueError(f"rows of {what} hold {rows[k]} at position {k}; expected 0 to {grad.shape[0] - 1}")


def _block_parts(grad: RowSparse, what: str) -> Parts:
    _check_block(grad, what)
    values = _stored(grad.values)
    rows = np.ascontiguousarray(grad.rows, np.int64)
    form = f"block {device.code_of(values.dtype)}"
    if merge.look(rows, grad.shape[0]) == merge.GOOD:
        return Parts(form, values, rows, None, None)
    touched, starts, order = merge.group(rows, grad.shape[0])
    return Parts(form, values, touched, starts, order)


def _csr_parts(matrix: Any, what: str) -> Parts:
    data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
    height, width = matrix.shape
    for name, array in (("indices", indices), ("indptr", indptr)):
        if array.dtype not in (np.int32, np.int64):
            raise TypeError(f"{name} of {what} are {array.dtype}; expected int32 or int64")
    if data.dtype.kind != "f" and not device.is_half(data.dtype):
        raise TypeError(f"data of {what} are {data.dtype}; expected floating-point numbers")
    if len(indptr) != height + 1:
        raise ValueError(f"indptr of {what} has length {len(indptr)}; expected {height + 1}, rows and one")
    data, indices, indptr = _stored(data), np.ascontiguousarray(indices), np.ascontiguousarray(indptr)
    count = merge.look_csr(indptr, min(len(data), len(indices)))
    if count < 0:
        raise ValueError(_what_is_wrong(indptr, data, indices, what))
    rows, starts = merge.touched_csr(indptr, count)
    entries = int(indptr[-1])
    full = width > 0 and entries == count * width
    found = merge.look_columns(indices, entries, width, full)
    if found == merge.BAD:
        p = int(np.flatnonzero((indices < 0) | (indices >= width))[0])
        raise ValueError(f"indices of {what} hold {indices[p]} at position {p}; expected 0 to {width - 1}")
    code = device.code_of(data.dtype)
    if found == merge.GOOD:
        return Parts(f"block {code}", data, rows, None, None)
    return Parts(f"csr i{indices.itemsize} {code}", data, rows, starts, indices)


def _what_is_wrong(indptr: np.ndarray, data: np.ndarray, indices: np.ndarray, what: str) -> str:
    if indptr[0] != 0:
        return f"indptr of {what} begins with {indptr[0]}; expected 0"
    back = np.flatnonzero(np.diff(indptr) < 0)
    if len(back):
        k = int(back[0]) + 1
        return f"indptr of {what} falls from {indptr[k - 1]} to {indptr[k]} at position {k}"
    held = f"data holds {len(data)} and indices {len(indices)}"
    return f"indptr of {what} ends with {indptr[-1]} entries, but {held}"


def _stored(values: np.ndarray) -> np.ndarray:
    """Values as the kernel can read them."""
    if not device.code_of(values.dtype):
        values = values.astype(np.float64)
    return np.require(values, requirements=["C", "A"])
