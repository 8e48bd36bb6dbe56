"""Other libraries' tensors, described by a kernel: where hundreds of them lie, and how, in microseconds.

Asking torch's tensors from Python takes 0.4 us for each, more than most optimizer steps; here it is a tenth
of that. DLPack's C exchange API is a table of C functions at a tensor's class (`dlpack.h`, version 1.3). One
of them fills a `DLTensor` from a Python object and takes no part in owning it.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from . import cache
from .elements import peek
from .ndarray import CHANGED, MOVED, SAME, STRANGE

# The numbers of a description: the address; the device; dtype and number of dimensions; then as much room
# for the shape as for the strides.
HEAD = 3

# What a DLTensor is made of, in words of 8 bytes.
WORDS = DATA, DEVICE, KIND, SHAPE, STRIDES, OFFSET = range(6)

int64, uint64 = np.int64, np.uint64


@functools.cache
def asker(cls: type) -> int:
    """The address of a class's function that fills a `DLTensor`; 0 if there is none of a known version."""
    capsule = getattr(cls, "__dlpack_c_exchange_api__", None)
    if capsule is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return 0
    pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    table = pointer_in(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    major, minor = (ctypes.c_uint32 * 2).from_address(table)
    if major != 1 or minor < 3:
        return 0
    return (ctypes.c_void_p * 6).from_address(table)[5] or 0


@intrinsic
def ask(typingctx, function, tensor, filled):
    """Let a function of `asker` fill a `DLTensor`; whether it could. The caller holds the GIL."""
    sig = types.boolean(types.uint64, types.uint64, types.intp)

    def codegen(context, builder, sig, args):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(number, [pointer, pointer]).as_pointer()
        given = [builder.inttoptr(arg, pointer) for arg in args[1:]]
        answer = builder.call(builder.inttoptr(args[0], kind), given)
        failed = builder.icmp_signed("!=", answer, number(0))
        with builder.if_then(failed, likely=False):
            context.get_python_api(builder).err_clear()
        return builder.not_(failed)

    return sig, codegen


@register_jitable
def renew(row, k, value):
    """Write a number of a description; whether it is another one than was there."""
    changed = row[k] != value
    row[k] = value
    return changed


def look(objects, function, none, seen):
    """Describe the tensors with these ids, and say how that differs from what has been seen of them.

    `seen` has a row of ``HEAD + 2 * room`` numbers for each of them, all 0 for the object `none`. The answer
    is SAME; MOVED if only addresses changed; CHANGED; or STRANGE if a tensor cannot be described in the room
    that there is.
    """
    room = (seen.shape[2] - HEAD) // 2
    filled = np.empty(6, int64)
    moved = changed = False
    for c in range(objects.shape[0]):
        for t in range(objects.shape[1]):
            row = seen[c, t]
            if objects[c, t] == none:
                continue
            if not ask(function, objects[c, t], filled.ctypes.data):
                return STRANGE
            ndim = filled[KIND] & int64(0xFFFFFFFF)
            if ndim > room:
                return STRANGE
            moved |= renew(row, 0, filled[DATA] + filled[OFFSET])
            changed |= renew(row, 1, filled[DEVICE]) | renew(row, 2, filled[KIND])
            for d in range(ndim):
                at = uint64(8 * d)
                changed |= renew(row, HEAD + d, peek(uint64(filled[SHAPE]) + at, int64))
                changed |= renew(row, HEAD + room + d, peek(uint64(filled[STRIDES]) + at, int64))
    return CHANGED if changed else MOVED if moved else SAME


look = cache.compiled(look, cache.fingerprint(look), HEAD, nogil=False)  # objects: hold the GIL
