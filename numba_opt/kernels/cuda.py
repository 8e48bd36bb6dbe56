"""The loops of a GPU: which elements are updated, by which thread. The names are those of the CPU's loops.

A table is what `numba_opt.kernels.cpu` says, in the device's memory, but that a row of hyper-parameters is
named by where it begins among them all; and the rules, what a gradient goes through before it gets to one and
rounding by chance are the same functions. A tensor is cut into units: `dense` takes CHUNK elements
as one, which a block shares, so that inside it 32-bit indices do; rules that need a row's mean square, and
sparse gradients, take a row, which a warp shares. One launch serves all tensors of a table: units count as
one long line, and whoever is free takes the next one of its own, finding the tensor by bisection.

Kernels get int64 and nothing else, addresses and numbers, which is what makes a launch cheap to prepare, and
hyper-parameters from the device's memory, where `set_hyper` writes them: nothing is compiled anew when they
change, and a captured graph sees new ones. Products and sums are not contracted, so that a GPU gives the
CPU's bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from .cuda_buffer import GUARD, HEAD, LIMIT, OUT, RESCALE, ROOM, SKIP, SKIPPED, STRAY
from .cuda_elements import (
    ACCESS,
    SIZES,
    agreed,
    aligned,
    from_other,
    load,
    meet,
    moved,
    numbers,
    put,
    rounded,
    store,
)
from .elements import prepare
from .rounding import key_of
from .scalar import sqrt

CHUNK = 4096  # elements: 16 for each thread of a block
THREADS = 256
WARP = 32
WARPS = 4  # in a block that updates rows
SUMS = THREADS // WARP  # of warps, that a block adds

RUN = 1024  # keys that a block sorts, in 16 KiB: 100,000 take 8 launches (from runs of one key, 18)

HEADER = 8  # numbers before the addresses of arrays, in the table of `rows`

COUNT = 16  # bytes of a history before its rows of hyper-parameters: how many there are, and nothing

PLACE = (1 << 32) - 1  # the bits of a key that say where a touched row's part is; those above are the row

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
        if thread == 0:  # the states' update does not depend on the element
            out = rule(real(0), real(0), *state, mean_square, *h[3:])
            store(state_at, narrow, u4(0), (out[1:],), key)

    return reduced_row


# ---------------------------------------------------------------- kernels


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
def rows(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str, form: str) -> Kernel:
    """The kernel that applies a rule to the rows that sparse gradients touch; `layout` is without gradients.

    Arguments as in `dense`. A row of the table begins with HEADER numbers: the addresses of the gradient's
    numbers, of row numbers or of where a CSR matrix's rows begin, of columns, and of keys as `merge` leaves
    them; then how many rows the tensor has and how many parts there are, and the addresses of the rows'
    stamps and of a history, if they catch up (`late`). The weight, the states and perhaps the copy come next.
    A unit is a part, or a row of a CSR matrix.

    Forms: ``"rows i8 f4"``, a block of float32 whose rows are all different ones, numbered by int64; ``"keys
    f4"``, one whose rows may come more than once: whoever meets the first of a row's keys sums them in order;
    ``"csr i4 f4"``. Rows that lead outside are left out, and STRAY says so. In ``"every-keys f4"`` and
    ``"every-csr i4 f4"`` all rows are updated, those without a gradient with zero; a unit is a row, and keys
    have one more after the last row.
    """
    kind, *index, code = form.split()
    n_array, weight = len(layout.split()), layout.split()[0]
    read = reader(rule, n_state, per_row, layout)
    source_of, gather = SOURCES[kind](code, index[0] if index else "i8", real_of(weight))
    if kind.startswith("every") and weight in ("f2", "b2"):
        gather = as_dense(gather, weight)
    step = row_step(rule, n_state, per_row, layout, code, gather)

    def visit(entry, columns, t, k, unit, x):
        _, hyper, room = x
        width = number_at(entry, columns - 2)
        row, source = source_of(numbers(entry, "i8", HEADER), k, width)
        if row == STRAYED:
            put(hyper + 8 * STRAY, "f8", (1.0,))
        elif row != NOTHING:
            given = read(hyper, room, entry, columns)
            step(source, numbers(entry + 8 * HEADER, "i8", n_array), row, width, given)

    return Kernel(updates(first_row, visit), ("rows", rule, n_state, per_row, layout, form), 7)


NOTHING, STRAYED = -1, -2  # instead of the number of a row


def _by_rows(code: str, place: str, real: Any) -> Any:
    """Gradients in a block whose rows are all different ones."""
    size, wide = SIZES[code], SIZES[place]

    @register_jitable
    def source(head, k, width):
        row = np.int64(numbers(head[1] + wide * k, place, 1)[0])
        return row if 0 <= row < head[4] else STRAYED, (head[0] + size * k * width,)

    return source, None


def _by_keys(code: str, place: str, real: Any) -> Any:
    """Gradients in a block whose rows may come more than once."""

    @register_jitable
    def source(head, k, width):
        row = number_at(head[3], k) >> 32
        parts = (head[0], head[3], k, head[5], width, row)
        if k > 0 and number_at(head[3], k - 1) >> 32 == row:
            row = np.int64(NOTHING)
        elif row >= head[4]:
            row = np.int64(STRAYED)
        return row, parts

    return source, _gather_keys(code, real)


def _by_every_row(code: str, place: str, real: Any) -> Any:
    """The same where rows without a gradient get zero: a unit is a row, or what comes after the last one."""

    @register_jitable
    def source(head, k, width):
        low, high = np.int64(0), head[5]
        while low < high:
            middle = (low + high) >> 1
            if number_at(head[3], middle) >> 32 < k:
                low = middle + 1
            else:
                high = middle
        row = np.int64(k)
        if k == head[4]:
            row = np.int64(STRAYED if low < head[5] else NOTHING)
        return row, (head[0], head[3], low, head[5], width, k)

    return source, _gather_keys(code, real)


def _by_none(code: str, place: str, real: Any) -> Any:
    """No gradients: all rows there are."""
    return register_jitable(lambda head, k, width: (np.int64(k), (head[0],))), None


def _gather_keys(code: str, real: Any) -> Any:
    """What sums an element's parts, from the first of its row's keys on."""
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
    """Gradients in the entries of a CSR matrix. With `every`, rows that have none get zero.

    A warp reads the columns of a row's n entries once, to see whether they rise. Each of the row's elements
    then reads some log2(n) of them, or all n if they do not.
    """
    size, wide = SIZES[code], SIZES[place]

    @register_jitable
    def column_at(columns, p):
        return np.int64(numbers(columns + wide * p, place, 1)[0])

    @register_jitable
    def source(head, k, width):
        begin = np.int64(numbers(head[1] + wide * k, place, 1)[0])
        end = np.int64(numbers(head[1] + wide * (k + 1), place, 1)[0])
        row = k if begin < end or every else np.int64(NOTHING)
        if begin < 0 or begin > end or end > head[5]:
            row = np.int64(STRAYED)
        p, rising = begin + 1 + cuda.threadIdx.x % WARP, True
        while rising and row >= 0 and p < end:
            rising = column_at(head[2], p - 1) <= column_at(head[2], p)
            p += WARP
        return row, (head[0], head[2], begin, end, np.int64(1 if agreed(rising) else 0))

    @register_jitable
    def gather(source, j):
        # Whoever has column j looks for it: no scratch memory, and always the same order. Where columns rise
        # it is found by bisection, else among all of the row's entries.
        data, columns, p, end, rising = source
        low, high = p, end if rising else p
        while low < high:
            middle = (low + high) >> 1
            if column_at(columns, middle) < j:
                low = middle + 1
            else:
                high = middle
        p = low
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


def as_dense(gather: Any, code: str) -> Any:
    """Sums as a dense gradient of a half-precision weight would have them, which is rounded."""
    return register_jitable(lambda source, j: ((rounded(gather(source, j)[0][0], code),),))


@functools.cache
def late(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str, form: str) -> Kernel:
    """The kernel in which rows catch up with the steps recorded since their stamps.

    Arguments as in `rows`, before which it is launched: the rows that it will update take the steps of their
    tensor's history, as a dense optimizer would have taken them with a zero gradient. A history begins with a
    count, in COUNT bytes, and has the hyper-parameters of so many steps. A row's stamp says how many of them
    it has taken; afterwards, how many there will be once this step is recorded. The form ``"none f4"`` means
    all rows, which take no step of their own; their stamps are 0 afterwards, for a history that begins anew.
    """
    kind, *index, code = form.split()
    n_array, weight, flushing = len(layout.split()), layout.split()[0], kind == "none"
    source_of, _ = SOURCES[kind](code, index[0] if index else "i8", real_of(weight))
    real, read_at = real_of(weight), reader_at(rule, n_state, per_row, layout)
    size = SIZES[compute_code(weight)] * length_of(rule, n_state, per_row, layout)
    zero = register_jitable(lambda source, j: ((real(0),),))
    step = row_step(rule, n_state, per_row, layout, code, zero)

    def kernel(table, columns, offsets, starts, tensors, hyper, room):
        if not flushing and number_at(hyper, SKIP) != 0:
            return
        units = number_at(starts, tensors)
        unit, stride = first_row()
        while unit < units:
            t = tensor_at(starts, tensors, unit)
            entry = table + 8 * columns * t
            width = number_at(entry, columns - 2)
            head = numbers(entry, "i8", HEADER)
            row, source = source_of(head, unit - number_at(starts, t), width)
            if row >= 0:
                stamp, history = head[6] + 8 * row, head[7]
                recorded = number_at(history, 0)
                q = max(number_at(stamp, 0), 0)
                while q < recorded:
                    x = read_at(history + COUNT + size * q, entry, columns)
                    step(source, numbers(entry + 8 * HEADER, "i8", n_array), row, width, x)
                    meet()  # a row's state is written by one thread and read by all
                    q += 1
                meet()  # all have read the stamp
                if cuda.threadIdx.x % WARP == 0:
                    put(stamp, "i8", (0 if flushing else recorded + 1,))
            unit += stride

    return Kernel(kernel, ("late", rule, n_state, per_row, layout, form), 7)


@functools.cache
def record(length: int, weight: str) -> Kernel:
    """The kernel that appends a step's row of hyper-parameters to the history of each tensor of a table.

    ``kernel(table, columns, tensors, hyper, room)``, the table being that of `rows`. A step that is skipped
    is not recorded.
    """
    place, stored = place_of_row(weight), compute_code(weight)
    size = SIZES[stored] * length

    def kernel(table, columns, tensors, hyper, room):
        if number_at(hyper, SKIP) != 0:
            return
        t = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while t < tensors:
            entry = table + 8 * columns * t
            history = number_at(entry, 7)
            count = number_at(history, 0)
            row = numbers(place(hyper, room, entry, columns), stored, length)
            put(history + COUNT + size * count, stored, row)
            put(history, "i8", (count + 1,))
            t += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return Kernel(kernel, ("record", length, weight), 5)


@functools.cache
def forget() -> Kernel:
    """The kernel that lets the histories of a table's tensors begin anew.

    ``kernel(table, columns, tensors)``, the table being that of `rows`.
    """

    def kernel(table, columns, tensors):
        t = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while t < tensors:
            put(number_at(table + 8 * columns * t, 7), "i8", (0,))
            t += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return Kernel(kernel, ("forget",), 3)


def placing(key_at: Callable[..., Any]) -> Callable[..., Any]:
    """Where a key belongs once sorted runs of `run` keys, a power of two, have been merged two and two.

    It is behind those of its own run that are before it, and behind those of the other run that are less,
    which are found by bisection: keys are all different, and each one goes straight to where it belongs.
    """
    key_at = register_jitable(key_at)

    @register_jitable
    def place_of(keys, k, key, run, count):
        other = (k & -run) ^ run  # where the other run begins
        low, high = min(other, count), min(other + run, count)
        first = low
        while low < high:
            middle = (low + high) >> 1
            if key_at(keys, middle) < key:
                low = middle + 1
            else:
                high = middle
        return (k & -(2 * run)) + (k & (run - 1)) + low - first

    return place_of


@functools.cache
def keys(place: str) -> Kernel:
    """The kernel that makes keys of row numbers: the row in the upper half, its place in the lower one.

    ``kernel(rows, count, height, out)``. Rows outside come after all others, as if their number were
    `height`. Each block sorts RUN keys in its own memory.
    """
    wide = SIZES[place]
    place_of, room = placing(lambda keys, k: keys[0][keys[1] + k]), 2 * RUN

    def kernel(rows, count, height, out):
        held = cuda.shared.array(room, np.int64)  # the keys, and room for them in another order
        first, thread = np.int64(cuda.blockIdx.x) * RUN, np.int64(cuda.threadIdx.x)
        while first < count:
            n, source, target, run = min(count - first, RUN), np.int64(0), np.int64(RUN), np.int64(1)
            k = thread
            while k < n:
                row = np.int64(numbers(rows + wide * (first + k), place, 1)[0])
                row = row if 0 <= row < height else height
                held[k] = (row << 32) | (first + k)
                k += cuda.blockDim.x
            cuda.syncthreads()
            while run < n:
                k = thread
                while k < n:
                    key = held[source + k]
                    held[target + place_of((held, source), k, key, run, n)] = key
                    k += cuda.blockDim.x
                cuda.syncthreads()
                source, target, run = target, source, 2 * run
            k = thread
            while k < n:
                put(out + 8 * (first + k), "i8", (held[source + k],))
                k += cuda.blockDim.x
            cuda.syncthreads()
            first += np.int64(cuda.gridDim.x) * RUN

    return Kernel(kernel, ("keys", place), 4)


@functools.cache
def merge() -> Kernel:
    """The kernel that merges sorted runs of `run` keys two and two: ``kernel(keys, count, run, out)``."""
    place_of = placing(number_at)

    def kernel(keys, count, run, out):
        k = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while k < count:
            key = number_at(keys, k)
            put(out + 8 * place_of(keys, k, key, run, count), "i8", (key,))
            k += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return Kernel(kernel, ("merge",), 4)


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
def row_squares(weight: str, form: str) -> Kernel:
    """The kernel that sums the squares of sparse gradients, each row's parts summed first.

    ``kernel(table, columns, offsets, starts, tensors, partial)``, the table being that of `rows`, writes the
    sum of each unit, in double precision, from the address `partial` on.
    """
    kind, *index, code = form.split()
    source_of, gather = SOURCES[kind](code, index[0] if index else "i8", real_of(weight))
    of_row = walk(code, "", squaring_alone, gather)

    def visit(entry, columns, t, k, unit, x):
        width = number_at(entry, columns - 2)
        row, source = source_of(numbers(entry, "i8", HEADER), k, width)
        thread, total = u4(u4(cuda.threadIdx.x) & u4(WARP - 1)), np.float64(0)
        if row >= 0:
            total = of_row(source, source[:1], u4(width), thread, u4(WARP), 0)
        total = over_warp(total)
        if thread == 0:
            put(x[0] + 8 * unit, "f8", (total,))

    loop = over(first_row, visit)

    def kernel(table, columns, offsets, starts, tensors, partial):
        loop(table, columns, starts, tensors, (partial,))

    return Kernel(kernel, ("row_squares", weight, form), 6)


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
