"""`RowSparse`: a gradient that says which rows of a parameter it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core import arguments
from ..core.foreign import loaded, on_cuda
from ..core.storage import code_of
from ..cuda import arrays as cuda_arrays
from .arrays import as_array
from .csr import check_numbers, csr_rows, plain

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
        self.on_cuda = on_cuda(rows) and on_cuda(values)
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
        """Return NumPy arrays like the rows and the values, which only stand for those that are on a GPU."""
        if not self.on_cuda:
            return self.rows, self.values
        look_at = cuda_arrays.look_at
        return look_at(self.rows, "rows of RowSparse"), look_at(self.values, "values of RowSparse")

    def to_host(self) -> RowSparse:
        """Return the gradient with NumPy arrays: itself, or a copy from a GPU, for which the host waits."""
        if not self.on_cuda:
            return self
        to_host = cuda_arrays.to_host
        rows, values = to_host(self.rows, "rows of RowSparse"), to_host(self.values, "values of RowSparse")
        return RowSparse(rows, values, self.shape)

    @classmethod
    def from_csr(cls, matrix: Any, what: str = "matrix") -> RowSparse:
        """Take the rows of a CSR matrix that hold an entry; duplicate entries are summed.

        `what` is what errors call it.
        """
        if getattr(matrix, "format", None) != "csr":
            raise TypeError(f"{what} must be a scipy.sparse CSR matrix, got {type(matrix).__name__}")
        found = csr_rows(matrix, what, *matrix.shape)
        real = np.float64 if matrix.dtype == np.float64 or not code_of(matrix.dtype) else np.float32
        values = found.summed(matrix.shape[1], real).astype(matrix.dtype, copy=False)
        return cls(found.rows, values, matrix.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self._looked_at()[1].dtype

    def to_dense(self) -> np.ndarray:
        """Return the gradient as an ordinary NumPy array."""
        if self.on_cuda:
            return self.to_host().to_dense()
        dense = np.zeros(self.shape, self.dtype)
        np.add.at(dense, self.rows, self.values)
        return dense

    def coalesce(self) -> RowSparse:
        """Return the gradient with each row once, in order, as NumPy arrays."""
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
    tensor = loaded("torch", "Tensor")
    if tensor is not None and isinstance(given, tensor):
        return as_array(given, what)
    return np.asarray(given)


def is_sparse(grad: Any) -> bool:
    """Tell whether a gradient is a `RowSparse` or a scipy.sparse matrix."""
    if isinstance(grad, RowSparse):
        return True
    issparse = loaded("scipy.sparse", "issparse")
    return issparse is not None and bool(issparse(grad))


def check_shape(grad: Any, weight: np.ndarray, what: str) -> None:
    """Refuse a sparse gradient of another shape than its weight's."""
    if tuple(grad.shape) != weight.shape:
        raise ValueError(f"{what} has shape {grad.shape}; expected {weight.shape}, as the weight")


def check_block(rows: Any, values: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse row numbers that are not integers, and values of another shape."""
    rows = plain(rows, f"rows of {what}", "iu")
    values = plain(values, f"values of {what}", "fV")
    if rows.ndim != 1:
        raise ValueError(f"rows of {what} have shape {rows.shape}; expected one dimension")
    expected = (len(rows), *shape[1:])
    if values.shape != expected:
        raise ValueError(f"values of {what} have shape {values.shape}; expected {expected}")
