"""Matrices by rows: which rows hold entries, with every number checked that a kernel would follow."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import numpy as np

from ..core import arguments
from ..core.storage import index_code, is_half
from . import measures, merge, threads


class CsrRows(NamedTuple):
    """The rows of a CSR matrix (or columns of a CSC matrix) that hold an entry.

    The arrays are as they were when they were looked at, unless somebody changes entries or columns
    meanwhile.
    """

    rows: np.ndarray  # the program's own, as are the next ones
    starts: np.ndarray  # where each one's entries begin, and where the last one's end
    even: bool  # whether all of these rows are full and their columns in order
    data: np.ndarray
    columns: np.ndarray

    def summed(self, width: int, real: Any) -> np.ndarray:
        """The rows in full, duplicate entries summed in their order."""
        dense = np.zeros((len(self.rows), width), real)
        k = np.repeat(np.arange(len(self.rows)), np.diff(self.starts))
        with np.errstate(all="ignore"):
            np.add.at(dense, (k, self.columns[: len(k)]), self.data[: len(k)].astype(real))
        return dense


def as_csr(grad: Any, what: str) -> Any:
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
        data = plain(grad.data, f"data of {what}", "fV")
        for name, numbers, limit in (("row", grad.row, height), ("col", grad.col, width)):
            if len(plain(numbers, f"{name} of {what}", "iu")) != len(data):
                raise ValueError(f"{name} of {what} has length {len(numbers)}; expected {len(data)}, as data")
            check_numbers(numbers, f"{name} of {what}", limit)
    elif grad.format == "csc":
        csr_rows(grad, what, width, height)
    elif grad.format == "bsr":
        rows, columns = grad.blocksize
        csr_rows(grad, what, height // rows, width // columns)
    return grad.tocsr()


def csr_rows(matrix: Any, what: str, major: int, minor: int) -> CsrRows:
    """The rows that hold an entry; numbers in a matrix by rows (or columns) that lead outside are refused."""
    data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
    check_compressed(data, indices, indptr, major, what, 3 if matrix.format == "bsr" else 1)
    available = min(len(data), len(indices))
    bad, full, rows, starts = merge.rows_of_csr(np.ascontiguousarray(indptr), available, minor)
    if bad:
        raise ValueError(_what_is_wrong(indptr, data, indices, what))
    entries = int(starts[-1])
    used = np.ascontiguousarray(indices[:entries])
    order = _order_of_columns(used, minor)
    if order == merge.BAD:
        check_numbers(used, f"indices of {what}", minor)
    return CsrRows(rows, starts, full and order == merge.GOOD, data[:entries], used)


def plain(array: Any, what: str, kinds: str) -> np.ndarray:
    """An array that may be read as numbers of some kinds."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{what} is a {type(array).__name__}; expected a NumPy array without a mask")
    if array.dtype.kind not in kinds or (array.dtype.kind == "V" and not is_half(array.dtype)):
        expected = {"i": "int32 or int64", "iu": "integers"}.get(kinds, "floating-point numbers")
        raise TypeError(f"{what} are {array.dtype}; expected {expected}")
    return array


def check_numbers(numbers: np.ndarray, what: str, limit: int) -> None:
    """Refuse numbers outside 0 to `limit`, naming the first."""
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= limit):
        k = int(np.flatnonzero((numbers < 0) | (numbers >= limit))[0])
        raise ValueError(f"{what} hold {numbers[k]} at position {k}; expected 0 to {limit - 1}")


def check_compressed(data: Any, indices: Any, indptr: Any, major: int, what: str, ndim: int = 1) -> None:
    """Refuse what cannot be the arrays of a matrix by rows (or columns); their numbers are not looked at."""
    plain(data, f"data of {what}", "fV")
    for name, array in (("indices", indices), ("indptr", indptr)):
        plain(array, f"{name} of {what}", "i")
        if array.dtype not in (np.int32, np.int64):
            raise TypeError(f"{name} of {what} are {array.dtype}; expected int32 or int64")
    for name, array, expected in (("data", data, ndim), ("indices", indices, 1), ("indptr", indptr, 1)):
        if array.ndim != expected:
            raise ValueError(f"{name} of {what} has shape {array.shape}; expected {expected} dimensions")
    if len(indptr) != major + 1:
        raise ValueError(f"indptr of {what} has length {len(indptr)}; expected {major + 1}, rows and one")


def _order_of_columns(columns: np.ndarray, width: int) -> int:
    """Return GOOD if columns run from 0 to the width in each row, UNSORTED if not, BAD if one is outside."""
    if not len(columns) or not width:
        return merge.BAD if len(columns) else merge.GOOD
    table = np.array([[columns.ctypes.data, width, 0]], np.uint64)
    found = np.zeros((-(-len(columns) // threads.CHUNK), 1))
    offsets = np.array([0, len(columns)], np.int64)
    kernel = measures.columns(index_code(columns.dtype))
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
