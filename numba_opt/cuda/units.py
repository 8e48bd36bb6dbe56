"""The units of work that every kernel of a GPU walks over, found in a table, for blocks or for warps.

A table is what `numba_opt.core.columns` says, in the device's memory, but that a row of coefficients is
named by where it begins among them all. A tensor is cut into units: CHUNK elements, which a block shares, so
that inside it 32-bit indices do; rules that need a row's mean square, and sparse gradients, take a row,
which a warp shares. One launch serves all tensors of a table: units count as one long line, and whoever is
free takes the next one of its own, finding the tensor by bisection.

Kernels get int64 and nothing else, addresses and numbers, which is what makes a launch cheap to prepare, and
coefficients from the device's memory, where `set_coefficients` writes them: nothing is compiled anew when
they change, and a captured graph sees new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from .buffer import SKIP
from .elements import numbers, shfl_xor

CHUNK = 4096  # elements: 16 for each thread of a block
THREADS = 256
WARP = 32
WARPS = 4  # in a block that updates rows
SUMS = THREADS // WARP  # of warps, that a block adds

u4 = np.uint32


class KernelSource(NamedTuple):
    """A kernel that is yet to be compiled: a function of int64 and float64, and what tells it apart."""

    function: Callable[..., Any]
    key: tuple[Any, ...]
    integers: int
    reals: int = 0


@register_jitable
def number_at(address, k):
    """The int64 number `k` from an address on."""
    return numbers(address + 8 * k, "i64", 1)[0]


@register_jitable
def tensor_at(starts, tensors, unit):
    """Return the tensor that holds a unit of the long line: the last one that starts at or before it."""
    low, high = 0, tensors
    while high - low > 1:
        middle = (low + high) >> 1
        if number_at(starts, middle) <= unit:
            low = middle
        else:
            high = middle
    return low


@register_jitable
def warp_sum(number):
    """The sum of the numbers that a warp's threads have, always in the same order; all of them get it."""
    mask = 1
    while mask < WARP:
        number = number + shfl_xor(number, np.int32(mask))
        mask = mask << 1
    return number


@register_jitable
def block_sum(number):
    """The sum of the numbers that a block's threads have, always in the same order; thread 0 gets it."""
    sums = cuda.shared.array(SUMS, np.float64)
    number = warp_sum(number)
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


@register_jitable
def elements_of(offsets, t, chunk):
    """The first element of a tensor's chunk, and how many it has."""
    first = chunk * CHUNK
    left = number_at(offsets, t + 1) - number_at(offsets, t) - first
    return first, u4(min(left, CHUNK))


def over_units(first: Callable[..., Any], visit: Callable[..., Any]) -> Callable[..., Any]:
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
    """A kernel that updates units, unless the step is to be skipped."""
    loop = over_units(first, visit)

    def kernel(table, columns, offsets, starts, tensors, buffer, room):
        if number_at(buffer, SKIP) == 0:
            loop(table, columns, starts, tensors, (offsets, buffer, room))

    kernel.__qualname__ = visit.__qualname__  # which is what profilers show
    return kernel
