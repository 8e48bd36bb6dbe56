"""Sparse gradients on GPUs: what the kernel for rows is told of a `RowSparse` or a CSR matrix.

The numbers in them stay unseen, as the host would have to wait for them. The kernels bear with any: rows that
lead outside are left out, and that is told to whoever asks; columns that lead outside are nobody's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import device
from ..cpu import sparse
from ..cpu.sparse import RowSparse
from .arrays import View, look, place


class Parts(NamedTuple):
    """What the kernel needs to know of a gradient."""

    form: str  # as `numba_opt.cuda.kernels.rows` has it, for the rows that are touched
    integers: str  # how row numbers, or columns, are stored
    data: View
    numbers: View  # of rows, or of where the rows of a CSR matrix begin
    columns: View | None
    units: int  # parts, or rows of a CSR matrix
    every: int = 0  # units of all rows, if those without a gradient are to be updated too

    @property
    def updating(self) -> tuple[str, int]:
        """The form in which rows are updated, and the units of that."""
        return (f"every-{self.form}", self.every) if self.every else (self.form, self.units)

    @property
    def views(self) -> list[View]:
        """All arrays whose addresses a kernel gets."""
        return [view for view in (self.data, self.numbers, self.columns) if view is not None]

    @property
    def entries(self) -> int:
        """Parts, or what a CSR matrix has room for."""
        entries = self.data.shadow.shape[0]
        return int(entries if self.columns is None else min(entries, self.columns.shadow.size))

    def head(self, height: int, keys: int, late: tuple[int, int]) -> list[int]:
        """What the table says of it, the keys being at some address, as are stamps and history."""
        columns = 0 if self.columns is None else place(self.columns.shadow)
        return [
            place(self.data.shadow),
            place(self.numbers.shadow),
            columns,
            keys,
            height,
            self.entries,
            *late,
        ]


def is_sparse(grad: Any) -> bool:
    """Whether a gradient is one that this module deals with."""
    issparse = device.loaded("scipy.sparse", "issparse")
    if issparse is not None and issparse(grad):
        return False
    return hasattr(grad, "tocsr") or (isinstance(grad, RowSparse) and grad.on_cuda)


def arrays_of(grad: Any) -> list[Any]:
    """The arrays that a sparse gradient is made of."""
    if isinstance(grad, RowSparse):
        return [grad.rows, grad.values]
    return [getattr(grad, name, None) for name in ("data", "indices", "indptr")]


def parts_of(grad: Any, weight: View, what: str, mode: str = "lazy") -> Parts:
    """What a sparse gradient says, as far as the host can know it, for an update of that `mode`.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter and what is wrong.
    """
    sparse.check_shape(grad, weight.shadow, what)
    if isinstance(grad, RowSparse):
        rows, values = look(grad.rows, f"rows of {what}"), look(grad.values, f"values of {what}")
        sparse.check_block(rows.shadow, values.shadow, grad.shape, what)
        integers = _integers(rows, f"rows of {what}")
        every = grad.shape[0] + 1 if mode == "dense" else 0
        kind = f"rows {integers}" if grad.distinct and not every else "keys"
        form = f"{kind} {_reals(values, what)}"
        parts = Parts(form, integers, values, rows, None, len(rows.shadow), every)
    else:
        if getattr(grad, "format", None) != "csr":
            raise TypeError(f"{what} is a {type(grad).__name__} on a GPU; expected RowSparse or a CSR matrix")
        data, indices, indptr = (
            look(getattr(grad, name), f"{name} of {what}") for name in ("data", "indices", "indptr")
        )
        sparse.check_compressed(data.shadow, indices.shadow, indptr.shadow, grad.shape[0], what)
        if indices.shadow.dtype != indptr.shadow.dtype:
            kinds = f"{indices.shadow.dtype} and {indptr.shadow.dtype}"
            raise TypeError(f"indices and indptr of {what} are {kinds}; expected the same")
        integers = _integers(indptr, f"indptr of {what}")
        form = f"csr {integers} {_reals(data, what)}"
        every = grad.shape[0] if mode == "dense" else 0
        parts = Parts(form, integers, data, indptr, indices, grad.shape[0], every)
    for view in parts.views:
        if view.device != weight.device and view.shadow.size:
            raise ValueError(
                f"{what} is on CUDA device {view.device}; expected device {weight.device}, as the weight"
            )
    return parts


def _integers(view: View, what: str) -> str:
    code = f"i{view.shadow.itemsize}"
    if view.shadow.dtype.kind != "i" or code not in ("i4", "i8"):
        raise TypeError(f"{what} are {view.shadow.dtype}; expected int32 or int64")
    return code


def _reals(view: View, what: str) -> str:
    code = device.code_of(view.shadow.dtype)
    if not code:
        raise TypeError(f"{what} is {view.shadow.dtype}; expected float32, float64, float16 or bfloat16")
    return code
