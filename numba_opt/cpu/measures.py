"""The loops that only read: sums of squares of gradients, and what the columns of a CSR matrix are like."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba.extending import register_jitable

from ..compiler import cache
from ..compiler.elements import add, load, pointers, prefetch
from ..core.columns import WIDTH
from ..core.storage import size_of
from .loops import AHEAD, BLOCK, line_of, over_chunks
from .merge import BAD, GOOD, UNSORTED


@functools.cache
def columns(code: str) -> Any:
    """The kernel that looks at the columns of a CSR matrix's entries, stored as `code` says.

    ``kernel(table, offsets, found, scratch, progress)`` writes to each chunk's place in a column of zeros:
    BAD if a column is not within the width, else UNSORTED if the columns do not run from 0 to the end in each
    row of the width's length, else GOOD. The table's row has the entries' address and the width.
    """
    whole, unsigned = (np.int32, np.uint32) if code == "i32" else (np.int64, np.uint64)
    largest = np.int64(np.iinfo(whole).max)
    line = line_of(size_of(code))
    ahead = AHEAD * line

    @register_jitable
    def span(entry, found, start, stop, chunk, long, own):
        array = pointers((entry[0],), code)
        width = np.int64(entry[WIDTH])
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

    return over_chunks(span, "columns", (cache.fingerprint(span), code), np.dtype(np.float64))


@functools.cache
def squares(code: str) -> Any:
    """The kernel that sums the squares of all gradients of a table, stored as `code` says.

    ``kernel(table, offsets, partial, scratch, progress)`` adds the sum of each chunk to a column of zeros, in
    double precision, so that the total is the same for any number of threads and no float32 gradient
    overflows it.
    """
    line = line_of(size_of(code))
    ahead = AHEAD * line

    @register_jitable
    def span(entry, partial, start, stop, chunk, long, own):
        array = pointers((entry[0],), code)
        for first in range(start, stop, BLOCK):
            if long:
                for i in range(np.uintp(first + ahead), np.uintp(first + ahead + BLOCK), line):
                    prefetch(array, i)
            total = np.float64(0)
            for i in range(np.uintp(first), np.uintp(min(first + BLOCK, stop))):
                value = np.float64(load(array, i)[0])
                total = add(total, value * value)
            partial[chunk, 0] += total

    return over_chunks(span, "squares", (cache.fingerprint(span), code), np.dtype(np.float64))
