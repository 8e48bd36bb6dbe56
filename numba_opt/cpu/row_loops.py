"""The loop over the rows that sparse gradients touch, and the one that brings rows up to date."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable
from numba.np.unsafe.ndarray import to_fixed_tuple

from ..compiler.elements import load, pointers, prefetch, store
from ..core.columns import (
    COUNT,
    CPU_HEADER,
    DATA,
    HEIGHT,
    LAST_STEP,
    PLACE_SIZE,
    PLACES,
    RECORDED,
    ROW,
    STARTS,
    TENSOR_ID,
    TOUCHED,
    WIDTH,
)
from ..core.rules import Rule
from ..core.storage import Layout, TouchedForm, size_of
from .loops import ceildiv, coefficient_reader, line_of, over_chunks, row_bytes, row_step

NEXT = 8  # how many touched rows ahead the next one to fetch is


@functools.cache
def rows(rule: Rule, layout: Layout, form: TouchedForm, exact: bool) -> Any:
    """The kernel that applies a rule to the rows that sparse gradients touch; `layout` is without gradients.

    ``kernel(table, offsets, coefficients, scratch, progress)`` as in `loops.dense`, where a tensor's part of
    the long line is its touched rows, or the parts of a block. `numba_opt.core.columns` says what a row of
    the table has before the addresses of arrays; its last number is the first row of coefficients.

    The form says what a part is: a "block", a whole row at some place of it (without places: each touched row
    has one part, at its own number); "csr", a number with its column; "none", no gradient at all. A row's
    parts are summed in their order, so that nothing depends on who does it. With `exact`, a row first catches
    up with the steps recorded since its last one, as a dense optimizer would have taken them with a zero
    gradient.

    Row numbers and columns that lead outside are passed over, as another thread may have changed the caller's
    arrays since they were looked at.
    """
    kind, grad = form.kind, form.grad or layout.weight
    number, size = layout.compute, layout.real.itemsize
    given, summed = (f"{code} {layout.text} {number}" for code in (grad, number))
    with_grad = Layout(number, *layout[1:])
    step, pending_step = row_step(rule, with_grad), row_step(rule, with_grad, absent=True)
    read, gather = coefficient_reader(rule, layout), _gathering(kind, grad, layout.real)
    row_at, fetch_row = _row_finder(kind == "block"), _fetching(rule, layout)
    n_array, per_row = len(layout.codes), rule.per_row
    has_grad, as_given = kind != "none", kind == "block" and grad == number
    steps = int(has_grad)  # that are made here, beyond those recorded

    @register_jitable
    def span(entry, coefficients, start, stop, chunk, long, own):
        width, height = np.int64(entry[WIDTH]), np.uint64(entry[HEIGHT])
        row, recorded = np.int64(entry[ROW]), np.int64(entry[RECORDED])
        sums = own + np.uint64(row_bytes(width, size) if per_row else 0)
        others = (*to_fixed_tuple(entry[CPU_HEADER:], n_array), own)
        array, direct = pointers((sums, *others), summed), pointers((entry[DATA], *others), given)
        touched = pointers((entry[TOUCHED],), "i64")
        last_step = pointers((entry[LAST_STEP],), "i64")
        if has_grad:  # else there is no such row
            c, key = read(coefficients, row + recorded, entry[TENSOR_ID])
        end = row_at(entry, stop, width)
        for k in range(row_at(entry, start, width), end):
            r = k if entry[TOUCHED] == 0 else load(touched, np.uintp(k))[0]
            if np.uint64(r) >= height:
                continue
            if entry[TOUCHED] != 0 and k + NEXT < end:  # in no order that the processor could foresee
                fetch_row(array, load(touched, np.uintp(k + NEXT))[0], width)
            if exact:
                for q in range(max(load(last_step, np.uintp(r))[0], 0), recorded):
                    pending_step(array, *read(coefficients, row + q, entry[TENSOR_ID]), width, r, 0)
                store(last_step, np.uintp(r), (recorded + steps,))
            if as_given and entry[STARTS] == 0:
                step(direct, c, key, width, r, k)
            elif has_grad:
                gather(entry, k, width, array[:1])
                step(array, c, key, width, r, 0)

    key = (rule.key, layout.text, form.text, exact)
    return over_chunks(span, f"rows-{rule.function.__name__}", key, layout.real)


def _gathering(kind: str, grad: str, real: np.dtype) -> Callable[..., Any]:
    """Make what writes the sum of a touched row's parts: ``gather(entry, k, width, sums)``."""
    block, line = kind == "block", line_of(size_of(grad))

    @register_jitable
    def add_entries(sums, source, columns, begin, end, width):
        for p in range(begin, end):
            j = np.uintp(load(columns, np.uintp(p))[0])
            if j < np.uintp(width):  # a negative one is higher than all others
                store(sums, j, (load(sums, j)[0] + real.type(load(source, np.uintp(p))[0]),))

    @register_jitable
    def add_parts(entry, source, begin, end, width, sums):
        places = pointers((entry[PLACES],), "i64")
        last = load(pointers((entry[STARTS],), "i64"), np.uintp(entry[COUNT]))[0] - 1
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

    @register_jitable
    def gather(entry, k, width, sums):
        source = pointers((entry[DATA],), grad)
        if block and entry[STARTS] == 0:
            for j in range(np.uintp(width)):
                store(sums, j, load(source, np.uintp(k * width) + j))
            return
        starts = pointers((entry[STARTS],), "i64")
        begin, end = load(starts, np.uintp(k))[0], load(starts, np.uintp(k + 1))[0]
        if block:
            add_parts(entry, source, begin, end, width, sums)
            return
        for j in range(np.uintp(width)):
            store(sums, j, (real.type(0),))
        if entry[PLACE_SIZE] == 4:
            add_entries(sums, source, pointers((entry[PLACES],), "i32"), begin, end, width)
        else:
            add_entries(sums, source, pointers((entry[PLACES],), "i64"), begin, end, width)

    return gather


def _row_finder(block: bool) -> Callable[..., Any]:
    """Make what finds the first touched row from an element of a tensor's part of the line on."""

    @register_jitable
    def row_at(entry, element, width):
        first = ceildiv(element, width)
        if not block or entry[STARTS] == 0:
            return first
        starts = pointers((entry[STARTS],), "i64")  # rows with many parts do not weigh on one thread alone
        low, high = np.int64(0), np.int64(entry[COUNT])
        while low < high:
            middle = (low + high) // 2
            if load(starts, np.uintp(middle))[0] < first:
                low = middle + 1
            else:
                high = middle
        return low

    return row_at


def _fetching(rule: Rule, layout: Layout) -> Callable[..., Any]:
    """Make what asks for the cache lines of a row: ``fetch_row(array, r, width)``."""
    wide = 2 if rule.per_row else 1 + len(layout.codes)  # of the arrays, those with whole rows
    line = line_of(layout.widest)

    @register_jitable
    def fetch_row(array, r, width):
        first = np.uintp(r)
        for i in range(first * np.uintp(width), (first + np.uintp(1)) * np.uintp(width), line):
            prefetch(array[1:wide], i)
        prefetch(array[wide:-1], first)

    return fetch_row
