"""Gradients of every form, on the host; a backend puts them where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from numba_opt import RowSparse

SHAPE = (9, 6)
ROWS = [7, 2, 7, 0, 2, *[7] * 9, *[5] * 4]  # some so often that compilers take them four at a time
FORMS = ["dense", "distinct", "block", "csr-int32", "csr-int64"]


def each_form(*forms):
    """A test's gradient in each of some forms; of all by default."""
    return pytest.mark.parametrize("form", forms or FORMS)


def block(rows=ROWS, shape=SHAPE, dtype="float32", seed=1):
    rows = np.array(rows, np.int64)
    values = np.random.default_rng(seed).standard_normal((len(rows), *shape[1:])).astype(dtype)
    return RowSparse(rows, values, shape)


def csr(shape=SHAPE, dtype="float32", index="int32", seed=1):
    """With empty rows, a full one, and an entry that comes twice."""
    rng = np.random.default_rng(seed)
    columns = np.array([3, 0, 3, *range(shape[1]), 2], index)
    starts = np.array([0, 0, 3, 3, 3 + shape[1], *[4 + shape[1]] * (shape[0] - 4)], index)
    return scipy.sparse.csr_array((rng.standard_normal(len(columns)).astype(dtype), columns, starts), shape)


def some_csr(columns, shape=SHAPE, index="int32"):
    """A CSR matrix with these columns in each row."""
    starts = np.cumsum([0, *map(len, columns)]).astype(index)
    data = np.random.default_rng(3).standard_normal(starts[-1]).astype("float32")
    flat = np.array([column for row in columns for column in row], index)
    matrix = scipy.sparse.csr_array(shape, dtype="float32")
    matrix.data, matrix.indices, matrix.indptr = data, flat, starts
    return matrix


def dense(shape=SHAPE, dtype="float32", seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def made(form, shape=SHAPE, dtype="float32", seed=1):
    """A gradient of one of `FORMS`."""
    if form == "dense":
        return dense(shape, dtype, seed)
    if form.startswith("csr"):
        return csr(shape, dtype, form.partition("-")[2], seed)
    rows = [7, 0, 3] if form == "distinct" else ROWS
    return block([row % shape[0] for row in rows], shape, dtype, seed)


def numbers(grad):
    """The array of a gradient's values."""
    if isinstance(grad, np.ndarray):
        return grad
    return grad.values if isinstance(grad, RowSparse) else grad.data


def widened(grad, shape):
    """A gradient of the same form and dtype for a parameter of another shape."""
    if isinstance(grad, RowSparse):
        distinct = len(set(grad.rows)) == len(grad.rows)
        return block(np.unique(grad.rows % shape[0]) if distinct else ROWS, shape, grad.values.dtype)
    if isinstance(grad, np.ndarray):
        return np.ones(shape, grad.dtype)
    return csr(shape, grad.dtype, grad.indices.dtype)


def in_turn(n, dtype="float32"):
    """A sparse gradient of each form in turn; every row is touched now and then, one of them late."""
    rows = np.random.default_rng(n).integers(0, 8 if n < 5 else 9, 3)
    return csr(dtype=dtype, seed=n) if n % 3 == 1 else block(rows, dtype=dtype, seed=n)
