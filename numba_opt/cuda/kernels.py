"""The kernels of a GPU: `dense` and its kin, what settles a step's norm, and those for rows from `cuda_rows`.

The names are those of the CPU's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from ..scalar import sqrt
from .buffer import GUARD, HEAD, LIMIT, OUT, RESCALE, ROOM, SKIP, SKIPPED, STRAY
from .collect import collect, spread, vacate
from .elements import moved, numbers, put
from .loops import (
    CHUNK,
    THREADS,
    WARP,
    WARPS,
    Kernel,
    begun,
    elements_of,
    first_chunk,
    first_row,
    further,
    number_at,
    over,
    over_block,
    plus,
    reader,
    row_step,
    squaring_alone,
    u4,
    updates,
    updating,
    walk,
)
from .rows import COUNT, RUN, forget, keys, late, merge, record, row_squares, rows

__all__ = [
    "CHUNK",
    "COUNT",
    "RUN",
    "THREADS",
    "WARP",
    "WARPS",
    "begun",
    "clip_norm",
    "collect",
    "dense",
    "forget",
    "keys",
    "late",
    "merge",
    "plus",
    "record",
    "row_squares",
    "rows",
    "set_hyper",
    "spread",
    "squares",
    "vacate",
]


@functools.cache
def dense(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str) -> Kernel:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, columns, offsets, starts, tensors, hyper, room)``: a table of so many columns; its
    tensors' first elements on the CPU's long line, and their first units on this one; the buffer of
    hyper-parameters.
    """
    kernel = (_row_kernel if per_row else _element_kernel)(rule, n_state, layout)
    return Kernel(kernel, ("dense", rule, n_state, per_row, layout), 7)


def _element_kernel(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    code, _, own = layout.partition(" ")
    n_array, end = len(layout.split()), 1 + n_state
    read = reader(rule, n_state, False, own)
    update = walk(code, own, updating(rule, end, own))

    def chunk(entry, columns, t, k, unit, x):
        offsets, hyper, room = x
        first, count = elements_of(offsets, t, k)
        array = moved(numbers(entry, "i8", n_array), layout, first)
        given = further(read(hyper, room, entry, columns), first)
        update(array[:1], array[1:], count, u4(cuda.threadIdx.x), u4(cuda.blockDim.x), given)

    return updates(first_chunk, chunk)


def _row_kernel(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    code, _, own = layout.partition(" ")
    n_array = len(layout.split())
    read = reader(rule, n_state, True, own)
    step = row_step(rule, n_state, True, own, code)

    def row(entry, columns, t, r, unit, x):
        _, hyper, room = x
        width, array = number_at(entry, columns - 2), numbers(entry, "i8", n_array)
        given = read(hyper, room, entry, columns)
        step(moved(array[:1], code, r * width), array[1:], r, width, given)

    return updates(first_row, row)


@functools.cache
def squares(code: str) -> Kernel:
    """The kernel that sums the squares of all gradients of a table, stored as `code` says.

    ``kernel(table, columns, offsets, starts, tensors, partial)`` writes the sum of each chunk, in double
    precision, from the address `partial` on.
    """
    of_chunk = walk(code, "", squaring_alone)

    def visit(entry, columns, t, k, unit, x):
        offsets, partial = x
        first, count = elements_of(offsets, t, k)
        array = moved(numbers(entry, "i8", 1), code, first)
        thread, stride = u4(cuda.threadIdx.x), u4(cuda.blockDim.x)
        total = over_block(of_chunk(array, array, count, thread, stride, 0))
        if cuda.threadIdx.x == 0:
            put(partial + 8 * unit, "f8", (total,))

    loop = over(first_chunk, visit)

    def kernel(table, columns, offsets, starts, tensors, partial):
        loop(table, columns, starts, tensors, (offsets, partial))

    return Kernel(kernel, ("squares", code), 6)


@functools.cache
def set_hyper() -> Kernel:
    """The kernel that writes ROOM of the numbers of a buffer's parts.

    ``kernel(hyper, room, first, *numbers)``: one thread writes them from number `first` on. They come with
    the launch, so nothing on the host has to stay as it is until the device gets there.
    """

    def kernel(hyper, room, first, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p):  # noqa: E741
        given = (a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
        begin = hyper + 8 * OUT
        if first == 0:  # only `clip_norm` says otherwise, and it may be left out from now on
            put(hyper + 8 * SKIP, "f8", (0.0,))
        put(begin + 8 * first, "f8", given)
        put(begin + 8 * (room + first), "f8", given)
        put(begin + 8 * (2 * room) + 4 * first, "f4", given)

    return Kernel(kernel, ("set_hyper",), 3, ROOM)


@functools.cache
def clip_norm() -> Kernel:
    """The kernel that settles what the norm of all gradients means for a step.

    ``kernel(hyper, room, length, partial, count)``: one block adds so many sums of squares, always in the
    same order, and writes the norm, whether to skip the step, and the rows, which have that length, with what
    gradients are multiplied by.
    """

    def kernel(hyper, room, length, partial, count):
        total = np.float64(0)
        k = np.int64(cuda.threadIdx.x)
        while k < count:
            total = total + numbers(partial + 8 * k, "f8", 1)[0]
            k += cuda.blockDim.x
        total = over_block(total)
        told = cuda.shared.array(2, np.float64)
        if cuda.threadIdx.x == 0:
            given = numbers(hyper + 8 * OUT, "f8", HEAD)
            limit, rescale, guard = given[LIMIT], given[RESCALE], given[GUARD]
            norm = sqrt(total) * abs(rescale)
            out = numbers(hyper, "f8", OUT)
            finite = norm - norm == 0
            skip = 0.0 if finite or guard == 0 else 1.0
            put(hyper, "f8", (skip, norm, out[SKIPPED] + skip, out[STRAY]))
            told[0] = rescale * limit / norm if finite and norm > limit else rescale
        cuda.syncthreads()
        begin = hyper + 8 * OUT
        k = HEAD + np.int64(cuda.threadIdx.x)
        while k < room:
            number = numbers(begin + 8 * k, "f8", 1)[0]
            if (k - HEAD) % length == 0:
                number = told[0]
            put(begin + 8 * (room + k), "f8", (number,))
            put(begin + 8 * (2 * room) + 4 * k, "f4", (number,))
            k += cuda.blockDim.x

    return Kernel(kernel, ("clip_norm",), 5)
