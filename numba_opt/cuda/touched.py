"""Sparse gradients on GPUs: what the kernel for rows is told of a `RowSparse` or a CSR matrix.

The numbers in them stay unseen, as the host would have to wait for them. The kernels bear with any: rows that
lead outside are left out, and that is told to whoever asks; columns that lead outside are nobody's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..core.foreign import loaded
from ..core.storage import EXPECTED, TouchedForm, code_of, index_code
from ..cpu.csr import check_compressed
from ..cpu.row_sparse import RowSparse, check_block, check_shape
from .arrays import View, look, place


class DeviceTouchedRows(NamedTuple):
    """A sparse gradient as the kernel takes it."""

    form: TouchedForm  # as `numba_opt.cuda.rows.rows` has it, for the rows that are touched
    data: View
    indices: View  # row numbers, or where the rows of a CSR matrix begin
    columns: View | None
    units: int  # parts, or rows of a CSR matrix
    every: int = 0  # units of all rows, if those without a gradient are to be updated too

    @property
    def updating(self) -> tuple[TouchedForm, int]:
        """The form in which rows are updated, and the units of that."""
        if not self.every:
            return self.form, self.units
        return self.form._replace(kind=f"every-{self.form.kind}"), self.every

    @property
    def views(self) -> list[View]:
        """All arrays whose addresses a kernel gets."""
        return [view for view in (self.data, self.indices, self.columns) if view is not None]

    def arrays(self) -> list[np.ndarray]:
        """Return the NumPy arrays that stand for the views' memory."""
        return [view.shadow for view in self.views]

    @property
    def entries(self) -> int:
        """Parts, or what a CSR matrix has room for."""
        entries = self.data.shadow.shape[0]
        return int(entries if self.columns is None else min(entries, self.columns.shadow.size))

    def head(self, height: int, keys: int, last_step: int, deferred: int) -> list[int]:
        """Return its numbers in a row of the table (`numba_opt.core.columns`), from these addresses."""
        columns = 0 if self.columns is None else place(self.columns.shadow)
        arrays = [place(self.data.shadow), place(self.indices.shadow), columns, keys]
        return [*arrays, height, self.entries, last_step, deferred]


def is_sparse(grad: Any) -> bool:
    """Tell whether a gradient is a sparse matrix or a `RowSparse` on a GPU."""
    issparse = loaded("scipy.sparse", "issparse")
    if issparse is not None and issparse(grad):
        return False
    return hasattr(grad, "tocsr") or (isinstance(grad, RowSparse) and grad.on_cuda)


def arrays_of(grad: Any) -> list[Any]:
    """The arrays that a sparse gradient is made of."""
    if isinstance(grad, RowSparse):
        return [grad.rows, grad.values]
    return [getattr(grad, name, None) for name in ("data", "indices", "indptr")]


def touched_rows(grad: Any, weight: View, what: str, sparse_update: str = "lazy") -> DeviceTouchedRows:
    """Return a sparse gradient as the kernel takes it, checked as far as the host can know it.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter and what is wrong.
    """
    check_shape(grad, weight.shadow, what)
    rows = (_of_block if isinstance(grad, RowSparse) else _of_csr)(grad, what, sparse_update == "dense")
    for view in rows.views:
        if view.device != weight.device and view.shadow.size:
            raise ValueError(
                f"{what} is on CUDA device {view.device}; expected device {weight.device}, as the weight"
            )
    return rows


def _of_block(grad: RowSparse, what: str, dense: bool) -> DeviceTouchedRows:
    rows, values = look(grad.rows, f"rows of {what}"), look(grad.values, f"values of {what}")
    check_block(rows.shadow, values.shadow, grad.shape, what)
    indices, every = _indices(rows, f"rows of {what}"), grad.shape[0] + 1 if dense else 0
    form = TouchedForm("rows", _numbers(values, what), indices)
    if dense or not grad.distinct:
        form = TouchedForm("keys", form.grad)
    return DeviceTouchedRows(form, values, rows, None, len(rows.shadow), every)


def _of_csr(grad: Any, what: str, dense: bool) -> DeviceTouchedRows:
    if getattr(grad, "format", None) != "csr":
        raise TypeError(f"{what} is a {type(grad).__name__} on a GPU; expected RowSparse or a CSR matrix")
    data, indices, indptr = (
        look(getattr(grad, name), f"{name} of {what}") for name in ("data", "indices", "indptr")
    )
    check_compressed(data.shadow, indices.shadow, indptr.shadow, grad.shape[0], what)
    if indices.shadow.dtype != indptr.shadow.dtype:
        kinds = f"{indices.shadow.dtype} and {indptr.shadow.dtype}"
        raise TypeError(f"indices and indptr of {what} are {kinds}; expected the same")
    form = TouchedForm("csr", _numbers(data, what), _indices(indptr, f"indptr of {what}"))
    return DeviceTouchedRows(form, data, indptr, indices, grad.shape[0], grad.shape[0] if dense else 0)


def _indices(view: View, what: str) -> str:
    if code := index_code(view.shadow.dtype):
        return code
    raise TypeError(f"{what} are {view.shadow.dtype}; expected int32 or int64")


def _numbers(view: View, what: str) -> str:
    if code := code_of(view.shadow.dtype):
        return code
    raise TypeError(f"{what} is {view.shadow.dtype}; expected {EXPECTED}")
