"""Row numbers in order: which rows a sparse gradient touches, and where the parts of each one are.

These kernels also look for numbers that would lead outside an array. They only say that there are some;
`numba_opt.sparse` says which.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from . import cache

DIGIT = 11  # bits sorted at a time: 2048 counters stay in the fastest cache

GOOD, UNSORTED, BAD = 0, 1, 2


def look(rows, height):
    """GOOD if row numbers are within the height and strictly increase, UNSORTED if they don't, else BAD."""
    bad = unsorted = False
    for i in range(rows.size):
        bad |= (rows[i] < 0) | (rows[i] >= height)
    for i in range(1, rows.size):
        unsorted |= rows[i] <= rows[i - 1]
    return BAD if bad else UNSORTED if unsorted else GOOD


def group(rows, height):
    """Sort the places of row numbers by row, equal ones in their order.

    Returns the touched rows, where each one's places begin in the order (and where the last one's end),
    and the order.
    """
    if height <= 4 * rows.size:
        return group_by_counting(rows, height)
    n = rows.size
    order, keys = np.arange(n), rows.copy()
    next_order, next_keys = np.empty_like(order), np.empty_like(keys)
    shift = 0
    while (height - 1) >> shift > 0:
        counts = np.zeros((1 << DIGIT) + 1, np.int64)
        for i in range(n):
            counts[((keys[i] >> shift) & ((1 << DIGIT) - 1)) + 1] += 1
        for d in range(1 << DIGIT):
            counts[d + 1] += counts[d]
        for i in range(n):
            digit = (keys[i] >> shift) & ((1 << DIGIT) - 1)
            next_keys[counts[digit]] = keys[i]
            next_order[counts[digit]] = order[i]
            counts[digit] += 1
        keys, next_keys = next_keys, keys
        order, next_order = next_order, order
        shift += DIGIT
    touched, starts = next_keys, np.empty(n + 1, np.int64)
    k = 0
    for i in range(n):
        if i == 0 or keys[i] != keys[i - 1]:
            touched[k] = keys[i]
            starts[k] = i
            k += 1
    starts[k] = n
    return touched[:k].copy(), starts[: k + 1].copy(), order


@register_jitable
def group_by_counting(rows, height):
    """The same with a counter for each row there is: four times as fast where these are not too many."""
    n = rows.size
    ends = np.zeros(height, np.int64)
    for i in range(n):
        ends[rows[i]] += 1
    touched, starts = np.empty(min(n, height), np.int64), np.empty(min(n, height) + 1, np.int64)
    order = np.empty(n, np.int64)
    k = total = 0
    for r in range(height):
        if ends[r]:
            touched[k] = r
            starts[k] = total
            k += 1
        count = ends[r]
        ends[r] = total
        total += count
    starts[k] = n
    for i in range(n):
        order[ends[rows[i]]] = i
        ends[rows[i]] += 1
    return touched[:k].copy(), starts[: k + 1].copy(), order


def rows_of_csr(indptr, available, width):
    """The rows of a CSR matrix that hold an entry, and where the entries of each begin, and of the last end.

    Also whether `indptr` leads outside or runs backwards, and whether each of these rows has as many entries
    as the width.
    """
    height = indptr.size - 1
    rows, starts = np.empty(height + 1, np.int64), np.empty(height + 1, np.int64)  # memory once it is written
    bad, full = (indptr[0] != 0) | (indptr[height] > available), True
    k = 0
    start = indptr[0]
    for r in range(height):
        end = indptr[r + 1]
        rows[k] = r  # written over by the next row if this one is empty
        starts[k] = start
        bad |= end < start
        full &= (end == start) | (end - start == width)
        k += end > start
        start = end
    starts[k] = start
    return bad, full, rows[:k], starts[: k + 1]


look, group, rows_of_csr = (
    cache.compiled(function, cache.fingerprint(function)) for function in (look, group, rows_of_csr)
)
