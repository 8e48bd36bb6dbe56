"""Sparse gradients: `RowSparse`, what a CSR matrix becomes, and the table that the kernel for rows takes.

A sparse gradient says which rows of a parameter it touches, and each of those takes a step; how a row's
numbers come about, from a block of rows with duplicates or from entries of a CSR matrix, is left to the
kernel, which sums a row's parts just before it needs them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arguments, device
from ..cuda import arrays as cuda_arrays
from . import loops as cpu
from . import merge, threads

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
    distinct : bool, default False
        Whether no row comes more than once. On the CPU that is found out. On a GPU it is believed, and saves
        the sorting of row numbers.

    `rows` and `values` may both be on a GPU. What numbers there are in `rows` is not looked at then, as the
    host would have to wait: those that are no rows of the parameter are left out.

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

    def __init__(self, rows: Any, values: Any, shape: Sequence[int], distinct: bool = False) -> None:
        self.on_cuda = device.on_cuda(rows) and device.on_cuda(values)
        self.distinct = bool(distinct)
        self.rows, self.values = rows, values
        if not self.on_cuda:
            self.rows = _as_numpy(rows, "rows of RowSparse")
            if self.rows.size == 0 and not isinstance(rows, np.ndarray):
                self.rows = self.rows.astype(np.int64)
            self.values = _as_numpy(values, "values of RowSparse")
        try:
            self.shape = tuple(arguments.count("shape", n, 0) for n in shape)
        except TypeError as error:
            raise TypeError(f"shape must be a tuple of whole numbers, got {shape!r}") from error
        if not self.shape:
            raise ValueError(f"shape must be of at least one dimension, got {shape!r}")
        if self.on_cuda:
            check_block(*self._looked_at(), self.shape, "RowSparse")
        else:
            check_block(self.rows, self.values, self.shape, "RowSparse")
            check_numbers(self.rows, "rows of RowSparse", self.shape[0])

    def _looked_at(self) -> tuple[np.ndarray, np.ndarray]:
        """NumPy arrays like the rows and the values; if those are on a GPU, they stand for them only."""
        if not self.on_cuda:
            return self.rows, self.values
        look_at = cuda_arrays.look_at
        return look_at(self.rows, "rows of RowSparse"), look_at(self.values, "values of RowSparse")

    def to_host(self) -> RowSparse:
        """The same with NumPy arrays: itself, or a copy of what is on a GPU, for which the host waits."""
        if not self.on_cuda:
            return self
        to_host = cuda_arrays.to_host
        rows, values = to_host(self.rows, "rows of RowSparse"), to_host(self.values, "values of RowSparse")
        return RowSparse(rows, values, self.shape)

    @classmethod
    def from_csr(cls, matrix: Any, what: str = "matrix") -> RowSparse:
        """The rows of a CSR matrix that hold an entry; duplicate entries are summed.

        `what` is what errors call it.
        """
        if getattr(matrix, "format", None) != "csr":
            raise TypeError(f"{what} must be a scipy.sparse CSR matrix, got {type(matrix).__name__}")
        parts = _csr_parts(matrix, what)
        kept = matrix.dtype if device.code_of(matrix.dtype) else np.float64
        rows, dense = parts.summed(np.zeros((0, matrix.shape[1]), kept))
        return cls(rows, dense.astype(matrix.dtype, copy=False), matrix.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self._looked_at()[1].dtype

    def to_dense(self) -> np.ndarray:
        """The gradient as an ordinary NumPy array."""
        if self.on_cuda:
            return self.to_host().to_dense()
        dense = np.zeros(self.shape, self.dtype)
        np.add.at(dense, self.rows, self.values)
        return dense

    def coalesce(self) -> RowSparse:
        """The same with each row once, in order, as NumPy arrays."""
        if self.on_cuda:
            return self.to_host().coalesce()
        rows, inverse = np.unique(self.rows, return_inverse=True)
        values = np.zeros((len(rows), *self.shape[1:]), self.dtype)
        np.add.at(values, inverse, self.values)
        return RowSparse(rows, values, self.shape)

    def __repr__(self) -> str:
        return f"RowSparse of shape {self.shape}: {len(self._looked_at()[0]):,} rows, {self.dtype}"


def _as_numpy(given: Any, what: str) -> np.ndarray:
    """Numbers as a NumPy array; one of torch's tensors must have the memory that it says it has."""
    if isinstance(given, np.ndarray):
        return given
    tensor = device.loaded("torch", "Tensor")
    if tensor is not None and isinstance(given, tensor):
        return device.as_array(given, what)
    return np.asarray(given)


