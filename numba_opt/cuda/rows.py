"""The kernels for sparse gradients on a GPU: their rows are found, summed, brought up to date and updated.

Row numbers stay on the device, which sorts them where rows may come more than once. Whoever owns a row sums
its parts, always in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from .buffer import SKIP, STRAY
from .elements import SIZES, agreed, meet, numbers, put, rounded
from .loops import (
    WARP,
    Kernel,
    compute_code,
    first_row,
    length_of,
    number_at,
    over,
    over_warp,
    place_of_row,
    reader,
    reader_at,
    real_of,
    row_step,
    squaring_alone,
    tensor_at,
    u4,
    updates,
    walk,
)

RUN = 1024  # keys that a block sorts, in 16 KiB: 100,000 take 8 launches (from runs of one key, 18)

HEADER = 8  # numbers before the addresses of arrays, in the table of `rows`

COUNT = 16  # bytes of a history before its rows of hyper-parameters: how many there are, and may be

PLACE = (1 << 32) - 1  # the bits of a key that say where a touched row's part is; those above are the row


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
VACANT = -(1 << 63)  # instead of one in a block: nobody's place


def bisection(key_at: Callable[..., Any]) -> Callable[..., Any]:
    """Which is the first of some sorted keys that is not less than one: ``find(keys, low, high, key)``."""
    key_at = register_jitable(key_at)

    @register_jitable
    def find(keys, low, high, key):
        while low < high:
            middle = (low + high) >> 1
            if key_at(keys, middle) < key:
                low = middle + 1
            else:
                high = middle
        return low

    return find


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
    first_of = bisection(lambda keys, k: number_at(keys, k) >> 32)

    @register_jitable
    def source(head, k, width):
        low = first_of(head[3], np.int64(0), head[5], k)
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

    first_from = bisection(column_at)

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
        p = first_from(columns, p, end if rising else p, j)
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
    is not recorded, nor is one for which a history has no room; whoever counts the steps sees to that.
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
            if count < number_at(history, 1):
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
    place_among = bisection(key_at)

    @register_jitable
    def place_of(keys, k, key, run, count):
        other = (k & -run) ^ run  # where the other run begins
        first = min(other, count)
        before = place_among(keys, first, min(other + run, count), key) - first
        return (k & -(2 * run)) + (k & (run - 1)) + before

    return place_of


@functools.cache
def keys(place: str) -> Kernel:
    """The kernel that makes keys of row numbers: the row in the upper half, its place in the lower one.

    ``kernel(rows, count, height, out)``. Rows outside come after all others, as if their number were
    `height`; those that are VACANT come first, as NOTHING. Each block sorts RUN keys in its own memory.
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
                if not 0 <= row < height:
                    row = np.int64(NOTHING) if row == VACANT else height
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
