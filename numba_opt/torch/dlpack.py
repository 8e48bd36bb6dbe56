"""Other libraries' tensors, described by a kernel: where hundreds of them lie, and how, in microseconds.

Asking torch's tensors from Python takes 0.4 us for each, more than most optimizer steps; here it is a tenth
of that. DLPack's C exchange API is a table of C functions at a tensor's class (`dlpack.h`, version 1.3). One
of them fills a `DLTensor` from a Python object and takes no part in owning it. How much memory there is at
the address, which DLPack does not say, torch's stable C interface does (`aoti_torch/c/shim.h`).
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from ..compiler import cache
from ..compiler.elements import peek
from ..cpu.ndarray import CHANGED, HEADER, MOVED, SAME, UNSUPPORTED

# The numbers of a description: the address; how many bytes the storage has from there on; the device; dtype
# and number of dimensions; what else the tensor is (negative, say); then as much room for the shape as for
# the strides.
HEAD = 5
ADDRESS, ROOM = 0, 1

# What a DLTensor is made of, in words of 8 bytes, and two numbers more.
WORDS = DATA, DEVICE, KIND, SHAPE, STRIDES, OFFSET, STORAGE, BEFORE = range(8)

int64, uint64 = np.int64, np.uint64


@functools.cache
def exchange_function(cls: type) -> int:
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


def library(extension: str) -> ctypes.CDLL:
    """An extension module as a library, in which the functions of those that it needs are found, too."""
    return ctypes.CDLL(extension)


def address_of(functions: ctypes.CDLL, name: str) -> int:
    """Return the address of a C function; 0 if there is none."""
    found = getattr(functions, name, None)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


def words(address: int, count: int) -> list[int]:
    """Return the words of 8 bytes at an address."""
    return list((ctypes.c_uint64 * count).from_address(address))


@intrinsic
def ask(typingctx, function, tensor, filled):
    """Let a C function write what a tensor is; tell whether it could. The caller holds the GIL."""
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
    """Write a number of a description; tell whether it is another one than was there."""
    changed = row[k] != value
    row[k] = value
    return changed


def look(objects, functions, none, seen, filled):
    """Describe the tensors with these ids, and say how that differs from what has been seen of them.

    `functions` are the address of `exchange_function`, those of the functions for the size of a storage and
    for how many elements of it come before a tensor, and where a tensor's C++ object says what it is. `seen`
    has a row of ``HEAD + 2 * room`` numbers for each tensor, all 0 for the object `none`. The answer is
    SAME; MOVED if only addresses changed, or the room there; CHANGED; or UNSUPPORTED if a tensor cannot be
    described in the dimensions that there are. `filled` is room for a `DLTensor` and two numbers.
    """
    dims = (seen.shape[2] - HEAD) // 2
    at = filled.ctypes.data
    moved = changed = False
    for c in range(objects.shape[0]):
        for t in range(objects.shape[1]):
            row = seen[c, t]
            if objects[c, t] == none:
                continue
            handle = objects[c, t] + uint64(HEADER)  # in a tensor's Python object, the C++ object's address
            if not (
                ask(functions[0], objects[c, t], at)
                and ask(functions[1], handle, at + 8 * STORAGE)
                and ask(functions[2], handle, at + 8 * BEFORE)
            ):
                return UNSUPPORTED
            ndim = filled[KIND] & int64(0xFFFFFFFF)
            if ndim > dims:
                return UNSUPPORTED
            item = (filled[KIND] >> 40 & int64(0xFF)) // 8
            moved |= renew(row, ADDRESS, filled[DATA] + filled[OFFSET])
            moved |= renew(row, ROOM, filled[STORAGE] - filled[BEFORE] * item)
            changed |= renew(row, 2, filled[DEVICE]) | renew(row, 3, filled[KIND])
            changed |= renew(row, 4, peek(peek(handle, uint64) + functions[3], int64))
            for d in range(ndim):
                k = uint64(8 * d)
                changed |= renew(row, HEAD + d, peek(uint64(filled[SHAPE]) + k, int64))
                changed |= renew(row, HEAD + dims + d, peek(uint64(filled[STRIDES]) + k, int64))
    return CHANGED if changed else MOVED if moved else SAME


look = cache.compiled(look, cache.fingerprint(look), HEAD, HEADER, nogil=False)  # objects: hold the GIL
