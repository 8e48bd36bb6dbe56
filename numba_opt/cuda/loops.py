"""The work of a GPU's kernels on elements and rows: walks over them, and the steps of a rule.

The rules, what a gradient goes through before it gets to one, and stochastic rounding are the CPU's
functions. Products and sums are not contracted, so that a GPU gives the CPU's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..compiler.elements import prepare
from ..compiler.rounding import key_of
from ..core.columns import ROW, TENSOR_ID
from ..core.rules import Rule
from ..core.storage import Layout, size_of
from .buffer import HEAD, OUT
from .elements import ACCESS, aligned, load, moved, numbers, store, syncwarp
from .units import WARP, number_at, u4, warp_sum

prepare = register_jitable(prepare)


def plus(total, grad):
    """The rule of accumulation, under which the weight is a sum of gradients."""
    return (total + grad,)


def begun(total, grad, zero):
    """Begin a sum with its first gradient, whatever its memory holds; -0 becomes 0, as it does in a sum."""
    return (grad + zero,)


@register_jitable
def unprepared(grad, weight, rescale, bound, wd):
    """A gradient that is to be added up: 0 times the sum so far would be NaN if that has overflowed."""
    return grad


def real_of(compute: str) -> Any:
    """The type of a rule's numbers."""
    return np.float64 if compute == "f64" else np.float32


# ---------------------------------------------------------------- coefficients


def row_address(compute: str) -> Callable[..., Any]:
    """Make ``address(buffer, room, entry, columns)``, the address of a tensor's row of coefficients.

    In the buffer, whose parts have room for so many numbers, and from its row of the table.
    """
    size, parts = size_of(compute), 1 if compute == "f64" else 2

    @register_jitable
    def address(buffer, room, entry, columns):
        return buffer + 8 * (OUT + parts * room) + size * (HEAD + number_at(entry, columns + ROW))

    return address


