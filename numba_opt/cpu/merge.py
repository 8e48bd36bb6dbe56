"""Row numbers in order: which rows a sparse gradient touches, and where the parts of each one are.

The kernels also look for numbers that would lead outside an array. They only say that there are some;
`numba_opt.cpu.sparse` says which.
"""

from __future__ import annotations

import numpy as np

from ..compiler import cache

DIGIT = 11  # bits sorted at a time: 2048 counters stay in the fastest cache

GOOD, UNSORTED, BAD = 0, 1, 2


def look(rows, height):
    """Return GOOD if row numbers strictly increase within the height, UNSORTED if they don't, else BAD."""
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
    n = rows.size
    touched, starts = np.empty(min(n, height), np.int64), np.empty(min(n, height) + 1, np.int64)
    order = np.empty(n, np.int64)
    if height <= 4 * n:
        k = group_by_counting(rows, np.zeros(height, np.int64), touched, starts, order)
        return touched[:k], starts[: k + 1], order
    keys, into = rows, [(np.empty_like(rows), order), (np.empty_like(rows), np.arange(n))]
    order = into[1][1]
    counts = np.empty((1 << DIGIT) + 1, np.int64)
    for shift in range(0, (height - 1).bit_length(), DIGIT):
        sort_by_digit(keys, order, shift, counts, *into[0])
        keys, order = into[0]
        into.reverse()
    k = find_groups(keys, touched, starts)
    return touched[:k], starts[: k + 1], order


def sort_by_digit(keys, order, shift, counts, next_keys, next_order):
    """Sort keys by one of their digits, and what is ordered along with them."""
    counts[:] = 0
    for i in range(keys.size):
        counts[((keys[i] >> shift) & ((1 << DIGIT) - 1)) + 1] += 1
    for d in range(1 << DIGIT):
        counts[d + 1] += counts[d]
    for i in range(keys.size):
        digit = (keys[i] >> shift) & ((1 << DIGIT) - 1)
        next_keys[counts[digit]] = keys[i]
        next_order[counts[digit]] = order[i]
        counts[digit] += 1


def find_groups(keys, touched, starts):
    """Find the different ones among sorted keys, where each begins and the last ends; return their number."""
    k = 0
    for i in range(keys.size):
        if i == 0 or keys[i] != keys[i - 1]:
            touched[k] = keys[i]
            starts[k] = i
            k += 1
    starts[k] = keys.size
    return k


def group_by_counting(rows, ends, touched, starts, order):
    """Group rows with a counter for each row there is: four times as fast where these are not too many."""
    for i in range(rows.size):
        ends[rows[i]] += 1
    k = total = 0
    for r in range(ends.size):
        if ends[r]:
            touched[k] = r
            starts[k] = total
            k += 1
        count = ends[r]
        ends[r] = total
        total += count
    starts[k] = rows.size
    for i in range(rows.size):
        order[ends[rows[i]]] = i
        ends[rows[i]] += 1
    return k


def rows_of_csr(indptr, available, width):
    """The rows of a CSR matrix that hold an entry, and where the entries of each begin, and of the last end.

    Before these come whether `indptr` leads outside or runs backwards, and whether each of these rows has as
    many entries as the width.
    """
    rows, starts = np.empty(indptr.size, np.int64), np.empty(indptr.size, np.int64)  # memory once written
    found = np.zeros(3, np.int64)
    find_rows(indptr, available, width, rows, starts, found)
    k, bad, full = found.tolist()
    return bool(bad), bool(full), rows[:k], starts[: k + 1]


def find_rows(indptr, available, width, rows, starts, found):
    """Write `rows_of_csr` into arrays: `found` gets the number of rows, whether any is bad, whether all full.

    Every number is read once, as another thread may change it.
    """
    start = np.int64(indptr[0])
    bad, full = start != 0, True
    k = 0
    for r in range(indptr.size - 1):
        end = np.int64(indptr[r + 1])
        rows[k] = r  # written over by the next row if this one is empty
        starts[k] = start
        bad |= end < start
        full &= (end == start) | (end - start == width)
        k += int(end > start)
        start = end
    starts[k] = start
    bad |= start > available
    found[0], found[1], found[2] = k, bad, full


# None of them returns an array: making its object runs Python code, and a signal's handler that raises there
# ends in SystemError.
look, sort_by_digit, find_groups, group_by_counting, find_rows = (
    cache.compiled(function, cache.fingerprint(function))
    for function in (look, sort_by_digit, find_groups, group_by_counting, find_rows)
)
