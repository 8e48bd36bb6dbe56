"""The loops of the CPU: which elements are updated, in what order, by which thread.

`dense` makes the one kernel of a rule: any number of tensors, given as a table of addresses. Their
elements count as one long line, cut into chunks of equal length, and every thread that joins in claims
the next chunk until none is left. So tensors of any sizes share the threads evenly, no thread waits for
a slower one to take its turn, and the result does not depend on who did what.

A table has a row of uint64 for each tensor: the address of its gradient, of its weight, of each state,
and last the length of its rows. Hyper-parameters come as one row of reals for each tensor: ``rescale,
clip, wd`` and then the rule's own.
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
from .elements import fetch_add, load, pointers, prepare, store

CHUNK = 16384  # elements: 64 KiB of each float32 array, so a chunk's arrays fit in a core's L2 cache
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
def dense(rule: Callable[..., Any], n_state: int, per_row: bool, dtype: str) -> Any:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, offsets, hyper, progress)``: `offsets` are the tensors' first elements on the long
    line and its length; `progress` two int64 zeros, for the chunks claimed and the chunks done.
    """
    span = (_row_span if per_row else _element_span)(rule, n_state, dtype)

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
                span(table[t], hyper[t], start - offsets[t], end - offsets[t])
                start = end
                t += 1
            fetch_add(progress, 1, 1)

    compiled = cache.compiled(kernel, cache.fingerprint(rule), n_state, per_row, dtype)
    line, real = types.int64[::1], from_dtype(np.dtype(dtype))
    compiled.compile((types.uint64[:, ::1], line, real[:, ::1], line))
    compiled.disable_compile()
    return compiled


def _element_span(rule: Callable[..., Any], n_state: int, dtype: str) -> Callable[..., Any]:
    """A loop over a range of elements of one tensor."""
    rule = register_jitable(rule)  # not njit: a dispatcher's random id would defeat the disk cache
    real = np.dtype(dtype)
    n_array = 2 + n_state
    n_hyper = 3 + rule.__code__.co_argcount - n_array

    @register_jitable
    def span(row, hyper, start, stop):
        array = pointers(to_fixed_tuple(row, n_array), real)
        h = to_fixed_tuple(hyper, n_hyper)
        for i in range(np.uintp(start), np.uintp(stop)):  # an index that may be negative won't vectorise
            value = load(array, i)
            grad = prepare(value[0], value[1], h[0], h[1], h[2])
            store(array[1:], i, rule(value[1], grad, *value[2:], *h[3:]))

    return span


def _row_span(rule: Callable[..., Any], n_state: int, dtype: str) -> Callable[..., Any]:
    """A loop over the rows that begin in a range of elements: their mean square, then their elements."""
    rule = register_jitable(rule)
    real = np.dtype(dtype)
    n_array = 2 + n_state
    n_hyper = 3 + rule.__code__.co_argcount - n_array - 1

    @register_jitable
    def span(row, hyper, start, stop):
        array = pointers(to_fixed_tuple(row, n_array), real)
        element, states = array[:2], array[2:]
        h = to_fixed_tuple(hyper, n_hyper)
        width = np.int64(row[n_array])
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
                new = out[1:]
            store(states, np.uintp(r), new)

    return span
