"""Row numbers in order on a GPU: keys of rows and places, which blocks sort and merges bring together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..core.storage import SIZES
from .elements import numbers, put
from .units import KernelSource, number_at

RUN = 1024  # keys that a block sorts, in 16 KiB: 100,000 take 8 launches (from runs of one key, 18)
PLACE = (1 << 32) - 1  # the bits of a key that say where a touched row's part is; those above are the row

NOTHING = -1  # instead of the number of a row
VACANT = -(1 << 63)  # instead of one in a block: nobody's place


def bisection(key_at: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``find(keys, low, high, key)``, which finds the first of some sorted keys not less than one."""
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


def placing(key_at: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that places a key as sorted runs of `run` keys, a power of two, merge two and two.

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
def keys(place: str) -> KernelSource:
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
                put(out + 8 * (first + k), "i64", (held[source + k],))
                k += cuda.blockDim.x
            cuda.syncthreads()
            first += np.int64(cuda.gridDim.x) * RUN

    return KernelSource(kernel, ("keys", place), 4)


@functools.cache
def merge() -> KernelSource:
    """The kernel that merges sorted runs of `run` keys two and two: ``kernel(keys, count, run, out)``."""
    place_of = placing(number_at)

    def kernel(keys, count, run, out):
        k = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while k < count:
            key = number_at(keys, k)
            put(out + 8 * place_of(keys, k, key, run, count), "i64", (key,))
            k += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return KernelSource(kernel, ("merge",), 4)
