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

from .elements import SIZES, numbers, put, rounded
from .loops import WARP, Kernel, first_row, number_at, real_of
from .rows import NOTHING, PLACE, SOURCES, STRAYED, VACANT


@functools.cache
def collect(total: str, form: str) -> Kernel:
    """The kernel that puts a sparse gradient into a block whose numbers are stored as `total` says.

    ``kernel(values, numbers, columns, count, entries, width, rows, block, told)``: the gradient as `rows`
    has it, with so many parts, or rows of a CSR matrix with so many entries; where row numbers (int64) and
    rows go; a float64 that becomes 1 where a CSR matrix leads outside.

    Forms: ``"rows i4 f4"``, whatever the numbers are, and ``"csr i4 f4"``. Rows of a CSR matrix have a place
    each, or, if there are fewer entries, the place of their first one; those without any leave theirs as it
    is (see `vacate`).
    """
    kind, place, code = form.split()
    kernel = (_collect_csr if kind == "csr" else _collect_block)(total, place, code)
    return Kernel(kernel, ("collect", total, form), 9)


def _collect_block(total: str, place: str, code: str) -> Callable[..., Any]:
    size, wide, kept = SIZES[code], SIZES[place], SIZES[total]

    def kernel(values, given, columns, count, entries, width, rows, block, told):
        first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        stride = np.int64(cuda.gridDim.x) * cuda.blockDim.x
        k = first
        while k < count:
            put(rows + 8 * k, "i8", (np.int64(numbers(given + wide * k, place, 1)[0]),))
            k += stride
        k = first
        while k < count * width:
            put(block + kept * k, total, numbers(values + size * k, code, 1))
            k += stride

    return kernel


def _collect_csr(total: str, place: str, code: str) -> Callable[..., Any]:
    kept, found = SIZES[total], _rounding(code)
    source_of, gather = SOURCES["csr"](code, place, real_of(code))

    def kernel(values, starts, columns, height, entries, width, rows, block, told):
        unit, stride = first_row()
        while unit < height:
            head = (values, starts, columns, np.int64(0), height, entries)
            row, source = source_of(head, unit, width)
            if row == STRAYED:
                put(told, "f8", (1.0,))
            elif row != NOTHING:
                k = source[2] if entries < height else row
                j = np.int64(cuda.threadIdx.x % WARP)
                if j == 0:
                    put(rows + 8 * k, "i8", (row,))
                while j < width:
                    put(block + kept * (k * width + j), total, (found(gather(source, j)[0][0]),))
                    j += WARP
            unit += stride

    return kernel


@functools.cache
def vacate() -> Kernel:
    """The kernel that makes places of a block nobody's: ``kernel(rows, count)``."""

    def kernel(rows, count):
        k = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while k < count:
            put(rows + 8 * k, "i8", (np.int64(VACANT),))
            k += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return Kernel(kernel, ("vacate",), 2)


@functools.cache
def spread(code: str, every: bool) -> Kernel:
    """The kernel that adds the parts of a block to a dense sum, one after another, rounding each time.

    ``kernel(keys, values, parts, height, width, total, told)``: keys as `merge` leaves them; a float64 that
    becomes 1 where a row leads outside. With `every` the sum begins at zero, whatever is there.
    """
    size, real, found = SIZES[code], real_of(code), _rounding(code)
    source_of, _ = SOURCES["every-keys" if every else "keys"](code, "i8", real)

    def kernel(keys, values, parts, height, width, total, told):
        units = height + 1 if every else parts
        unit, stride = first_row()
        while unit < units:
            head = (values, np.int64(0), np.int64(0), keys, height, parts)
            row, source = source_of(head, unit, width)
            if row == STRAYED:
                put(told, "f8", (1.0,))
            elif row != NOTHING:
                j = np.int64(cuda.threadIdx.x % WARP)
                while j < width:
                    place = total + size * (row * width + j)
                    number = real(0) if every else real(numbers(place, code, 1)[0])
                    k = source[2]
                    while k < parts and number_at(keys, k) >> 32 == row:
                        part = number_at(keys, k) & PLACE
                        number = found(number + real(numbers(values + size * (part * width + j), code, 1)[0]))
                        k += 1
                    put(place, code, (number,))
                    j += WARP
            unit += stride

    return Kernel(kernel, ("spread", code, every), 7)


def _rounding(code: str) -> Callable[..., Any]:
    """A number as it is once it has been stored."""
    if code in ("f2", "b2"):
        return register_jitable(lambda number: rounded(number, code))
    return register_jitable(lambda number: number)
