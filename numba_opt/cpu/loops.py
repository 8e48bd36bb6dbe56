"""The loops of the CPU: which elements are updated, in what order, by which thread.

`dense` makes the one kernel of a rule: any number of tensors, given as a table of addresses. Their
elements count as one long line, cut into chunks of equal length, and every thread that joins in claims
the next chunk until none is left. So tensors of any sizes share the threads evenly, no thread waits for
a slower one to take its turn, and the result does not depend on who did what.

A table has a row of uint64 for each tensor: the addresses of its gradient, of its weight, of each state
and of the copy of the weight in half precision (0 where there is none), then a number that stands for the
tensor, the length of its rows, and the number of its row of hyper-parameters. Those are reals: ``rescale,
clip, wd``, the rule's own, and where chance plays a part two that stand for the step.
How the elements behind the addresses are stored is the table's layout, one code for each array, such as
``"f2 f4 b2 f2"``: a float16 gradient and copy, a float32 weight, a bfloat16 state (``"sb2"``: rounded
stochastically).

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
from ..compiler.elements import add, fetch_add, load, pointers, prefetch, prepare, store, store_by_chance
from ..compiler.rounding import key_of
from .merge import BAD, GOOD, UNSORTED
from .threads import CHUNK

# Lines too long for the caches are fetched ahead by hand: the processor's own prefetching does not hide the
# latency of square roots and divisions. (Of a bare kernel's speed at 10 million elements, on one thread:
# RMSProp 0.87 without and 0.94 with, GroupAdaGrad 0.76 and 0.94. In the L2 cache it costs up to 30%.)
FAR = 1_000_000  # elements of a line that is too long
BLOCK = 128  # elements that are fetched at a time
AHEAD = 32  # cache lines of each array: how far. (NAG in float16 with 16 of them 0.94 of bare, with 32 1.04.)
NEXT = 8  # how many touched rows ahead the next one to fetch is

HEADER = 9  # numbers before the addresses of arrays, in the table of `rows`

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


def row_bytes(width, size):
    """What a row of scratch takes, whole cache lines, where each of its numbers takes `size` bytes."""
    return ceildiv(width * size, 64) * 64


ceildiv = register_jitable(ceildiv)
tensor_at = register_jitable(tensor_at)
row_bytes = register_jitable(row_bytes)


@functools.cache
def dense(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str) -> Any:
    """The kernel that applies a rule to all elements of all tensors of a table.

    ``kernel(table, offsets, hyper, scratch, progress)``: `offsets` are the tensors' first elements on the
    long line and its length; `scratch` has a row of bytes for each thread that may join in, `scratch_bytes`
    of them; `progress` three int64 zeros, for the threads that joined, the chunks claimed and those done.
    """
    span = (_row_span if per_row else _element_span)(rule, n_state, layout)
    key = (cache.fingerprint(rule), n_state, per_row, layout)
    return _over_chunks(span, f"dense-{rule.__name__}", key, compute_dtype(layout.split()[1]))


def scratch_bytes(weight: str, per_row: bool, width: int, summed: bool = False) -> int:
    """What a thread needs for itself: a row where rows are reduced, and one where gradients are `summed`."""
    bytes_of_row: int = row_bytes(width, compute_dtype(weight).itemsize)
    return (int(per_row) + int(summed)) * bytes_of_row


def compute_dtype(weight: str) -> np.dtype:
    """The precision in which a rule is evaluated: double for double weights, else single."""
    return np.dtype("f8" if weight == "f8" else "f4")


def line_of(layout: str) -> int:
    """How many elements of a layout's widest array lie in a cache line of 64 bytes.

    (Fetching every 16th element of float64, half of the lines, FTML reached 0.77 of a bare kernel's speed at
    10 million elements and 0.90 with every 8th; of float16 and bfloat16 every 32nd does.)
    """
    return 64 // max(int(code[-1]) for code in layout.split())


def _keeping(layout: str) -> Callable[..., Any]:
    """How states are stored: ``keep(states, i, values, key)``."""

    @register_jitable
    def plainly(states, i, values, key):
        store(states, i, values)

    @register_jitable
    def by_chance(states, i, values, key):
        store_by_chance(states, i, values, key)

    return by_chance if "s" in layout else plainly


def _numbers(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str) -> Callable[..., Any]:
    """What a row of hyper-parameters says: ``h, key = numbers(hyper, k, tensor)``, the key being chance's.

    It belongs outside of loops: the view of the row is counted in and out by atomic operations, which wait
    for all that has been written (a quarter of the time of GroupAdaGrad, when it was made for each row).
    """
    n_hyper = 3 + rule.__code__.co_argcount - 2 - n_state - (1 if per_row else 0)
    by_chance = "s" in layout

    @register_jitable
    def numbers(hyper, k, tensor):
        row = hyper[k]
        key = key_of(row[-2], row[-1], tensor) if by_chance else np.uint32(0)
        return to_fixed_tuple(row, n_hyper), key

    return numbers


def _element_span(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    """A loop over a range of elements of one tensor."""
    numbers = _numbers(rule, n_state, False, layout)
    keep = _keeping(layout)
    rule = register_jitable(rule)  # not njit: a dispatcher's random id would defeat the disk cache
    n_array = len(layout.split())
    real = compute_dtype(layout.split()[1]).type
    line, ahead = line_of(layout), AHEAD * line_of(layout)
    end = 2 + n_state  # of what is read; a copy may follow, which is written

    @register_jitable
    def span(entry, hyper, start, stop, chunk, far, own):
        array = pointers(to_fixed_tuple(entry, n_array), layout)
        h, key = numbers(hyper, entry[-1], entry[-3])
        for first in range(start, stop, BLOCK):
            if far:
                for i in range(np.uintp(first + ahead), np.uintp(first + ahead + BLOCK), line):
                    prefetch(array, i)
            # an index that may be negative won't vectorise
            for i in range(np.uintp(first), np.uintp(min(first + BLOCK, stop))):
                value = load(array[:end], i, real)
                grad = prepare(value[0], value[1], h[0], h[1], h[2])
                out = rule(value[1], grad, *value[2:], *h[3:])
                store(array[1:2], i, out)
                keep(array[2:end], i, out[1:], key)
                store(array[end:], i, out)

    return span


def _row_span(rule: Callable[..., Any], n_state: int, layout: str) -> Callable[..., Any]:
    """A loop over the rows that begin in a range of elements of one tensor."""
    row = row_step(rule, n_state, True, layout)
    numbers = _numbers(rule, n_state, True, layout)
    n_array = len(layout.split())
    line, ahead = line_of(layout), AHEAD * line_of(layout)
    real = compute_dtype(layout.split()[1])
    arrays = f"{layout} f{real.itemsize}"

    @register_jitable
    def span(entry, hyper, start, stop, chunk, far, own):
        width = np.int64(entry[-2])
        begin, end = ceildiv(start, width), ceildiv(stop, width)
        h, key = numbers(hyper, entry[-1], entry[-3])
        array = pointers((*to_fixed_tuple(entry, n_array), own), arrays)
        for r in range(begin, end):
            if far:
                for i in range(np.uintp(r * width + ahead), np.uintp((r + 1) * width + ahead), line):
                    prefetch(array[:2], i)
            row(array, h, key, width, r, r)

    return span


def row_step(
    rule: Callable[..., Any], n_state: int, per_row: bool, layout: str, absent: bool = False
) -> Callable[..., Any]:
    """One row's update: ``row(array, h, key, width, r, at)`` takes the gradient's row `at` to row `r`.

    Where the gradient is `absent`, it counts as zeros and the first array is not read. With `per_row` its
    mean square comes first, then its elements; the states are one number each. The last array is a spare row,
    where gradients lie in between. (Preparing them twice took GroupAdaGrad 10% more time in float32 and 20%
    in float16, which is converted as well.)
    """
    keep = _keeping(layout)
    rule = register_jitable(rule)
    real = compute_dtype(layout.split()[1]).type
    end = 2 + n_state

    @register_jitable
    def given(array, i):
        return load(array[:1], i, real)[0]

    @register_jitable
    def zero(array, i):
        return real(0)

    gradient = zero if absent else given

    @register_jitable
    def element_row(array, h, key, width, r, at):
        first, source = np.uintp(r * width), np.uintp(at * width)
        for j in range(np.uintp(width)):
            value = load(array[1:end], first + j, real)
            grad = prepare(gradient(array, source + j), value[0], h[0], h[1], h[2])
            out = rule(value[0], grad, *value[1:], *h[3:])
            store(array[1:2], first + j, out)
            keep(array[2:end], first + j, out[1:], key)
            store(array[end:-1], first + j, out)

    @register_jitable
    def reduced_row(array, h, key, width, r, at):
        first, source = np.uintp(r * width), np.uintp(at * width)
        state = new = load(array[2:end], np.uintp(r), real)
        total = real(0)
        for j in range(np.uintp(width)):
            weight = load(array[1:2], first + j, real)
            grad = prepare(gradient(array, source + j), weight[0], h[0], h[1], h[2])
            store(array[-1:], j, (grad,))
            total = add(total, grad * grad)
        mean_square = total / real(width)
        for j in range(np.uintp(width)):
            grad = load(array[-1:], j)
            weight = load(array[1:2], first + j, real)
            out = rule(weight[0], grad[0], *state, mean_square, *h[3:])
            store(array[1:2], first + j, out[:1])
            store(array[end:-1], first + j, out[:1])
            new = out[1:]
        keep(array[2:end], np.uintp(r), new, key)

    return reduced_row if per_row else element_row


@functools.cache
def rows(rule: Callable[..., Any], n_state: int, per_row: bool, layout: str, form: str, exact: bool) -> Any:
    """The kernel that applies a rule to the rows that sparse gradients touch.

    ``kernel(table, offsets, hyper, scratch, progress)`` as in `dense`, where a tensor's part of the long line
    is its touched rows, or the parts of a block. A row of the table begins with HEADER numbers: the addresses
    of the gradient's numbers, of the touched rows' numbers, of where each one's parts begin, of the parts'
    places, and of the rows' stamps; how many steps have been recorded, how many rows are touched, the bytes
    of a place, and how many rows there are; then come the weight, the states and perhaps the copy,
    the tensor's number, the length of rows and the first row of hyper-parameters.

    The form says what a part is: ``"block f4"``, a whole row at some place of a block of float32 (without
    places: each touched row has one part, at its own number); ``"csr f4"``, a number with its column;
    ``"none"``, no gradient at all. A row's parts are summed in their order, so that nothing depends on who
    does it. With `exact`, a row first catches up with the steps recorded since its stamp, as a dense
    optimizer would have taken them with a zero gradient.

    Row numbers and columns that lead outside are passed over, as another thread may have changed the caller's
    arrays since they were looked at.
    """
    kind, *codes = form.split()
    code = codes[-1] if codes else layout.split()[0]
    real = compute_dtype(layout.split()[0])
    size = real.itemsize
    number = f"f{size}"
    given, summed = f"{code} {layout} {number}", f"{number} {layout} {number}"
    step = row_step(rule, n_state, per_row, f"{number} {layout}")
    late_step = row_step(rule, n_state, per_row, f"{number} {layout}", absent=True)
    numbers = _numbers(rule, n_state, per_row, layout)
    n_array = len(layout.split())
    block, sparse = kind == "block", kind == "csr"
    steps = int(block or sparse)  # that are made here, beyond those recorded
    wide = 2 if per_row else 1 + n_array  # of the arrays, those with whole rows
    line, own_line = line_of(code), line_of(layout)

    @register_jitable
    def add_entries(sums, source, columns, begin, end, width):
        for p in range(begin, end):
            j = np.uintp(load(columns, np.uintp(p))[0])
            if j < np.uintp(width):  # a negative one is higher than all others
                store(sums, j, (load(sums, j)[0] + real.type(load(source, np.uintp(p))[0]),))

    @register_jitable
    def gather(entry, k, width, sums):
        source = pointers((entry[0],), code)
        if block and entry[2] == 0:
            for j in range(np.uintp(width)):
                store(sums, j, load(source, np.uintp(k * width) + j))
            return
        starts = pointers((entry[2],), "i8")
        begin, end = load(starts, np.uintp(k))[0], load(starts, np.uintp(k + 1))[0]
        if block:
            places = pointers((entry[3],), "i8")
            last = load(starts, np.uintp(entry[6]))[0] - 1
            for p in range(begin, end):
                first = np.uintp(load(places, np.uintp(min(p + NEXT, last)))[0] * width)
                for i in range(first, first + np.uintp(width), line):
                    prefetch(source, i)
            first = np.uintp(load(places, np.uintp(begin))[0] * width)
            for j in range(np.uintp(width)):
                store(sums, j, load(source, first + j))
            for p in range(begin + 1, end):
                first = np.uintp(load(places, np.uintp(p))[0] * width)
                for j in range(np.uintp(width)):
                    store(sums, j, (load(sums, j)[0] + real.type(load(source, first + j)[0]),))
        elif sparse:
            for j in range(np.uintp(width)):
                store(sums, j, (real.type(0),))
            if entry[7] == 4:
                add_entries(sums, source, pointers((entry[3],), "i4"), begin, end, width)
            else:
                add_entries(sums, source, pointers((entry[3],), "i8"), begin, end, width)

    @register_jitable
    def row_at(entry, element, width):
        """The first touched row that begins at or after an element of a tensor's part of the line."""
        first = ceildiv(element, width)
        if not block or entry[2] == 0:
            return first
        starts = pointers((entry[2],), "i8")  # rows with many parts do not weigh on one thread alone
        low, high = np.int64(0), np.int64(entry[6])
        while low < high:
            middle = (low + high) // 2
            if load(starts, np.uintp(middle))[0] < first:
                low = middle + 1
            else:
                high = middle
        return low

    @register_jitable
    def span(entry, hyper, start, stop, chunk, far, own):
        width = np.int64(entry[-2])
        height = np.uint64(entry[8])
        row = np.int64(entry[-1])
        recorded = np.int64(entry[5])
        sums = own + np.uint64(row_bytes(width, size) if per_row else 0)
        others = (*to_fixed_tuple(entry[HEADER:], n_array), own)
        array = pointers((sums, *others), summed)
        direct = pointers((entry[0], *others), given)
        touched = pointers((entry[1],), "i8")
        stamps = pointers((entry[4],), "i8")
        if block or sparse:  # else there is no such row
            h, key = numbers(hyper, row + recorded, entry[-3])
        end = row_at(entry, stop, width)
        for k in range(row_at(entry, start, width), end):
            r = k if entry[1] == 0 else load(touched, np.uintp(k))[0]
            if np.uint64(r) >= height:
                continue
            if entry[1] != 0 and k + NEXT < end:  # rows come in no order that the processor could foresee
                first = np.uintp(load(touched, np.uintp(k + NEXT))[0])
                for i in range(first * np.uintp(width), (first + np.uintp(1)) * np.uintp(width), own_line):
                    prefetch(array[1:wide], i)
                prefetch(array[wide:-1], first)
            if exact:
                for q in range(max(load(stamps, np.uintp(r))[0], 0), recorded):
                    late_step(array, *numbers(hyper, row + q, entry[-3]), width, r, 0)
                store(stamps, np.uintp(r), (recorded + steps,))
            if block and code == number and entry[2] == 0:
                step(direct, h, key, width, r, k)
            elif block or sparse:
                gather(entry, k, width, array[:1])
                step(array, h, key, width, r, 0)

    key = (cache.fingerprint(rule), n_state, per_row, layout, form, exact)
    return _over_chunks(span, f"rows-{rule.__name__}", key, real)