def coefficient_reader(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """Make ``read(buffer, room, entry, columns)``, which reads all that a rule is given but elements.

    From the buffer, whose parts have room for so many numbers, and from a tensor's row of the table; see
    `coefficient_reader_at`.
    """
    read_at, address = coefficient_reader_at(rule, layout), row_address(layout.compute)

    @register_jitable
    def read(buffer, room, entry, columns):
        return read_at(address(buffer, room, entry, columns), entry, columns)

    return read


def coefficient_reader_at(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """Make ``read_at(address, entry, columns)``, which reads a row of coefficients at an address.

    The result is the coefficients, three that all have and the rule's own, and the key of random bits, if
    there are any, for the first element of the tensor that has that row of the table.
    """
    compute, length, count = layout.compute, rule.row_length(layout.stochastic), rule.row_length()

    @register_jitable
    def key(c, tensor):
        return key_of(c[count], c[count + 1], tensor)

    @register_jitable
    def no_key(c, tensor):
        return u4(0)

    key_for = key if layout.stochastic else no_key

    @register_jitable
    def read_at(address, entry, columns):
        c = numbers(address, compute, length)
        return c[:count], key_for(c, number_at(entry, columns + TENSOR_ID))

    return read_at


@register_jitable
def further(x, elements):
    """Return what `coefficient_reader` reads, for a tensor's element from which on elements are counted."""
    return x[0], u4(x[1] + u4(elements))


# ---------------------------------------------------------------- walks


def for_each(lanes: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``(function(a[0], b[0], x), function(a[1], b[1], x), ...)``, for so many of them, written out."""
    function = register_jitable(function)
    if lanes == 1:
        return register_jitable(lambda a, b, x: (function(a[0], b[0], x),))
    middle = lanes // 2
    half = for_each(middle, function)
    return register_jitable(lambda a, b, x: half(a[:middle], b[:middle], x) + half(a[middle:], b[middle:], x))


def sum_of(lanes: int) -> Callable[..., Any]:
    """The sum of a tuple of so many numbers."""
    if lanes == 1:
        return register_jitable(lambda a: a[0])
    middle = lanes // 2
    half = sum_of(middle)
    return register_jitable(lambda a: half(a[:middle]) + half(a[middle:]))


def walk(
    grad: str, own: str, real: Any, visit: Callable[[int], Any], gather: Any = None
) -> Callable[..., Any]:
    """A walk over `n` consecutive elements by every `stride`-th thread from `thread` on.

    ``walk(source, array, n, thread, stride, x)`` calls ``visit(lanes)(grads, array, i, x)`` for each group of
    elements, at 16 bytes an access where all arrays allow it, and sums what comes back. The source of
    gradients is their address, and `grad` how they are stored, unless `gather` knows how to come by single
    ones; `own` says how the other arrays are stored.
    """
    lanes = 1 if gather else ACCESS // min(map(size_of, f"{grad} {own}".split()))
    narrow, one = visit(1), gather or register_jitable(lambda source, i: load(source, grad, i, 1))
    if lanes > 1:
        wide, many = visit(lanes), register_jitable(lambda source, i: load(source, grad, i, lanes))

    @register_jitable
    def by_one(source, array, i, n, stride, x):
        total = real(0)
        while i < n:
            total = total + narrow(one(source, i), array, i, x)
            i = u4(i + stride)
        return total

    @register_jitable
    def run(source, array, n, thread, stride, x):
        total = real(0)
        groups = u4(n // u4(lanes)) if aligned(source + array) else u4(0)
        i = thread
        while i < groups:
            total = total + wide(many(source, i), array, i, x)
            i = u4(i + stride)
        return total + by_one(source, array, u4(groups * u4(lanes) + thread), n, stride, x)

    @register_jitable
    def run_by_one(source, array, n, thread, stride, x):
        return by_one(source, array, thread, n, stride, x)

    return run if lanes > 1 else run_by_one


def updating(rule: Rule, values: str, model_weight: str, real: Any) -> Callable[[int], Any]:
    """Make the visitor of a walk that updates elements by a rule.

    `values` says how what changes is stored, the weight and the states that go with its elements;
    `model_weight` the half-precision weight beside a float32 one, if there is one.
    """
    n_value = len(values.split())
    prepared = unprepared if rule.function in (plus, begun) else prepare
    function = register_jitable(rule.function)

    def step(grad, value, c):
        g = prepared(real(grad[0]), value[0], c[0], c[1], c[2])
        return function(value[0], g, *value[1:], *c[3:])

    def visit(lanes: int) -> Any:
        each = for_each(lanes, step)

        @register_jitable
        def update(grads, array, i, x):
            out = each(grads, load(array[:n_value], values, i, lanes), x[0])
            store(array[:n_value], values, i, out, x[1])
            store(array[n_value:], model_weight, i, out, x[1])
            return real(0)

        return update

    return visit


def squaring(weight: str, real: Any) -> Callable[[int], Any]:
    """Make the visitor of a walk that sums the squares of the gradients that a rule would see."""

    def square(grad, value, c):
        g = prepare(real(grad[0]), value[0], c[0], c[1], c[2])
        return g * g

    def visit(lanes: int) -> Any:
        each, total = for_each(lanes, square), sum_of(lanes)
        return register_jitable(
            lambda grads, array, i, x: total(each(grads, load(array[:1], weight, i, lanes), x[0]))
        )

    return visit


def squaring_alone(lanes: int) -> Any:
    """Make the visitor of a walk that sums the squares of gradients as they come, in double precision."""

    def square(grad, value, x):
        return np.float64(grad[0]) * np.float64(grad[0])

    each, total = for_each(lanes, square), sum_of(lanes)
    return register_jitable(lambda grads, array, i, x: total(each(grads, grads, x)))


# ---------------------------------------------------------------- rows


def row_step(rule: Rule, layout: Layout, grad: str, gather: Any = None) -> Any:
    """One row's update by a warp: ``row(source, array, r, width, x)``, for row `r` of a tensor.

    `layout` is that of a tensor's own arrays, `grad` and `gather` as in `walk`. With `per_row` the gradient's
    mean square comes first, then the row's elements; the states are one number each.
    """
    own, real, thread_bits = layout.own.text, real_of(layout.compute), u4(WARP - 1)
    weight, model_weight, end = layout.weight, layout.model_weight, 1 + rule.n_state
    if not rule.per_row:
        update = walk(grad, own, real, updating(rule, layout.values, model_weight, real), gather)

        @register_jitable
        def element_row(source, array, r, width, x):
            thread, first = u4(cuda.threadIdx.x) & thread_bits, r * width
            update(source, moved(array, own, first), u4(width), u4(thread), u4(WARP), further(x, first))

        return element_row
    wide, narrow = f"{weight} {model_weight}".rstrip(), " ".join(layout.states)
    squares = walk(grad, wide, real, squaring(weight, real), gather)
    update = walk(grad, wide, real, updating(rule, weight, model_weight, real), gather)
    function = register_jitable(rule.function)

    @register_jitable
    def reduced_row(source, array, r, width, x):
        c, key = further(x, r)
        thread, n = u4(u4(cuda.threadIdx.x) & thread_bits), u4(width)
        state_at = moved(array[1:end], narrow, r)
        state = load(state_at, narrow, u4(0), 1)[0]
        here = moved(array[:1] + array[end:], wide, r * width)
        mean_square = warp_sum(squares(source, here, n, thread, u4(WARP), x)) / real(width)
        update(source, here, n, thread, u4(WARP), (c[:3] + state + (mean_square,) + c[3:], key))
        syncwarp()  # all have read the row's state: that they shuffle makes them wait, but orders no memory
        if thread == 0:  # the states' update does not depend on the element
            out = function(real(0), real(0), *state, mean_square, *c[3:])
            store(state_at, narrow, u4(0), (out[1:],), key)

    return reduced_row
