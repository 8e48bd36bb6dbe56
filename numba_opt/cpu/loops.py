"""The loops of the CPU: which elements are updated, in what order, by which thread.

`dense` makes the one kernel of a rule: any number of tensors, given as a table of addresses. Their elements
count as one long line, cut into chunks of equal length, and every thread that joins in claims the next chunk
until none is left. So tensors of any sizes share the threads evenly, no thread waits for a slower one to take
its turn, and the result does not depend on who did what.

A table has a row for each tensor (`numba_opt.core.columns`): the addresses of its gradient, of its weight,
of each state and of the half-precision weight beside a float32 one (0 where there is none), and three
numbers. A row of coefficients is ``rescale, clip, wd``, the rule's own, and for stochastic rounding two that
stand for the step.

Kernels allocate nothing, so that they cannot fail once they have begun: whoever calls them gives scratch, of
which each thread that joins in takes a piece for itself.
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

from ..compiler import cache
from ..compiler.elements import add, fetch_add, load, pointers, prefetch, prepare, store, store_stochastic
from ..compiler.rounding import key_of
from ..core.columns import ROW, STATES, TENSOR_ID, WIDTH
from ..core.rules import Rule
from ..core.storage import Layout
from .threads import CHUNK

# Lines too long for the caches are fetched ahead by hand: the processor's own prefetching does not hide the
# latency of square roots and divisions. (Of a bare kernel's speed at 10 million elements, on one thread:
# RMSProp 0.87 without and 0.94 with, GroupAdaGrad 0.76 and 0.94. In the L2 cache it costs up to 30%.)
LONG = 1_000_000  # elements of a line that is too long
BLOCK = 128  # elements that are fetched at a time
AHEAD = 32  # cache lines of each array: how far. (NAG in float16 with 16 of them 0.94 of bare, with 32 1.04.)

prepare = register_jitable(prepare)


def ceildiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def tensor_at(offsets, element):
    """Return the tensor that holds an element of the long line: the last one that starts at or before it."""
    low, high = 0, offsets.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if offsets[middle] <= element:
            low = middle
        else:
            high = middle
    return low


def row_bytes(width, size):
    """Return the bytes of a row of scratch, whole cache lines, if each of its numbers takes `size` bytes."""
    return ceildiv(width * size, 64) * 64


ceildiv = register_jitable(ceildiv)
tensor_at = register_jitable(tensor_at)
row_bytes = register_jitable(row_bytes)


@functools.cache
def dense(rule: Rule, layout: Layout) -> Any:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, offsets, coefficients, scratch, progress)``: `offsets` are the tensors' first elements on
    the long line and its length; `scratch` has a row of bytes for each thread that may join in,
    `scratch_bytes` of them; `progress` three int64 zeros, for the threads that joined, the chunks claimed and
    those done.
    """
    span = (_row_span if rule.per_row else _element_span)(rule, layout)
    return over_chunks(span, f"dense-{rule.function.__name__}", (rule.key, layout.text), layout.real)


def scratch_bytes(rule: Rule, layout: Layout, width: int, summed: bool = False) -> int:
    """Return a thread's bytes of scratch: a row where rows are reduced, one where gradients are `summed`."""
    bytes_of_row: int = row_bytes(width, layout.real.itemsize)
    return (int(rule.per_row) + int(summed)) * bytes_of_row


def line_of(widest: int) -> int:
    """Return how many elements of so many bytes a cache line of 64 bytes has; arrays of smaller ones follow.

    (Fetching every 16th element of float64, half of the lines, FTML reached 0.77 of a bare kernel's speed at
    10 million elements and 0.90 with every 8th; of float16 and bfloat16 every 32nd does.)
    """
    return 64 // widest


def _state_store(layout: Layout) -> Callable[..., Any]:
    """Make the function that stores states: ``store_states(states, i, values, key)``."""

    @register_jitable
    def nearest(states, i, values, key):
        store(states, i, values)

    @register_jitable
    def stochastic(states, i, values, key):
        store_stochastic(states, i, values, key)

    return stochastic if layout.stochastic else nearest


