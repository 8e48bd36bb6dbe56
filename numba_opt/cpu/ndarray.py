"""NumPy's array objects, read by a kernel: hundreds of arrays checked in a few microseconds.

Asking 600 arrays for their addresses through ``__array_interface__`` takes some 700 us, more than most
optimizer steps; reading them here takes 5. The C layout of an array object is part of NumPy's public
ABI (``PyArrayObject_fields`` in ``ndarraytypes.h``) and every extension module depends on it;
`readable` compares it with what NumPy itself says, once in a process, and where they differ nothing
here is used. What is read is only ever accepted here: arrays with anything unusual about them are left
to `numba_opt.cpu.arrays`, which takes them the ordinary way and words the errors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numba.extending import register_jitable

from ..compiler import cache
from ..compiler.elements import peek
from ..core.call import Scan, blank
from ..core.columns import COMMON, STATES, WIDTH
from ..core.storage import ABSENT, BITS, STORAGES, bfloat16
from .arrays import known_dtypes

# Offsets in bytes from the end of the object header, on a machine with 64-bit pointers.
HEADER = object.__basicsize__
DATA, NDIM, SHAPE, DTYPE, FLAGS = 0, 8, 16, 40, 48

C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x0001, 0x0100, 0x0400  # NumPy's own numbers

SAME, MOVED, CHANGED, UNSUPPORTED = range(4)  # what `scan` says

STORAGE_SIZES = tuple(storage.size for storage in STORAGES)

uint64, int64, int32 = np.uint64, np.int64, np.int32


@register_jitable
def field(array, offset):
    """A pointer or an integer as wide as one, from an array object."""
    return peek(array + uint64(HEADER + offset), uint64)


@register_jitable
def storage_of(array, known, flags):
    """Return the number of the known storage of a plain array with these flags; -1 if there is more to it."""
    if peek(array + uint64(HEADER - 8), uint64) != known[0]:  # a subclass, or something else
        return -1
    if peek(array + uint64(HEADER + FLAGS), int32) & flags != flags:
        return -1
    for k in range(1, known.size):
        if field(array, DTYPE) == known[k]:
            return k - 1
    return -1


@register_jitable
def same_shape(a, b):
    """Tell whether two arrays have the same shape."""
    ndim = peek(a + uint64(HEADER + NDIM), int32)
    if ndim != peek(b + uint64(HEADER + NDIM), int32):
        return False
    p, q = field(a, SHAPE), field(b, SHAPE)
    for k in range(ndim):  # noqa: SIM110  Numba has no generators
        if peek(p + uint64(8 * k), int64) != peek(q + uint64(8 * k), int64):
            return False
    return True


@register_jitable
def is_column(array, height):
    """Tell whether an array has one number for each of so many rows."""
    if peek(array + uint64(HEADER + NDIM), int32) != 2:
        return False
    shape = field(array, SHAPE)
    return peek(shape, int64) == height and peek(shape + uint64(8), int64) == 1


def scan(objects, known, none, n_state, per_row, addresses, bytes, sizes, storages):
    """Read the arrays of a call into a `Scan`, and tell whether that changed it.

    `objects` holds the ids of array objects, one row each for the gradients, the weights, each state and
    perhaps for model weights; `none` is the id of an absent gradient or model weight. The answer is SAME;
    MOVED if only addresses changed; CHANGED; or UNSUPPORTED if any array is not plain or has another shape
    than it should.
    """
    columns, tensors = objects.shape
    width_at = columns + COMMON + WIDTH
    answer = SAME
    for t in range(tensors):
        weight = objects[1, t]
        if storage_of(weight, known, C_CONTIGUOUS) < 0:
            return UNSUPPORTED
        ndim = peek(weight + uint64(HEADER + NDIM), int32)
        shape = field(weight, SHAPE)
        if per_row and ndim != 2:
            return UNSUPPORTED
        size = 1
        for k in range(ndim):
            size *= peek(shape + uint64(8 * k), int64)
        packed = 0
        for c in range(columns):
            array = objects[c, t]
            if array == none and (c == 0 or c == STATES + n_state):
                packed |= ABSENT << (BITS * c)
                continue
            storage = storage_of(array, known, C_CONTIGUOUS | ALIGNED | (WRITEABLE if c > 0 else 0))
            if storage < 0:
                return UNSUPPORTED
            held = size
            if per_row and STATES <= c < STATES + n_state:
                held = peek(shape, int64)
                if not is_column(array, held):
                    return UNSUPPORTED
            elif not same_shape(array, weight):
                return UNSUPPORTED
            if addresses[t, c] != field(array, DATA):
                addresses[t, c] = field(array, DATA)
                answer = max(answer, MOVED)
            bytes[t, c] = held * STORAGE_SIZES[storage]
            packed |= storage << (BITS * c)
        height = peek(shape, int64) if ndim > 0 else size
        width = uint64(size // height if height > 0 else 1)
        if storages[t] != packed or sizes[t] != size or addresses[t, width_at] != width:
            answer = CHANGED
        addresses[t, width_at] = width
        sizes[t] = size
        storages[t] = packed
    return answer


def overlap(starts, lengths, written, order):
    """Tell whether memory that is written is shared with any other; `order` sorts the pieces by address.

    Pieces that are only read may share memory with one another.
    """
    read_to = written_to = uint64(0)  # where the pieces so far end
    for k in order:
        if lengths[k] == 0:
            continue
        stop = starts[k] + uint64(lengths[k])
        if starts[k] < written_to or (written[k] and starts[k] < read_to):
            return True
        read_to = max(read_to, stop)
        if written[k]:
            written_to = max(written_to, stop)
    return False


scan = cache.compiled(scan, cache.fingerprint(scan), HEADER, nogil=False)  # objects: hold the GIL
overlap = cache.compiled(overlap, cache.fingerprint(overlap))


def objects(columns: Sequence[Sequence[Any]]) -> np.ndarray:
    """The ids of the arrays in some columns of equal length, a row for each column."""
    n = len(columns[0])
    ids = np.fromiter(map(id, chain.from_iterable(columns)), np.uint64, len(columns) * n)
    return ids.reshape(len(columns), n)


def read(columns: Sequence[Sequence[Any]], n_state: int, per_row: bool) -> Scan | None:
    """Return the scan of gradients, weights, states and perhaps model weights; None if one is unsupported."""
    found = blank(len(columns), len(columns[0]))
    answer = scan(objects(columns), known(), NONE, n_state, per_row, *found)
    return None if answer == UNSUPPORTED else found


NONE = np.uint64(id(None))


def overlapping(found: Scan, read: Sequence[np.ndarray] = (), written: Sequence[np.ndarray] = ()) -> bool:
    """Tell whether an array that will be written, contiguous like all others, shares memory with another."""
    tensors, columns = found.bytes.shape
    starts, lengths = found.addresses[:, :columns].ravel(), found.bytes.ravel()
    marks = _marks(tensors, columns)  # gradients are only read
    if read or written:
        more = [*read, *written]
        starts = np.concatenate([starts, np.array([array.ctypes.data for array in more], np.uint64)])
        lengths = np.concatenate([lengths, np.array([array.nbytes for array in more], np.int64)])
        marks = np.concatenate([marks, np.arange(len(more)) >= len(read)])
    return bool(overlap(starts, lengths, marks, starts.argsort()))


@functools.lru_cache(maxsize=64)
def _marks(tensors: int, columns: int) -> np.ndarray:
    return np.tile(np.arange(columns) > 0, tensors)


def known() -> np.ndarray:
    """Return the ids that `scan` compares objects with: those of the array type and of the dtypes.

    NumPy has one object for each; that of bfloat16 belongs to the package ml_dtypes.
    """
    return _known(bfloat16() is not None)


@functools.cache
def _known(_: bool) -> np.ndarray:
    return np.array([id(np.ndarray), *map(id, known_dtypes())], np.uint64)


@functools.cache
def readable() -> bool:
    """Tell whether array objects are laid out as this file says, tried on a few of them.

    Without the GIL another thread might change an object while it is read.
    """
    if np.dtype(np.uintp).itemsize != 8 or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    for kind, dtype in enumerate(known_dtypes()):
        weight, grad, history = np.zeros((3, 5), dtype), np.zeros((3, 5), dtype), np.zeros((3, 1), dtype)
        columns: list[list[Any]] = [[grad], [weight], [history], [None]]
        found = read(columns, n_state=1, per_row=True)
        at = [a.__array_interface__["data"][0] for a in (grad, weight, history)]
        if found is None or found.addresses.tolist() != [[*at, 0, 0, 5, 0]]:
            return False
        if found.bytes.tolist() != [[grad.nbytes, weight.nbytes, history.nbytes, 0]]:
            return False
        if found.sizes.tolist() != [15] or found.storages.tolist() != [kind * 0x111 + ABSENT * 0x1000]:
            return False
        grad.flags.writeable = False
        unsupported = (grad, weight[:, ::2], weight.astype(">f4"), weight.astype(int), weight[1:])
        if any(read([[weight], [array]], n_state=0, per_row=False) for array in unsupported):
            return False
    return True
