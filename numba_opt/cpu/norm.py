"""The norm of all gradients of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.call import Call
from ..core.columns import COMMON, GRAD, WEIGHT
from ..core.storage import code_of
from . import measures, threads
from .arrays import as_array


def gradient_norm(call: Call, grads: Sequence[Any]) -> float:
    """The root of the sum of the squares of all gradients, in double precision.

    Each chunk's sum is taken by whichever thread comes by and all of them are added in order, so that the
    norm is the same to the bit for any number of threads.
    """
    blocks = [
        rows.data if rows.starts is None else rows.summed(call.arrays[WEIGHT][t])
        for t, rows in call.touched.items()
    ]
    lines = [(table.layout.grad, table.addresses, table.offsets) for table in call.tables]
    for block in blocks:
        address = np.array([[block.ctypes.data, *[0] * (COMMON - 1)]], np.uint64)
        lines.append((code_of(block.dtype), address, np.array([0, block.size], np.int64)))
    total = 0.0
    for code, addresses, offsets in lines:
        partial = np.zeros((-(-int(offsets[-1]) // threads.CHUNK), 1))
        threads.run([threads.Job(measures.squares(code), (addresses, offsets, partial), int(offsets[-1]))])
        total += float(partial.sum())
    if 1e-290 < total < math.inf:  # else squares may have left the range of double precision
        return math.sqrt(total)
    given = call.arrays[GRAD] if call.arrays else grads
    dense = [as_array(grad, "gradient") for grad in given if grad is not None]
    return _careful_norm([array.astype(np.float64) for array in (*dense, *blocks)])


def _careful_norm(arrays: Sequence[np.ndarray]) -> float:
    """The norm where squares leave the range of double precision, though the norm may not."""
    largest = float(np.max([np.max(np.abs(array), initial=0) for array in arrays], initial=0))
    if not 0 < largest < math.inf:
        return largest
    return largest * math.sqrt(math.fsum(float(np.sum(np.square(array / largest))) for array in arrays))
