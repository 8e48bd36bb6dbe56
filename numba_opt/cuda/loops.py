"""What the loops of a GPU are made of: units, walks over elements, the steps of rows and elements.

A table is what `numba_opt.cpu.loops` says, in the device's memory, but that a row of hyper-parameters is
named by where it begins among them all; and the rules, what a gradient goes through before it gets to one and
rounding by chance are the same functions. A tensor is cut into units: CHUNK elements, which a block shares,
so that inside it 32-bit indices do; rules that need a row's mean square, and sparse gradients, take a row,
which a warp shares. One launch serves all tensors of a table: units count as one long line, and whoever is
free takes the next one of its own, finding the tensor by bisection.

Kernels get int64 and nothing else, addresses and numbers, which is what makes a launch cheap to prepare, and
hyper-parameters from the device's memory, where `set_hyper` writes them: nothing is compiled anew when they
change, and a captured graph sees new ones. Products and sums are not contracted, so that a GPU gives the
CPU's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..compiler.elements import prepare
from ..compiler.rounding import key_of
from .buffer import HEAD, OUT, SKIP
from .elements import ACCESS, SIZES, aligned, from_other, load, meet, moved, numbers, store

CHUNK = 4096  # elements: 16 for each thread of a block
THREADS = 256
WARP = 32
WARPS = 4  # in a block that updates rows
SUMS = THREADS // WARP  # of warps, that a block adds

prepare = register_jitable(prepare)
u4 = np.uint32


def plus(total, grad):
    """The rule of accumulation, under which the weight is a sum of gradients."""
    return (total + grad,)


def begun(total, grad, zero):
    """The same for the first gradient, whatever the sum's memory holds; -0 becomes 0, as it does in a sum."""
    return (grad + zero,)


@register_jitable
def as_it_comes(grad, weight, rescale, bound, wd):
    """A gradient that is to be added up: 0 times the sum so far would be NaN if that has overflowed."""
    return grad


class Kernel(NamedTuple):
    """A kernel that is yet to be compiled: a function of int64 and float64, and what tells it apart."""

    function: Callable[..., Any]
    key: tuple[Any, ...]
    integers: int
    reals: int = 0


def lanes_of(layout: str) -> int:
    """How many elements an access of 16 bytes holds, of the array with the smallest ones."""
    return ACCESS // min(int(code[-1]) for code in layout.split())


def compute_code(weight: str) -> str:
    """The precision in which a rule is evaluated: double for double weights, else single."""
    return "f8" if weight == "f8" else "f4"


# ---------------------------------------------------------------- what loops are made of


@register_jitable
def number_at(address, k):
    """The int64 number `k` from an address on."""
    return numbers(address + 8 * k, "i8", 1)[0]


@register_jitable
def tensor_at(starts, tensors, unit):
    """Which tensor holds a unit of the long line: the last one that starts at or before it."""
    low, high = 0, tensors
    while high - low > 1:
        middle = (low + high) >> 1
        if number_at(starts, middle) <= unit:
            low = middle
        else:
            high = middle
    return low


@register_jitable
def over_warp(number):
    """The sum of the numbers that a warp's threads have, always in the same order; all of them get it."""
    mask = 1
    while mask < WARP:
        number = number + from_other(number, np.int32(mask))
        mask = mask << 1
    return number


