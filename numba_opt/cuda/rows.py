"""The kernel for sparse gradients on a GPU: their rows are found, summed and updated.

Row numbers stay on the device, which sorts them where rows may come more than once. Whoever owns a row sums
its parts, always in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..core.columns import (
    CUDA_COLUMNS,
    CUDA_DATA,
    CUDA_ENTRIES,
    CUDA_HEADER,
    CUDA_HEIGHT,
    CUDA_INDICES,
    CUDA_KEYS,
    WIDTH,
)
from ..core.rules import Rule
from ..core.storage import HALVES, SIZES, Layout, TouchedForm
from .buffer import OUT_OF_RANGE_ROWS
from .elements import all_sync, numbers, put, rounded
from .loops import coefficient_reader, real_of, row_step, squaring_alone, walk
from .sorting import NOTHING, PLACE, bisection
from .units import WARP, KernelSource, first_row, number_at, over_units, u4, updates, warp_sum


@functools.cache
def rows(rule: Rule, layout: Layout, form: TouchedForm) -> KernelSource:
    """The kernel that applies a rule to the rows that sparse gradients touch; `layout` is without gradients.

    Arguments as in `dense`. `numba_opt.core.columns` says what a row of the table has before the addresses of
    the weight, the states and perhaps the model weight. A unit is a part, or a row of a CSR matrix.

    Forms: "rows", a block whose rows are all different ones, numbered by integers stored as the form says;
    "keys", one whose rows may come more than once: whoever meets the first of a row's keys, as `merge`
    leaves them, sums them in order; "csr". Rows that lead outside are left out, and OUT_OF_RANGE_ROWS says
    so. In "every-keys" and "every-csr" all rows are updated, those without a gradient with zero; a unit is a
    row, and keys have one more after the last row.
    """
    n_array, weight, real = len(layout.codes), layout.weight, real_of(layout.compute)
    read = coefficient_reader(rule, layout)
    source_of, gather = source_for(form, real)
    if form.kind.startswith("every") and weight in HALVES:
        gather = as_dense(gather, weight)
    step = row_step(rule, layout, form.grad, gather)

    def visit(entry, columns, t, k, unit, x):
        _, buffer, room = x
        width = number_at(entry, columns + WIDTH)
        row, found_at = source_of(numbers(entry, "i64", CUDA_HEADER), k, width)
        if row == OUT_OF_RANGE:
            put(buffer + 8 * OUT_OF_RANGE_ROWS, "f64", (1.0,))
        elif row != NOTHING:
            given = read(buffer, room, entry, columns)
            step(found_at, numbers(entry + 8 * CUDA_HEADER, "i64", n_array), row, width, given)

    return KernelSource(updates(first_row, visit), ("rows", rule, layout.text, form.text), 7)


OUT_OF_RANGE = -2  # instead of the number of a row, as is NOTHING


def _by_rows(code: str, place: str, real: Any) -> Any:
    """Make the source of gradients in a block whose rows are all different ones."""
    size, wide = SIZES[code], SIZES[place]

    @register_jitable
    def source(head, k, width):
        row = np.int64(numbers(head[CUDA_INDICES] + wide * k, place, 1)[0])
        return row if 0 <= row < head[CUDA_HEIGHT] else OUT_OF_RANGE, (head[CUDA_DATA] + size * k * width,)

    return source, None


def _by_keys(code: str, place: str, real: Any) -> Any:
    """Make the source of gradients in a block whose rows may come more than once."""

    @register_jitable
    def source(head, k, width):
        row = number_at(head[CUDA_KEYS], k) >> 32
        parts = (head[CUDA_DATA], head[CUDA_KEYS], k, head[CUDA_ENTRIES], width, row)
        if k > 0 and number_at(head[CUDA_KEYS], k - 1) >> 32 == row:
            row = np.int64(NOTHING)
        elif row >= head[CUDA_HEIGHT]:
            row = np.int64(OUT_OF_RANGE)
        return row, parts

    return source, _gather_keys(code, real)


def _by_every_row(code: str, place: str, real: Any) -> Any:
    """Make the source of `_by_keys` with zero for other rows: a unit is a row, or what comes after all."""
    first_of = bisection(lambda keys, k: number_at(keys, k) >> 32)

    @register_jitable
    def source(head, k, width):
        low = first_of(head[CUDA_KEYS], np.int64(0), head[CUDA_ENTRIES], k)
        row = np.int64(k)
        if k == head[CUDA_HEIGHT]:
            row = np.int64(OUT_OF_RANGE if low < head[CUDA_ENTRIES] else NOTHING)
        return row, (head[CUDA_DATA], head[CUDA_KEYS], low, head[CUDA_ENTRIES], width, k)

    return source, _gather_keys(code, real)


def _by_none(code: str, place: str, real: Any) -> Any:
    """Make the source of no gradients: all rows there are."""
    return register_jitable(lambda head, k, width: (np.int64(k), (head[CUDA_DATA],))), None


def _gather_keys(code: str, real: Any) -> Any:
    """Make the function that sums an element's parts, from the first of its row's keys on."""
    size = SIZES[code]

    @register_jitable
    def gather(source, j):
        data, keys, k, parts, width, row = source
        total = real(0)
        while k < parts and number_at(keys, k) >> 32 == row:
            part = number_at(keys, k) & PLACE
            total = total + real(numbers(data + size * (part * width + np.int64(j)), code, 1)[0])
            k += 1
        return ((total,),)

    return gather


def _by_csr(code: str, place: str, real: Any, every: bool = False) -> Any:
    """Make the source of gradients in a CSR matrix's entries. With `every`, rows that have none get zero.

    A warp reads the columns of a row's n entries once, to see whether they rise. Each of the row's elements
    then reads some log2(n) of them, or all n if they do not.
    """
    size, wide = SIZES[code], SIZES[place]

    @register_jitable
    def column_at(columns, p):
        return np.int64(numbers(columns + wide * p, place, 1)[0])

    first_from = bisection(column_at)

    @register_jitable
    def source(head, k, width):
        begin = np.int64(numbers(head[CUDA_INDICES] + wide * k, place, 1)[0])
        end = np.int64(numbers(head[CUDA_INDICES] + wide * (k + 1), place, 1)[0])
        row = k if begin < end or every else np.int64(NOTHING)
        if begin < 0 or begin > end or end > head[CUDA_ENTRIES]:
            row = np.int64(OUT_OF_RANGE)
        p, rising = begin + 1 + cuda.threadIdx.x % WARP, True
        while rising and row >= 0 and p < end:
            rising = column_at(head[CUDA_COLUMNS], p - 1) <= column_at(head[CUDA_COLUMNS], p)
            p += WARP
        return row, (head[CUDA_DATA], head[CUDA_COLUMNS], begin, end, np.int64(1 if all_sync(rising) else 0))

    @register_jitable
    def gather(source, j):
        # Whoever has column j looks for it: no scratch memory, and always the same order. Where columns rise
        # it is found by bisection, else among all of the row's entries.
        data, columns, p, end, rising = source
        p = first_from(columns, p, end if rising else p, j)
        total = real(0)
        while p < end:
            if column_at(columns, p) == j:
                total = total + real(numbers(data + size * p, code, 1)[0])
            elif rising:
                p = end
            p += 1
        return ((total,),)

    return source, gather


SOURCES: dict[str, Callable[..., Any]] = {
    "rows": _by_rows,
    "keys": _by_keys,
    "csr": _by_csr,
    "every-keys": _by_every_row,
    "every-csr": functools.partial(_by_csr, every=True),
    "none": _by_none,
}


def source_for(form: TouchedForm, real: Any) -> tuple[Any, Any]:
    """Return the functions that find the row of a unit and gather an element of its gradient."""
    found: tuple[Any, Any] = SOURCES[form.kind](form.grad, form.indices or "i64", real)
    return found


def as_dense(gather: Any, code: str) -> Any:
    """Round gathered sums as a dense gradient of a half-precision weight would have them."""
    return register_jitable(lambda source, j: ((rounded(gather(source, j)[0][0], code),),))


@functools.cache
def row_squares(compute: str, form: TouchedForm) -> KernelSource:
    """The kernel that sums the squares of sparse gradients, each row's parts summed first.

    ``kernel(table, columns, offsets, starts, tensors, partial)``, the table being that of `rows`, writes the
    sum of each unit, in double precision, from the address `partial` on.
    """
    source_of, gather = source_for(form, real_of(compute))
    of_row = walk(form.grad, "", np.float64, squaring_alone, gather)

    def visit(entry, columns, t, k, unit, x):
        width = number_at(entry, columns + WIDTH)
        row, source = source_of(numbers(entry, "i64", CUDA_HEADER), k, width)
        thread, total = u4(u4(cuda.threadIdx.x) & u4(WARP - 1)), np.float64(0)
        if row >= 0:
            total = of_row(source, source[:1], u4(width), thread, u4(WARP), 0)
        total = warp_sum(total)
        if thread == 0:
            put(x[0] + 8 * unit, "f64", (total,))

    loop = over_units(first_row, visit)

    def kernel(table, columns, offsets, starts, tensors, partial):
        loop(table, columns, starts, tensors, (partial,))

    return KernelSource(kernel, ("row_squares", compute, form.text), 6)
