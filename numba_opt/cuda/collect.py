"""The kernels that collect sparse gradients on a GPU, before a step takes their sum.

Parts lie one behind the other in a block of rows, in the order in which they came, and are summed when they
are used, or added to a dense sum. Either way each element's parts are added in that order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..core.storage import HALVES, SIZES, TouchedForm
from .elements import numbers, put, rounded
from .loops import real_of
from .rows import OUT_OF_RANGE, source_for
from .sorting import NOTHING, PLACE, VACANT
from .units import WARP, KernelSource, first_row, number_at


@functools.cache
def collect(total: str, form: TouchedForm) -> KernelSource:
    """The kernel that puts a sparse gradient into a block whose numbers are stored as `total` says.

    ``kernel(values, numbers, columns, count, entries, width, rows, block, flag)``: the gradient as `rows`
    has it, with so many parts, or rows of a CSR matrix with so many entries; where row numbers (int64) and
    rows go; a float64 that becomes 1 where a CSR matrix leads outside.

    Forms: "rows", whatever the numbers are, and "csr". Rows of a CSR matrix have a place
    each, or, if there are fewer entries, the place of their first one; those without any leave theirs as it
    is (see `vacate`).
    """
    make = _collect_csr if form.kind == "csr" else _collect_block
    return KernelSource(make(total, form), ("collect", total, form.text), 9)


def _collect_block(total: str, form: TouchedForm) -> Callable[..., Any]:
    code, place = form.grad, form.indices
    size, wide, kept = SIZES[code], SIZES[place], SIZES[total]

    def kernel(values, given, columns, count, entries, width, rows, block, flag):
        first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        stride = np.int64(cuda.gridDim.x) * cuda.blockDim.x
        k = first
        while k < count:
            put(rows + 8 * k, "i64", (np.int64(numbers(given + wide * k, place, 1)[0]),))
            k += stride
        k = first
        while k < count * width:
            put(block + kept * k, total, numbers(values + size * k, code, 1))
            k += stride

    return kernel


def _collect_csr(total: str, form: TouchedForm) -> Callable[..., Any]:
    kept, found = SIZES[total], _rounding(form.grad)
    source_of, gather = source_for(form, real_of(form.grad))

    def kernel(values, starts, columns, height, entries, width, rows, block, flag):
        unit, stride = first_row()
        while unit < height:
            head = (values, starts, columns, np.int64(0), height, entries)
            row, found_at = source_of(head, unit, width)
            if row == OUT_OF_RANGE:
                put(flag, "f64", (1.0,))
            elif row != NOTHING:
                k = found_at[2] if entries < height else row
                j = np.int64(cuda.threadIdx.x % WARP)
                if j == 0:
                    put(rows + 8 * k, "i64", (row,))
                while j < width:
                    put(block + kept * (k * width + j), total, (found(gather(found_at, j)[0][0]),))
                    j += WARP
            unit += stride

    return kernel


@functools.cache
def vacate() -> KernelSource:
    """The kernel that makes places of a block nobody's: ``kernel(rows, count)``."""

    def kernel(rows, count):
        k = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while k < count:
            put(rows + 8 * k, "i64", (np.int64(VACANT),))
            k += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return KernelSource(kernel, ("vacate",), 2)


@functools.cache
def spread(code: str, every: bool) -> KernelSource:
    """The kernel that adds the parts of a block to a dense sum, one after another, rounding each time.

    ``kernel(keys, values, parts, height, width, total, flag)``: keys as `merge` leaves them; a float64 that
    becomes 1 where a row leads outside. With `every` the sum begins at zero, whatever is there.
    """
    size, real, found = SIZES[code], real_of(code), _rounding(code)
    source_of, _ = source_for(TouchedForm("every-keys" if every else "keys", code), real)

    def kernel(keys, values, parts, height, width, total, flag):
        units = height + 1 if every else parts
        unit, stride = first_row()
        while unit < units:
            head = (values, np.int64(0), np.int64(0), keys, height, parts)
            row, found_at = source_of(head, unit, width)
            if row == OUT_OF_RANGE:
                put(flag, "f64", (1.0,))
            elif row != NOTHING:
                j = np.int64(cuda.threadIdx.x % WARP)
                while j < width:
                    place = total + size * (row * width + j)
                    number = real(0) if every else real(numbers(place, code, 1)[0])
                    k = found_at[2]
                    while k < parts and number_at(keys, k) >> 32 == row:
                        part = number_at(keys, k) & PLACE
                        number = found(number + real(numbers(values + size * (part * width + j), code, 1)[0]))
                        k += 1
                    put(place, code, (number,))
                    j += WARP
            unit += stride

    return KernelSource(kernel, ("spread", code, every), 7)


def _rounding(code: str) -> Callable[..., Any]:
    """A number as it is once it has been stored."""
    if code in HALVES:
        return register_jitable(lambda number: rounded(number, code))
    return register_jitable(lambda number: number)
