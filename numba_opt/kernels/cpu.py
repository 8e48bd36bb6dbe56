"""The loops of the CPU: which elements are updated, in what order, by which thread.

`dense` makes the one kernel of a rule: any number of tensors, given as a table of addresses. Their
elements count as one long line, cut into chunks of equal length, and every thread that joins in claims
the next chunk until none is left. So tensors of any sizes share the threads evenly, no thread waits for
a slower one to take its turn, and the result does not depend on who did what.

A table has a row of uint64 for each tensor: the addresses of its gradient, of its weight, of each state
and of the copy of the weight in half precision (0 where there is none), then the length of its rows, and
the number of its row of hyper-parameters. Those are reals: ``rescale, clip, wd`` and then the rule's own.
How the elements behind the addresses are stored is the table's layout, one code for each array, such as
``"f2 f4 f4 f2"``: a float16 gradient and copy, a float32 weight and state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable
from numba.np.numpy_support import from_dtype
from numba.np.unsafe.ndarray import to_fixed_tuple

from . import cache
from .elements import add, fetch_add, load, pointers, prepare, store
from .threads import CHUNK

LANES = 16  # partial sums of a row's squares: one AVX-512 register of float32

prepare = register_jitable(prepare)


def ceildiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def tensor_at(offsets, element):
    """Which tensor holds an element of the long line: the last one that starts at or before it."""
    low, high = 0, offsets.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if offsets[middle] <= element:
            low = middle
        else:
            high = middle
    return low


ceildiv = register_jitable(ceildiv)
tensor_at = register_jitable(tensor_at)


@functools.cache
def dense(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str) -> Any:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, offsets, hyper, progress)``: `offsets` are the tensors' first elements on the long
    line and its length; `progress` two int64 zeros, for the chunks claimed and the chunks done.
    """
    span = (_row_span if per_row else _element_span)(rule, n_state, layout)

    def kernel(table, offsets, hyper, progress):
        total = offsets[-1]
        chunks = ceildiv(total, CHUNK)
        while True:
            chunk = fetch_add(progress, 0, 1)
            if chunk >= chunks:
                break
            start = chunk * CHUNK
            stop = min(start + CHUNK, total)
            t = tensor_at(offsets, start)
            while start < stop:
                end = min(stop, offsets[t + 1])
                row = table[t]
                span(row, hyper[row[-1]], start - offsets[t], end - offsets[t])
                start = end
                t += 1
            fetch_add(progress, 1, 1)

    compiled = cache.compiled(kernel, cache.fingerprint(rule), n_state, per_row, layout)
    line, real = types.int64[::1], from_dtype(compute_dtype(layout))
    compiled.compile((types.uint64[:, ::1], line, real[:, ::1], line))
    compiled.disable_compile()
    return compiled


def compute_dtype(layout: str) -> np.dtype:
    """The precision in which a rule is evaluated: double for double weights, else single."""
    return np.dtype("f8" if layout.split()[1] == "f8" else "f4")


def _element_span(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    """A loop over a range of elements of one tensor."""
    rule = register_jitable(rule)  # not njit: a dispatcher's random id would defeat the disk cache
    n_array = len(layout.split())
    end = 2 + n_state  # of what is read; a copy may follow, which is written
    n_hyper = 3 + rule.__code__.co_argcount - end

    @register_jitable
    def span(row, hyper, start, stop):
        array = pointers(to_fixed_tuple(row, n_array), layout)
        h = to_fixed_tuple(hyper, n_hyper)
        for i in range(np.uintp(start), np.uintp(stop)):  # an index that may be negative won't vectorise
            value = load(array[:end], i)
            grad = prepare(value[0], value[1], h[0], h[1], h[2])
            out = rule(value[1], grad, *value[2:], *h[3:])
            store(array[1:end], i, out)
            store(array[end:], i, out)

    return span


def _row_span(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    """A loop over the rows that begin in a range of elements: their mean square, then their elements."""
    rule = register_jitable(rule)
    real = compute_dtype(layout)
    n_array = len(layout.split())
    end = 2 + n_state
    n_hyper = 3 + rule.__code__.co_argcount - end - 1

    @register_jitable
    def span(row, hyper, start, stop):
        array = pointers(to_fixed_tuple(row, n_array), layout)
        element, states, copy = array[:2], array[2:end], array[end:]
        h = to_fixed_tuple(hyper, n_hyper)
        width = np.int64(row[-2])
        lanes = np.empty(LANES, real)
        for r in range(ceildiv(start, width), ceildiv(stop, width)):
            first = np.uintp(r * width)
            lanes[:] = 0
            for j in range(np.uintp(width)):
                value = load(element, first + j)
                grad = prepare(value[0], value[1], h[0], h[1], h[2])
                lanes[j % np.uintp(LANES)] += grad * grad
            state = load(states, np.uintp(r))
            mean_square = lanes.sum() / real.type(width)
            new = state
            for j in range(np.uintp(width)):
                value = load(element, first + j)
                grad = prepare(value[0], value[1], h[0], h[1], h[2])
                out = rule(value[1], grad, *state, mean_square, *h[3:])
                store(element[1:], first + j, out[:1])
                store(copy, first + j, out[:1])
                new = out[1:]
            store(states, np.uintp(r), new)

    return span


@functools.cache
def squares(code: str) -> Any:
    """The kernel that sums the squares of all gradients of a table, stored as `code` says.

    ``kernel(table, offsets, partial, progress)`` writes the sum of each chunk, in double precision, so that
    the total is the same for any number of threads and no float32 gradient overflows it.
    """

    @register_jitable
    def span(row, start, stop):
        array = pointers((row[0],), code)
        total = np.float64(0)
        for i in range(np.uintp(start), np.uintp(stop)):
            value = np.float64(load(array, i)[0])
            total = add(total, value * value)
        return total

    def kernel(table, offsets, partial, progress):
        total = offsets[-1]
        while True:
            chunk = fetch_add(progress, 0, 1)
            if chunk >= partial.size:
                break
            start = chunk * CHUNK
            stop = min(start + CHUNK, total)
            t = tensor_at(offsets, start)
            found = np.float64(0)
            while start < stop:
                end = min(stop, offsets[t + 1])
                found += span(table[t], start - offsets[t], end - offsets[t])
                start = end
                t += 1
            partial[chunk] = found
            fetch_add(progress, 1, 1)

    compiled = cache.compiled(kernel, cache.fingerprint(kernel), code)
    line = types.int64[::1]
    compiled.compile((types.uint64[:, ::1], line, types.float64[::1], line))
    compiled.disable_compile()
    return compiled
