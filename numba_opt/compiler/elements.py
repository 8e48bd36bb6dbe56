"""Single elements in the loops: addresses become pointers, pointers give and take values.

Kernels receive raw addresses, so nothing here checks anything: `numba_opt.device` has checked every
array before its address entered a table.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from ..core.storage import STOCHASTIC
from ..scalar import clip
from . import half, rounding

# How an array's elements lie in memory, by their code in `numba_opt.core.storage`.
STORED_AS = {
    "f32": types.float32,
    "f64": types.float64,
    "f16": half.HALF,
    "bf16": half.BFLOAT,
    "i32": types.int32,
    "i64": types.int64,
}


def stored_as(code):
    """The type of a pointer to elements with some code."""
    return STORED_AS[code.removesuffix(STOCHASTIC)]


class Column(types.CPointer):
    """A pointer to the elements of one of a tensor's arrays, which share no memory with those of the others.

    The compiler is told so: it would otherwise compare the addresses of all of them before each block.
    """

    def __init__(self, dtype, number):
        super().__init__(dtype)
        self.name = f"{dtype}* of column {number}"
        self.number = number

    @property
    def key(self):
        return self.name


register_model(Column)(models.PointerModel)

COLUMNS = 16  # more of them are possible, and compared


def without_alias(builder, access, column):
    """Say of a load or store that it is of that column and of no other."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "a tensor's arrays")])
    scopes = [
        module.add_metadata([ir.MetaDataString(module, f"column {k}"), domain])
        for k in range(max(COLUMNS, column.number + 1))
    ]
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(column.number)]))
    access.set_metadata("noalias", module.add_metadata(scopes))
    return access


def prepare(grad, weight, rescale, bound, wd):
    """The gradient that a rule sees: ``clip(rescale * grad, bound) + wd * weight``."""
    return clip(rescale * grad, bound) + wd * weight


@intrinsic(prefer_literal=True)
def pointers(typingctx, addresses, layout):
    """A tuple of addresses as a tuple of pointers to what a layout such as ``"f16 f32 f32"`` says."""
    codes = layout.literal_value.split()
    columns = [Column(stored_as(code), number) for number, code in enumerate(codes)]
    sig = types.Tuple(columns)(addresses, layout)

    def codegen(context, builder, sig, args):
        found = cgutils.unpack_tuple(builder, args[0], addresses.count)
        values = [
            builder.inttoptr(address, context.get_value_type(to))
            for address, to in zip(found, sig.return_type, strict=True)
        ]
        return context.make_tuple(builder, sig.return_type, values)

    return sig, codegen


@intrinsic
def load(typingctx, pointers, i, real=None):
    """The elements number `i` behind a tuple of pointers, as a tuple of numbers, all `real` if given."""
    kinds = [pointer.dtype for pointer in pointers]
    plain = [types.float32 if kind in (half.HALF, half.BFLOAT) else kind for kind in kinds]
    numbers = plain if real is None else [real.dtype] * len(kinds)
    sig = types.BaseTuple.from_types(numbers)(pointers, i, types.none if real is None else real)

    def codegen(context, builder, sig, args):
        found = cgutils.unpack_tuple(builder, args[0], len(kinds))
        stored = [
            without_alias(builder, builder.load(builder.gep(pointer, [args[1]])), column)
            for pointer, column in zip(found, pointers, strict=True)
        ]
        values = [half.decode(context, builder, *each) for each in zip(stored, kinds, strict=True)]
        cast = [context.cast(builder, *each) for each in zip(values, plain, numbers, strict=True)]
        return context.make_tuple(builder, sig.return_type, cast)

    return sig, codegen


@intrinsic
def store(typingctx, pointers, i, values):
    """Write a tuple of numbers to the elements number `i` behind a tuple of pointers."""
    sig = types.void(pointers, i, values)
    kinds = [pointer.dtype for pointer in pointers]

    def codegen(context, builder, sig, args):
        targets = cgutils.unpack_tuple(builder, args[0], len(kinds))
        for k, (target, kind) in enumerate(zip(targets, kinds, strict=True)):
            number = types.float32 if kind in (half.HALF, half.BFLOAT) else kind
            value = context.cast(builder, builder.extract_value(args[2], k), values.types[k], number)
            bits = half.encode(context, builder, value, kind)
            without_alias(builder, builder.store(bits, builder.gep(target, [args[1]])), pointers[k])
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def store_stochastic(typingctx, pointers, i, values, key):
    """`store` of half precision, rounded stochastically; `key` as `numba_opt.compiler.rounding` has it."""
    sig = types.void(pointers, i, values, types.uint32)
    kinds = [pointer.dtype for pointer in pointers]
    converters = {half.HALF: rounding.to_half, half.BFLOAT: rounding.to_bfloat}

    def codegen(context, builder, sig, args):
        targets = cgutils.unpack_tuple(builder, args[0], len(kinds))
        for k, (target, kind) in enumerate(zip(targets, kinds, strict=True)):
            value = context.cast(builder, builder.extract_value(args[2], k), values.types[k], types.float32)
            own = builder.add(args[3], ir.Constant(ir.IntType(32), k * rounding.STATE & 0xFFFFFFFF))
            hashed = types.uint32(i, types.uint32)
            random_bits = context.compile_internal(builder, rounding.random_bits, hashed, [args[1], own])
            converted = types.uint32(types.float32, types.uint32)
            bits = context.compile_internal(builder, converters[kind], converted, [value, random_bits])
            bits = builder.trunc(bits, ir.IntType(16))
            without_alias(builder, builder.store(bits, builder.gep(target, [args[1]])), pointers[k])
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def prefetch(typingctx, pointers, i):
    """Ask for the cache lines of the elements number `i` behind a tuple of pointers."""
    sig = types.void(pointers, i)

    def codegen(context, builder, sig, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for pointer in cgutils.unpack_tuple(builder, args[0], len(pointers)):
            place = builder.bitcast(builder.gep(pointer, [args[1]]), byte)
            builder.call(function, [place, number(0), number(3), number(1)])  # to read, to stay, data
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


@intrinsic
def add(typingctx, a, b):
    """Return a + b, in an order that suits the processor: sums may be vectorised."""
    return a(a, a), lambda context, builder, sig, args: builder.fadd(*args, flags=("reassoc",))