class Parts(NamedTuple):
    """What the kernel needs to know of a gradient; it keeps the arrays alive."""

    form: str
    data: np.ndarray
    rows: np.ndarray  # the touched ones, once each, in order
    starts: np.ndarray | None  # of each touched row's parts among the places, and the end
    places: np.ndarray | None  # of the parts: rows of the block, or columns
    given: np.ndarray | None = None  # the caller's own row numbers, where they lie in one piece

    @property
    def lines(self) -> int:
        """How many rows' worth of work there is: a block's parts, or touched rows."""
        grouped = self.form.startswith("block") and self.places is not None
        return len(self.places) if grouped else len(self.rows)  # type: ignore[arg-type]

    def arrays(self) -> list[np.ndarray]:
        """All arrays that nothing may be written to: those that a kernel reads, and the caller's."""
        return [a for a in (self.data, self.rows, self.starts, self.places, self.given) if a is not None]

    def summed(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The touched rows and, for each of them, the sum of its parts in the weight's precision."""
        real = np.float64 if weight.dtype == np.float64 else np.float32
        dense = np.zeros((len(self.rows), math.prod(weight.shape[1:])), real)
        with np.errstate(all="ignore"):
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
    issparse = device.loaded("scipy.sparse", "issparse")
    return issparse is not None and bool(issparse(grad))


def joined(sum_so_far: Any, grad: Any, weight: Any, what: str) -> Any:
    """A sum of gradients and one more, as a new array or as rows, which are summed when they are used."""
    weight = device.as_array(weight, what)
    check_shape(grad, weight, what)
    if not isinstance(grad, RowSparse):
        grad = RowSparse.from_csr(_as_csr(grad, what), what)
    check_block(grad.rows, grad.values, grad.shape, what)
    check_numbers(grad.rows, f"rows of {what}", grad.shape[0])
    with np.errstate(all="ignore"):
        rows, values = grad.rows.astype(np.int64), grad.values.astype(weight.dtype)
    if sum_so_far is None:
        return RowSparse(rows, values, grad.shape)
    if isinstance(sum_so_far, RowSparse):
        rows = np.concatenate([sum_so_far.rows, rows])
        return RowSparse(rows, np.concatenate([sum_so_far.values, values]), grad.shape)
    dense = sum_so_far.copy()
    np.add.at(dense, rows, values)
    return dense


def copied(grad: Any) -> Any:
    """A gradient that changing another one does not change."""
    return grad.copy() if isinstance(grad, np.ndarray) else grad


def as_plain(grad: Any) -> Any:
    """A sum of gradients as arrays and plain values."""
    if isinstance(grad, RowSparse):
        grad = grad.to_host()
        return {"rows": grad.rows, "values": grad.values, "shape": list(grad.shape)}
    return grad


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
    check_shape(grad, weight, what)
    if isinstance(grad, RowSparse):
        return _block_parts(grad, what)
    return _csr_parts(_as_csr(grad, what), what)


def check_shape(grad: Any, weight: np.ndarray, what: str) -> None:
    if tuple(grad.shape) != weight.shape:
        raise ValueError(f"{what} has shape {grad.shape}; expected {weight.shape}, as the weight")


def _as_csr(grad: Any, what: str) -> Any:
    """A scipy.sparse matrix as CSR. Its own conversion trusts its numbers, so they are checked first."""
    if grad.ndim != 2:
        raise ValueError(f"{what} is a sparse array of {grad.ndim} dimensions; expected 2")
    if grad.format == "csr":
        return grad
    warnings.warn(
        f"{what} is a scipy.sparse matrix of format {grad.format!r}, converted to CSR at each update, "
        "because rows are what is updated",
        stacklevel=arguments.outside(),
    )
    grad = copy.deepcopy(grad)  # whoever changes the caller's arrays does not change what has been checked
    height, width = grad.shape
    if grad.format == "coo":
        data = _plain(grad.data, f"data of {what}", "fV")
        for name, numbers, limit in (("row", grad.row, height), ("col", grad.col, width)):
            if len(_plain(numbers, f"{name} of {what}", "iu")) != len(data):
                raise ValueError(f"{name} of {what} has length {len(numbers)}; expected {len(data)}, as data")
            check_numbers(numbers, f"{name} of {what}", limit)
    elif grad.format == "csc":
        _check_compressed(grad, what, width, height)
    elif grad.format == "bsr":
        rows, columns = grad.blocksize
        _check_compressed(grad, what, height // rows, width // columns)
    return grad.tocsr()


def _plain(array: Any, what: str, kinds: str) -> np.ndarray:
    """An array that may be read as numbers of some kinds."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{what} is a {type(array).__name__}; expected a NumPy array without a mask")
    if array.dtype.kind not in kinds or (array.dtype.kind == "V" and not device.is_half(array.dtype)):
        expected = {"i": "int32 or int64", "iu": "integers"}.get(kinds, "floating-point numbers")
        raise TypeError(f"{what} are {array.dtype}; expected {expected}")
    return array


def check_numbers(numbers: np.ndarray, what: str, limit: int) -> None:
    """Refuse numbers outside 0 to `limit`, naming the first."""
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= limit):
        k = int(np.flatnonzero((numbers < 0) | (numbers >= limit))[0])
        raise ValueError(f"{what} hold {numbers[k]} at position {k}; expected 0 to {limit - 1}")


def check_block(rows: Any, values: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse row numbers that are not integers, and values of another shape."""
    rows = _plain(rows, f"rows of {what}", "iu")
    values = _plain(values, f"values of {what}", "fV")
    if rows.ndim != 1:
        raise ValueError(f"rows of {what} have shape {rows.shape}; expected one dimension")
    expected = (len(rows), *shape[1:])
    if values.shape != expected:
        raise ValueError(f"values of {what} have shape {values.shape}; expected {expected}")


def _block_parts(grad: RowSparse, what: str) -> Parts:
    check_block(grad.rows, grad.values, grad.shape, what)
    values = _stored(grad.values)
    return by_row(values, device.code_of(values.dtype), grad.rows, grad.shape[0], what)


def by_row(values: np.ndarray, code: str, numbers: np.ndarray, height: int, what: str) -> Parts:
    """A block of rows, stored as `code` says, and the numbers of the rows they belong to."""
    given = numbers if numbers.flags.c_contiguous else None
    numbers = np.array(numbers)  # what is looked at is what is used, whoever changes the caller's meanwhile
    if len(numbers) != len(values):
        raise ValueError(f"rows of {what} have length {len(numbers)}; expected {len(values)}, as the values")
    rows = numbers.astype(np.int64, copy=False)
    form = f"block {code}"
    order = merge.look(rows, height)
    if order == merge.GOOD:
        return Parts(form, values, rows, None, None, given)
    if order == merge.BAD:
        check_numbers(numbers, f"rows of {what}", height)
    touched, starts, order = merge.group(rows, height)
    return Parts(form, values, touched, starts, order, given)


def _csr_parts(matrix: Any, what: str) -> Parts:
    height, width = matrix.shape
    rows, starts, even, data, columns = _check_compressed(matrix, what, height, width)
    data = _stored(data)
    code = device.code_of(data.dtype)
    if even:
        return Parts(f"block {code}", data, rows, None, None)
    return Parts(f"csr {code}", data, rows, starts, columns)


def _check_compressed(
    matrix: Any, what: str, major: int, minor: int
) -> tuple[np.ndarray, np.ndarray, bool, np.ndarray, np.ndarray]:
    """Refuse numbers in a matrix by rows (or columns) that lead outside.

    Returns the rows that hold an entry, where each one's entries begin (and where the last one's end), all of
    them copies; whether all of these rows are full and their columns in order; and the entries and columns,
    as they were when they were looked at, unless somebody changes them meanwhile.
    """
    data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
    check_compressed(data, indices, indptr, major, what, 3 if matrix.format == "bsr" else 1)
    available = min(len(data), len(indices))
    bad, full, rows, starts = merge.rows_of_csr(np.ascontiguousarray(indptr), available, minor)
    if bad:
        raise ValueError(_what_is_wrong(indptr, data, indices, what))
    entries = int(starts[-1])
    used = np.ascontiguousarray(indices[:entries])
    order = _look_at_columns(used, minor)
    if order == merge.BAD:
        check_numbers(used, f"indices of {what}", minor)
    return rows, starts, full and order == merge.GOOD, data[:entries], used


def check_compressed(data: Any, indices: Any, indptr: Any, major: int, what: str, ndim: int = 1) -> None:
    """Refuse what cannot be the arrays of a matrix by rows (or columns); their numbers are not looked at."""
    _plain(data, f"data of {what}", "fV")
    for name, array in (("indices", indices), ("indptr", indptr)):
        _plain(array, f"{name} of {what}", "i")
        if array.dtype not in (np.int32, np.int64):
            raise TypeError(f"{name} of {what} are {array.dtype}; expected int32 or int64")
    for name, array, expected in (("data", data, ndim), ("indices", indices, 1), ("indptr", indptr, 1)):
        if array.ndim != expected:
            raise ValueError(f"{name} of {what} has shape {array.shape}; expected {expected} dimensions")
    if len(indptr) != major + 1:
        raise ValueError(f"indptr of {what} has length {len(indptr)}; expected {major + 1}, rows and one")


def _look_at_columns(columns: np.ndarray, width: int) -> int:
    """GOOD if they run from 0 to the width in each row, UNSORTED if they don't, BAD if one leads outside."""
    if not len(columns) or not width:
        return merge.BAD if len(columns) else merge.GOOD
    table = np.array([[columns.ctypes.data, width, 0]], np.uint64)
    found = np.zeros((-(-len(columns) // threads.CHUNK), 1))
    offsets = np.array([0, len(columns)], np.int64)
    kernel = cpu.columns(f"i{columns.itemsize}")
    threads.run([threads.Job(kernel, (table, offsets, found), len(columns))])
    return int(found.max())


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
