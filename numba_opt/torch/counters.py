"""How many updates parameters have had, where each one's number is a float32 of its own in memory.

That is how torch's optimizers keep it. (torch takes 0.6 us to add 1 to each, even to a list of them, and
0.3 us to read each; here hundreds take less.)
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from ..compiler import cache
from ..compiler.elements import load, pointers, store


def read(addresses, counts):
    """Read the numbers at some addresses; tell whether they are all the same."""
    alike = True
    for t in range(addresses.size):
        counts[t] = load(pointers((addresses[t],), "f32"), np.uintp(0))[0]
        alike &= counts[t] == counts[0]
    return alike


def count_up(addresses):
    """Add 1 to the numbers at some addresses."""
    for t in range(addresses.size):
        count = pointers((addresses[t],), "f32")
        store(count, np.uintp(0), (load(count, np.uintp(0))[0] + np.float32(1),))


read = cache.compiled(read, cache.fingerprint(read))
count_up = cache.compiled(count_up, cache.fingerprint(count_up))


@functools.cache
def compiled_count_up() -> Any:
    """`count_up` as a function of C: Numba's dispatcher may run Python, and kernels have written by then."""
    counting: Any = count_up
    return counting.compile((types.uint64[::1],))