def _over_chunks(span: Callable[..., Any], name: str, key: tuple[Any, ...], real: np.dtype) -> Any:
    """The kernel in which threads claim chunks of the long line and call `span` for each tensor's part."""

    def kernel(table, offsets, hyper, scratch, progress):
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
                    span(table[t], hyper, start - offsets[t], end - offsets[t], chunk, total > FAR, own)
                start = end
                t += 1
            fetch_add(progress, 2, 1)

    compiled = cache.compiled(kernel, span.__qualname__, *key, name=name)
    line = types.int64[::1]
    arguments = (types.uint64[:, ::1], line, from_dtype(real)[:, ::1], types.uint8[:, ::1], line)
    compiled.entry_point = compiled.compile(arguments)
    compiled.disable_compile()
    return compiled


@functools.cache
def columns(code: str) -> Any:
    """The kernel that looks at the columns of a CSR matrix's entries, stored as `code` says.

    ``kernel(table, offsets, found, scratch, progress)`` writes to each chunk's place in a column of zeros:
    BAD if a column is not within the width, else UNSORTED if the columns do not run from 0 to the end in each
    row of the width's length, else GOOD. The table's row has the entries' address and the width.
    """
    whole, unsigned = (np.int32, np.uint32) if code == "i4" else (np.int64, np.uint64)
    largest = np.int64(np.iinfo(whole).max)
    line, ahead = line_of(code), AHEAD * line_of(code)

    @register_jitable
    def span(entry, found, start, stop, chunk, far, own):
        array = pointers((entry[0],), code)
        width = np.int64(entry[-2])
        highest, uneven = unsigned(0), whole(0)
        first = start - start % width
        while first < stop:
            low, high = max(first, start), min(first + width, stop)
            for i in range(np.uintp(low + ahead), np.uintp(high + ahead), line):
                prefetch(array, i)
            for j in range(np.uintp(high - low)):
                column = load(array, np.uintp(low) + j)[0]
                highest = max(highest, unsigned(column))  # a negative one is higher than all others
                uneven |= column ^ whole(np.uintp(low - first) + j)
            first += width
        outside = highest > unsigned(min(width - 1, largest))
        found[chunk, 0] = BAD if outside else UNSORTED if uneven else GOOD

    return _over_chunks(span, "columns", (cache.fingerprint(span), code), np.dtype(np.float64))


@functools.cache
def squares(code: str) -> Any:
    """The kernel that sums the squares of all gradients of a table, stored as `code` says.

    ``kernel(table, offsets, partial, scratch, progress)`` adds the sum of each chunk to a column of zeros, in
    double precision, so that the total is the same for any number of threads and no float32 gradient
    overflows it.
    """
    line, ahead = line_of(code), AHEAD * line_of(code)

    @register_jitable
    def span(entry, partial, start, stop, chunk, far, own):
        array = pointers((entry[0],), code)
        for first in range(start, stop, BLOCK):
            if far:
                for i in range(np.uintp(first + ahead), np.uintp(first + ahead + BLOCK), line):
                    prefetch(array, i)
            total = np.float64(0)
            for i in range(np.uintp(first), np.uintp(min(first + BLOCK, stop))):
                value = np.float64(load(array, i)[0])
                total = add(total, value * value)
            partial[chunk, 0] += total

    return _over_chunks(span, "squares", (cache.fingerprint(span), code), np.dtype(np.float64))