@register_jitable
def over_block(number):
    """The sum of the numbers that a block's threads have, always in the same order; thread 0 gets it."""
    sums = cuda.shared.array(SUMS, np.float64)
    number = over_warp(number)
    if cuda.threadIdx.x % WARP == 0:
        sums[cuda.threadIdx.x // WARP] = number
    cuda.syncthreads()
    total = np.float64(0)
    if cuda.threadIdx.x == 0:
        k = 0
        while k < cuda.blockDim.x // WARP:
            total = total + sums[k]
            k += 1
    cuda.syncthreads()
    return total


@register_jitable
def first_chunk():
    """The first unit of a block that takes chunks, and how many blocks there are."""
    return np.int64(cuda.blockIdx.x), np.int64(cuda.gridDim.x)


@register_jitable
def first_row():
    """The first unit of a warp that takes rows, and how many warps there are."""
    warps = np.int64(cuda.blockDim.x // WARP)
    return cuda.blockIdx.x * warps + cuda.threadIdx.x // WARP, cuda.gridDim.x * warps


def over(first: Callable[..., Any], visit: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over those units of the long line that are this block's or warp's: ``loop(table, ..., x)``.

    ``visit(entry, columns, t, k, unit, x)`` gets the row of the table of a unit's tensor, that tensor's
    number, the unit's number among those of the tensor, and among all.
    """
    visit = register_jitable(visit)

    @register_jitable
    def loop(table, columns, starts, tensors, x):
        units = number_at(starts, tensors)
        unit, stride = first()
        while unit < units:
            t = tensor_at(starts, tensors, unit)
            visit(table + 8 * columns * t, columns, t, unit - number_at(starts, t), unit, x)
            unit += stride

    return loop


def updates(first: Callable[..., Any], visit: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that updates units, unless the step is to be skipped; `x` is what `over` does not take."""
    loop = over(first, visit)

    def kernel(table, columns, offsets, starts, tensors, hyper, room):
        if number_at(hyper, SKIP) == 0:
            loop(table, columns, starts, tensors, (offsets, hyper, room))

    kernel.__qualname__ = visit.__qualname__  # which is what profilers show
    return kernel


@register_jitable
def elements_of(offsets, t, chunk):
    """The first element of a tensor's chunk, and how many it has."""
    first = chunk * CHUNK
    left = number_at(offsets, t + 1) - number_at(offsets, t) - first
    return first, u4(min(left, CHUNK))


def for_each(lanes: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``(function(a[0], b[0], x), function(a[1], b[1], x), ...)``, for so many of them, written out."""
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


def length_of(rule: Callable[..., Any], n_state: int, per_row: bool, own: str) -> int:
    """The length of a rule's row of hyper-parameters, with what chance is drawn from, if anything is."""
    return 3 + rule.__code__.co_argcount - 2 - n_state - int(per_row) + 2 * ("s" in own)


def place_of_row(weight: str) -> Callable[..., Any]:
    """Where a tensor's row of hyper-parameters is: ``place(hyper, room, entry, columns)``.

    In the buffer, whose parts have room for so many numbers, and from its row of the table.
    """
    code = compute_code(weight)
    size, parts = SIZES[code], 1 if code == "f8" else 2

    @register_jitable
    def place(hyper, room, entry, columns):
        return hyper + 8 * (OUT + parts * room) + size * (HEAD + number_at(entry, columns - 1))

    return place


def reader(rule: Callable[..., Any], n_state: int, per_row: bool, own: str) -> Callable[..., Any]:
    """What reads all that a rule is given but elements: ``read(hyper, room, entry, columns)``.

    From the buffer, whose parts have room for so many numbers, and from a tensor's row of the table; see
    `reader_at`.
    """
    read_at, place = reader_at(rule, n_state, per_row, own), place_of_row(own.split()[0])

    @register_jitable
    def read(hyper, room, entry, columns):
        return read_at(place(hyper, room, entry, columns), entry, columns)

    return read


def reader_at(rule: Callable[..., Any], n_state: int, per_row: bool, own: str) -> Callable[..., Any]:
    """What reads a row of hyper-parameters at an address: ``read_at(place, entry, columns)``.

    The result is the hyper-parameters, three that all have and the rule's own, and the key of what is left to
    chance, if anything is, for the first element of the tensor that has that row of the table.
    """
    code, by_chance = compute_code(own.split()[0]), "s" in own
    length = length_of(rule, n_state, per_row, own)
    count = length - 2 * by_chance

    @register_jitable
    def key(h, tensor):
        return key_of(h[count], h[count + 1], tensor)

    @register_jitable
    def no_key(h, tensor):
        return u4(0)

    key_for = key if by_chance else no_key

    @register_jitable
    def read_at(place, entry, columns):
        h = numbers(place, code, length)
        return h[:count], key_for(h, number_at(entry, columns - 3))

    return read_at


@register_jitable
def further(x, elements):
    """What `reader` reads, for a tensor's element from which on elements are counted."""
    return x[0], u4(x[1] + u4(elements))


def walk(code: str, own: str, visit: Callable[[int], Any], gather: Any = None) -> Callable[..., Any]:
    """A walk over `n` consecutive elements by every `stride`-th thread from `thread` on.

    ``walk(source, array, n, thread, stride, x)`` calls ``visit(lanes)(grads, array, i, x)`` for each group of
    elements, at 16 bytes an access where all arrays allow it, and sums what comes back. The source of
    gradients is their address, and `code` how they are stored, unless `gather` knows how to come by single
    ones.
    """
    lanes = 1 if gather else lanes_of(f"{code} {own}")
    real = real_of(own.split()[0]) if own else np.float64
    narrow, one = visit(1), gather or register_jitable(lambda source, i: load(source, code, i, 1))
    if lanes > 1:
        wide, many = visit(lanes), register_jitable(lambda source, i: load(source, code, i, lanes))

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


def real_of(weight: str) -> Any:
    """The type of a rule's numbers."""
    return np.float64 if weight == "f8" else np.float32


def updating(rule: Callable[..., Any], n_value: int, own: str) -> Callable[[int], Any]:
    """What a walk does to update elements by a rule. `own` is how what changes is stored: a weight and the
    states that go with its elements, `n_value` arrays in all, and perhaps a copy of the weight."""
    codes = own.split()
    values, copied = " ".join(codes[:n_value]), " ".join(codes[n_value:])
    prepared = as_it_comes if rule in (plus, begun) else prepare
    real, rule = real_of(codes[0]), register_jitable(rule)

    def step(grad, value, h):
        g = prepared(real(grad[0]), value[0], h[0], h[1], h[2])
        return rule(value[0], g, *value[1:], *h[3:])

    def visit(lanes: int) -> Any:
        each = for_each(lanes, step)

        @register_jitable
        def update(grads, array, i, x):
            out = each(grads, load(array[:n_value], values, i, lanes), x[0])
            store(array[:n_value], values, i, out, x[1])
            store(array[n_value:], copied, i, out, x[1])
            return real(0)

        return update

    return visit


def squaring(weight: str) -> Callable[[int], Any]:
    """What a walk does to sum the squares of the gradients that a rule would see."""
    real = real_of(weight)

    def square(grad, value, h):
        g = prepare(real(grad[0]), value[0], h[0], h[1], h[2])
        return g * g

    def visit(lanes: int) -> Any:
        each, total = for_each(lanes, square), sum_of(lanes)
        return register_jitable(
            lambda grads, array, i, x: total(each(grads, load(array[:1], weight, i, lanes), x[0]))
        )

    return visit


def squaring_alone(lanes: int) -> Any:
    """What a walk does to sum the squares of gradients as they come, in double precision."""

    def square(grad, value, x):
        return np.float64(grad[0]) * np.float64(grad[0])

    each, total = for_each(lanes, square), sum_of(lanes)
    return register_jitable(lambda grads, array, i, x: total(each(grads, grads, x)))


def row_step(
    rule: Callable[..., Any], n_state: int, per_row: bool, own: str, code: str, gather: Any = None
) -> Any:
    """One row's update by a warp: ``row(source, array, r, width, x)``, for row `r` of a tensor.

    With `per_row` its mean square comes first, then its elements; the states are one number each.
    """
    codes = own.split()
    end, real, thread_bits = 1 + n_state, real_of(codes[0]), u4(WARP - 1)
    if not per_row:
        update = walk(code, own, updating(rule, end, own), gather)

        @register_jitable
        def element_row(source, array, r, width, x):
            thread, first = u4(cuda.threadIdx.x) & thread_bits, r * width
            update(source, moved(array, own, first), u4(width), u4(thread), u4(WARP), further(x, first))

        return element_row
    wide, narrow = " ".join([codes[0], *codes[end:]]), " ".join(codes[1:end])
    squares = walk(code, wide, squaring(codes[0]), gather)
    update = walk(code, wide, updating(rule, 1, wide), gather)
    rule = register_jitable(rule)

    @register_jitable
    def reduced_row(source, array, r, width, x):
        h, key = further(x, r)
        thread, n = u4(u4(cuda.threadIdx.x) & thread_bits), u4(width)
        state_at = moved(array[1:end], narrow, r)
        state = load(state_at, narrow, u4(0), 1)[0]
        here = moved(array[:1] + array[end:], wide, r * width)
        mean_square = over_warp(squares(source, here, n, thread, u4(WARP), x)) / real(width)
        update(source, here, n, thread, u4(WARP), (h[:3] + state + (mean_square,) + h[3:], key))
        meet()  # all have read the row's state: that they shuffle makes them wait, but orders no memory
        if thread == 0:  # the states' update does not depend on the element
            out = rule(real(0), real(0), *state, mean_square, *h[3:])
            store(state_at, narrow, u4(0), (out[1:],), key)

    return reduced_row
