"""Gradients that add up in the CPU's memory before a step takes their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..core.call import Arrays
from ..core.rules import Rule
from ..core.sums import Add, Sums, Totals
from . import threads
from .arrays import as_array
from .csr import as_csr, check_numbers
from .reader import read
from .row_sparse import RowSparse, check_block, check_shape, is_sparse


def plus(total, grad):
    """The rule of accumulation, under which the weight is a sum of gradients."""
    return (total + grad,)


ADDITION = Rule(plus, 0, False)


class CpuSums(Sums):
    """The sums of the gradients of parameters on the CPU."""

    def plus(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Add]:
        totals = list(totals)
        dense = []
        for t, grad in grads.items():
            if is_sparse(grad):
                totals[t] = _joined(totals[t], grad, weights[t], f"gradient of parameter {self.names[t]!r}")
            else:
                totals[t] = self.dense(t, weights[t]) if totals[t] is None else _as_array(totals[t])
                dense.append(t)
        if dense:
            columns = [[grads[t] for t in dense], [totals[t] for t in dense]]
            read(Arrays(columns, ADDITION, (), lambda k: f"parameter {self.names[dense[k]]!r}"))
        calls = [partial(np.add, totals[t], as_array(grads[t], "gradient"), totals[t]) for t in dense]

        def add(after: Sequence[partial[Any]] = ()) -> None:
            with np.errstate(all="ignore"):
                threads.run([], [*calls, *after])

        return totals, add

    def for_step(
        self, totals: Totals, grads: Mapping[int, Any], weights: Mapping[int, Any]
    ) -> tuple[Totals, Callable[[], None] | None]:
        copies = [total.copy() if isinstance(total, np.ndarray) else total for total in totals]
        totals, add = self.plus(copies, grads, weights)
        add()
        return totals, None

    def dense(self, t: int, weight: Any) -> np.ndarray:
        array = as_array(weight, "weight")
        return np.zeros(array.shape, array.dtype)

    def sparse(self, weight: Any, saved: RowSparse, what: str) -> Any:
        return _joined(None, saved, weight, what)


def _joined(total: Any, grad: Any, weight: Any, what: str) -> Any:
    """A sum of gradients and one more, as a new array or as rows, which are summed when they are used."""
    weight = as_array(weight, what)
    check_shape(grad, weight, what)
    if not isinstance(grad, RowSparse):
        grad = RowSparse.from_csr(as_csr(grad, what), what)
    check_block(grad.rows, grad.values, grad.shape, what)
    check_numbers(grad.rows, f"rows of {what}", grad.shape[0])
    with np.errstate(all="ignore"):
        rows, values = grad.rows.astype(np.int64), grad.values.astype(weight.dtype)
    if total is None:
        return RowSparse(rows, values, grad.shape)
    if isinstance(total, RowSparse):
        rows = np.concatenate([total.rows, rows])
        return RowSparse(rows, np.concatenate([total.values, values]), grad.shape)
    dense = total.copy()
    np.add.at(dense, rows, values)
    return dense


def _as_array(total: Any) -> Any:
    return total.to_dense() if isinstance(total, RowSparse) else total


def as_plain(total: Any) -> Any:
    """A sum of gradients as arrays and plain values."""
    if isinstance(total, RowSparse):
        total = total.to_host()
        return {"rows": total.rows, "values": total.values, "shape": list(total.shape)}
    return total
