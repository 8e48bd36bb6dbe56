"""The kernels of a GPU: `dense` and its kin, what settles a step's norm, and those of other files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from ..core.columns import WIDTH
from ..core.rules import Rule
from ..core.storage import Layout
from ..scalar import sqrt
from .buffer import GUARD, HEAD, LIMIT, OUT, OUT_OF_RANGE_ROWS, RESCALE, ROOM, SKIP, SKIPPED
from .collect import collect, spread, vacate
from .elements import moved, numbers, put
from .loops import begun, coefficient_reader, further, plus, real_of, row_step, squaring_alone, updating, walk
from .pending import COUNT_BYTES, catch_up, forget, record
from .rows import row_squares, rows
from .sorting import RUN, keys, merge
from .units import (
    CHUNK,
    THREADS,
    WARP,
    WARPS,
    KernelSource,
    block_sum,
    elements_of,
    first_chunk,
    first_row,
    number_at,
    over_units,
    u4,
    updates,
)

__all__ = [
    "CHUNK",
    "COUNT_BYTES",
    "RUN",
    "THREADS",
    "WARP",
    "WARPS",
    "begun",
    "catch_up",
    "clip_norm",
    "collect",
    "dense",
    "forget",
    "keys",
    "merge",
    "plus",
    "record",
    "row_squares",
    "rows",
    "set_coefficients",
    "spread",
    "squares",
    "vacate",
]


@functools.cache
def dense(rule: Rule, layout: Layout) -> KernelSource:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, columns, offsets, starts, tensors, buffer, room)``: a table of so many columns; its
    tensors' first elements on the CPU's long line, and their first units on this one; the buffer of
    coefficients.
    """
    kernel = (_row_kernel if rule.per_row else _element_kernel)(rule, layout)
    return KernelSource(kernel, ("dense", rule, layout.text), 7)


def _element_kernel(rule: Rule, layout: Layout) -> Callable[..., Any]:
    n_array, codes, real = len(layout.codes), layout.text, real_of(layout.compute)
    read = coefficient_reader(rule, layout)
    update = walk(
        layout.grad, layout.own.text, real, updating(rule, layout.values, layout.model_weight, real)
    )

    def chunk(entry, columns, t, k, unit, x):
        offsets, buffer, room = x
        first, count = elements_of(offsets, t, k)
        array = moved(numbers(entry, "i64", n_array), codes, first)
        given = further(read(buffer, room, entry, columns), first)
        update(array[:1], array[1:], count, u4(cuda.threadIdx.x), u4(cuda.blockDim.x), given)

    return updates(first_chunk, chunk)


def _row_kernel(rule: Rule, layout: Layout) -> Callable[..., Any]:
    n_array, grad = len(layout.codes), layout.grad
    read = coefficient_reader(rule, layout)
    step = row_step(rule, layout, grad)

    def row(entry, columns, t, r, unit, x):
        _, buffer, room = x
        width, array = number_at(entry, columns + WIDTH), numbers(entry, "i64", n_array)
        given = read(buffer, room, entry, columns)
        step(moved(array[:1], grad, r * width), array[1:], r, width, given)

    return updates(first_row, row)


@functools.cache
def squares(code: str) -> KernelSource:
    """The kernel that sums the squares of all gradients of a table, stored as `code` says.

    ``kernel(table, columns, offsets, starts, tensors, partial)`` writes the sum of each chunk, in double
    precision, from the address `partial` on.
    """
    of_chunk = walk(code, "", np.float64, squaring_alone)

    def visit(entry, columns, t, k, unit, x):
        offsets, partial = x
        first, count = elements_of(offsets, t, k)
        array = moved(numbers(entry, "i64", 1), code, first)
        thread, stride = u4(cuda.threadIdx.x), u4(cuda.blockDim.x)
        total = block_sum(of_chunk(array, array, count, thread, stride, 0))
        if cuda.threadIdx.x == 0:
            put(partial + 8 * unit, "f64", (total,))

    loop = over_units(first_chunk, visit)

    def kernel(table, columns, offsets, starts, tensors, partial):
        loop(table, columns, starts, tensors, (offsets, partial))

    return KernelSource(kernel, ("squares", code), 6)


@functools.cache
def set_coefficients() -> KernelSource:
    """The kernel that writes ROOM of the numbers of a buffer's parts.

    ``kernel(buffer, room, first, *numbers)``: one thread writes them from number `first` on. They come with
    the launch, so nothing on the host has to stay as it is until the device gets there.
    """

    def kernel(buffer, room, first, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p):  # noqa: E741
        given = (a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
        begin = buffer + 8 * OUT
        if first == 0:  # only `clip_norm` says otherwise, and it may be left out from now on
            put(buffer + 8 * SKIP, "f64", (0.0,))
        put(begin + 8 * first, "f64", given)
        put(begin + 8 * (room + first), "f64", given)
        put(begin + 8 * (2 * room) + 4 * first, "f32", given)

    return KernelSource(kernel, ("set_coefficients",), 3, ROOM)


@functools.cache
def clip_norm() -> KernelSource:
    """The kernel that settles what the norm of all gradients means for a step.

    ``kernel(buffer, room, length, partial, count)``: one block adds so many sums of squares, always in the
    same order, and writes the norm, whether to skip the step, and the rows, which have that length, with what
    gradients are multiplied by.
    """

    def kernel(buffer, room, length, partial, count):
        total = np.float64(0)
        k = np.int64(cuda.threadIdx.x)
        while k < count:
            total = total + numbers(partial + 8 * k, "f64", 1)[0]
            k += cuda.blockDim.x
        total = block_sum(total)
        factor = cuda.shared.array(2, np.float64)
        if cuda.threadIdx.x == 0:
            given = numbers(buffer + 8 * OUT, "f64", HEAD)
            limit, rescale, guard = given[LIMIT], given[RESCALE], given[GUARD]
            norm = sqrt(total) * abs(rescale)
            out = numbers(buffer, "f64", OUT)
            finite = norm - norm == 0
            skip = 0.0 if finite or guard == 0 else 1.0
            put(buffer, "f64", (skip, norm, out[SKIPPED] + skip, out[OUT_OF_RANGE_ROWS]))
            factor[0] = rescale * limit / norm if finite and norm > limit else rescale
        cuda.syncthreads()
        begin = buffer + 8 * OUT
        k = HEAD + np.int64(cuda.threadIdx.x)
        while k < room:
            number = numbers(begin + 8 * k, "f64", 1)[0]
            if (k - HEAD) % length == 0:
                number = factor[0]
            put(begin + 8 * (room + k), "f64", (number,))
            put(begin + 8 * (2 * room) + 4 * k, "f32", (number,))
            k += cuda.blockDim.x

    return KernelSource(kernel, ("clip_norm",), 5)