def coefficient_reader(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """Make the reader of coefficients: ``c, key = read(coefficients, k, tensor)``, the key of random bits.

    It belongs outside of loops: the view of the row is counted in and out by atomic operations, which wait
    for all that has been written (a quarter of the time of GroupAdaGrad, when it was made for each row).
    """
    count, stochastic = rule.row_length(), layout.stochastic

    @register_jitable
    def read(coefficients, k, tensor):
        row = coefficients[k]
        key = key_of(row[-2], row[-1], tensor) if stochastic else np.uint32(0)
        return to_fixed_tuple(row, count), key

    return read


def _element_span(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """A loop over a range of elements of one tensor."""
    read, store_states = coefficient_reader(rule, layout), _state_store(layout)
    function = register_jitable(
        rule.function
    )  # not njit: a dispatcher's random id would defeat the disk cache
    n_array, codes, real = len(layout.codes), layout.text, layout.real.type
    line = line_of(layout.widest)
    ahead = AHEAD * line
    end = STATES + rule.n_state  # of what is read; a model weight may follow, which is written

    @register_jitable
    def span(entry, coefficients, start, stop, chunk, long, own):
        array = pointers(to_fixed_tuple(entry, n_array), codes)
        c, key = read(coefficients, entry[ROW], entry[TENSOR_ID])
        for first in range(start, stop, BLOCK):
            if long:
                for i in range(np.uintp(first + ahead), np.uintp(first + ahead + BLOCK), line):
                    prefetch(array, i)
            # an index that may be negative won't vectorise
            for i in range(np.uintp(first), np.uintp(min(first + BLOCK, stop))):
                value = load(array[:end], i, real)
                grad = prepare(value[0], value[1], c[0], c[1], c[2])
                out = function(value[1], grad, *value[2:], *c[3:])
                store(array[1:2], i, out)
                store_states(array[2:end], i, out[1:], key)
                store(array[end:], i, out)

    return span


def _row_span(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """A loop over the rows that begin in a range of elements of one tensor."""
    row, read = row_step(rule, layout), coefficient_reader(rule, layout)
    n_array, codes = len(layout.codes), f"{layout.text} {layout.compute}"
    line = line_of(layout.widest)
    ahead = AHEAD * line

    @register_jitable
    def span(entry, coefficients, start, stop, chunk, long, own):
        width = np.int64(entry[WIDTH])
        begin, end = ceildiv(start, width), ceildiv(stop, width)
        c, key = read(coefficients, entry[ROW], entry[TENSOR_ID])
        array = pointers((*to_fixed_tuple(entry, n_array), own), codes)
        for r in range(begin, end):
            if long:
                for i in range(np.uintp(r * width + ahead), np.uintp((r + 1) * width + ahead), line):
                    prefetch(array[:2], i)
            row(array, c, key, width, r, r)

    return span


def row_step(rule: Rule, layout: Layout, absent: bool = False) -> Callable[..., Any]:
    """One row's update: ``row(array, c, key, width, r, at)`` takes the gradient's row `at` to row `r`.

    Where the gradient is `absent`, it counts as zeros and the first array is not read. With `per_row` its
    mean square comes first, then its elements; the states are one number each. The last array is a spare row,
    where gradients lie in between. (Preparing them twice took GroupAdaGrad 10% more time in float32 and 20%
    in float16, which is converted as well.)
    """
    store_states, function = _state_store(layout), register_jitable(rule.function)
    real, end = layout.real.type, STATES + rule.n_state

    @register_jitable
    def given(array, i):
        return load(array[:1], i, real)[0]

    @register_jitable
    def zero(array, i):
        return real(0)

    gradient = zero if absent else given

    @register_jitable
    def element_row(array, c, key, width, r, at):
        first, source = np.uintp(r * width), np.uintp(at * width)
        for j in range(np.uintp(width)):
            value = load(array[1:end], first + j, real)
            grad = prepare(gradient(array, source + j), value[0], c[0], c[1], c[2])
            out = function(value[0], grad, *value[1:], *c[3:])
            store(array[1:2], first + j, out)
            store_states(array[2:end], first + j, out[1:], key)
            store(array[end:-1], first + j, out)

    @register_jitable
    def reduced_row(array, c, key, width, r, at):
        first, source = np.uintp(r * width), np.uintp(at * width)
        state = new = load(array[2:end], np.uintp(r), real)
        total = real(0)
        for j in range(np.uintp(width)):
            weight = load(array[1:2], first + j, real)
            grad = prepare(gradient(array, source + j), weight[0], c[0], c[1], c[2])
            store(array[-1:], j, (grad,))
            total = add(total, grad * grad)
        mean_square = total / real(width)
        for j in range(np.uintp(width)):
            grad = load(array[-1:], j)
            weight = load(array[1:2], first + j, real)
            out = function(weight[0], grad[0], *state, mean_square, *c[3:])
            store(array[1:2], first + j, out[:1])
            store(array[end:-1], first + j, out[:1])
            new = out[1:]
        store_states(array[2:end], np.uintp(r), new, key)

    return reduced_row if rule.per_row else element_row


def over_chunks(span: Callable[..., Any], name: str, key: tuple[Any, ...], real: np.dtype) -> Any:
    """The kernel in which threads claim chunks of the long line and call `span` for each tensor's part."""

    def kernel(table, offsets, coefficients, scratch, progress):
        place = fetch_add(progress, 0, 1)
        if place >= scratch.shape[0]:
            return
        own = np.uint64(scratch.ctypes.data) + np.uint64(place * scratch.shape[1])
        total = offsets[-1]
        chunks = ceildiv(total, CHUNK)
        while True:
            chunk = fetch_add(progress, 1, 1)
            if chunk >= chunks:
                break
            start = chunk * CHUNK
            stop = min(start + CHUNK, total)
            t = tensor_at(offsets, start)
            while start < stop:
                end = min(stop, offsets[t + 1])
                if start < end:  # else the tensor has no elements, and its rows perhaps no length
                    span(
                        table[t], coefficients, start - offsets[t], end - offsets[t], chunk, total > LONG, own
                    )
                start = end
                t += 1
            fetch_add(progress, 2, 1)

    compiled = cache.compiled(kernel, span.__qualname__, *key, name=name)
    line = types.int64[::1]
    arguments = (types.uint64[:, ::1], line, from_dtype(real)[:, ::1], types.uint8[:, ::1], line)
    compiled.entry_point = compiled.compile(arguments)
    compiled.disable_compile()
    return compiled
