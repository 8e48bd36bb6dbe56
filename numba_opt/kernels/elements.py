"""What the loops do to single elements: addresses become pointers, pointers give and take values.

Kernels receive raw addresses, so nothing here checks anything: `numba_opt.device` has checked every
array before its address entered a table.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .scalar import clip


def prepare(grad, weight, rescale, bound, wd):
    """The gradient that a rule sees: ``clip(rescale * grad, bound) + wd * weight``."""
    return clip(rescale * grad, bound) + wd * weight


@intrinsic
def pointers(typingctx, addresses, dtype):
    """A tuple of addresses as a tuple of pointers to `dtype`."""
    sig = types.UniTuple(types.CPointer(dtype.dtype), addresses.count)(addresses, dtype)

    def codegen(context, builder, sig, args):
        to = context.get_value_type(sig.return_type.dtype)
        found = cgutils.unpack_tuple(builder, args[0], addresses.count)
        return context.make_tuple(builder, sig.return_type, [builder.inttoptr(a, to) for a in found])

    return sig, codegen


@intrinsic
def load(typingctx, pointers, i):
    """The elements number `i` behind a tuple of pointers, as a tuple."""
    sig = types.UniTuple(pointers.dtype.dtype, pointers.count)(pointers, i)

    def codegen(context, builder, sig, args):
        found = cgutils.unpack_tuple(builder, args[0], pointers.count)
        values = [builder.load(builder.gep(p, [args[1]])) for p in found]
        return context.make_tuple(builder, sig.return_type, values)

    return sig, codegen


@intrinsic
def store(typingctx, pointers, i, values):
    """Write a tuple of values to the elements number `i` behind a tuple of pointers."""
    sig = types.void(pointers, i, values)

    def codegen(context, builder, sig, args):
        targets = cgutils.unpack_tuple(builder, args[0], pointers.count)
        for k, target in enumerate(targets):
            value = builder.extract_value(args[2], k)
            value = context.cast(builder, value, values.types[k], pointers.dtype.dtype)
            builder.store(value, builder.gep(target, [args[1]]))
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def fetch_add(typingctx, counters, k, value):
    """Add to an element of an int64 array as one atomic operation; returns what was there before."""
    sig = types.int64(counters, types.intp, types.int64)

    def codegen(context, builder, sig, args):
        data = context.make_array(counters)(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return sig, codegen


@intrinsic
def peek(typingctx, address, dtype):
    """The value of type `dtype` at an address."""
    sig = dtype.dtype(address, dtype)

    def codegen(context, builder, sig, args):
        to = context.get_value_type(sig.return_type).as_pointer()
        return builder.load(builder.inttoptr(args[0], to))

    return sig, codegen
