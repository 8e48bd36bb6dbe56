"""Single elements in the loops on a GPU: addresses give and take numbers, several at an access.

Addresses are int64, as numbers of a table are, so that index arithmetic never mixes signs (Numba would go to
float64). They become pointers in address space 1, without which every access asks at run time what memory it
is in. Adjacent loads of single numbers are not merged by the compiler, so a group of them is loaded as one
LLVM vector of 16 bytes. Nothing here checks anything: `numba_opt.device` has.
"""

from __future__ import annotations

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from ..compiler import half, rounding
from ..compiler.elements import STORED_AS
from ..core.storage import SIZES, STOCHASTIC

ACCESS = 16  # bytes that one access moves where arrays are aligned

I32, I64, F16, F32 = ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
STORED = {"f32": F32, "f64": ir.DoubleType(), "f16": F16, "bf16": ir.IntType(16), "i32": I32, "i64": I64}
NUMBERS = {"f16": types.float32, "bf16": types.float32}  # others are what they are stored as


def _known(*kinds):
    """Tell whether arguments that an intrinsic is made of are constants; Numba asks without that first."""
    return all(isinstance(kind, types.Literal) for kind in kinds)


def _codes(layout):
    """Return the codes of arrays; that some are rounded stochastically matters to `store` alone."""
    return layout.literal_value.replace(STOCHASTIC, "").split()


def _number(code):
    return NUMBERS.get(code, STORED_AS[code])


def _decode(context, builder, bits, code):
    """A loaded value as a number."""
    return builder.fpext(bits, F32) if code == "f16" else half.decode(context, builder, bits, STORED_AS[code])


def _encode(context, builder, number, code):
    """A number as what is stored."""
    if code == "f16":
        return builder.fptrunc(number, F16)
    return half.encode(context, builder, number, STORED_AS[code])


def _stochastic(context, builder, number, code, element, key):
    """A number as what is stored, rounded as `numba_opt.compiler.rounding` does it."""
    u4 = types.uint32
    random_bits = context.compile_internal(builder, rounding.random_bits, u4(u4, u4), [element, key])
    convert = rounding.to_half if code == "f16" else rounding.to_bfloat
    bits = context.compile_internal(builder, convert, u4(types.float32, u4), [number, random_bits])
    return builder.bitcast(builder.trunc(bits, ir.IntType(16)), STORED[code])


def _vector(code, count):
    """Return the type of an access. LLVM would move 16-bit integers in halves, so they come in pairs."""
    return ir.VectorType(I32, count // 2) if code == "bf16" else ir.VectorType(STORED[code], count)


def _taken(builder, value, code, count):
    """The elements that an access has moved."""
    if count == 1:
        return [value]
    if code != "bf16":
        return [builder.extract_element(value, I32(k)) for k in range(count)]
    pairs = [builder.extract_element(value, I32(k)) for k in range(count // 2)]
    return [builder.trunc(builder.lshr(pair, I32(at)), STORED[code]) for pair in pairs for at in (0, 16)]


def _joined(builder, values, code):
    """Elements as what an access moves."""
    if len(values) == 1:
        return values[0]
    if code == "bf16":
        words = [builder.zext(value, I32) for value in values]
        values = [
            builder.or_(low, builder.shl(high, I32(16)))
            for low, high in zip(words[::2], words[1::2], strict=True)
        ]
    result = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for k, value in enumerate(values):
        result = builder.insert_element(result, value, I32(k))
    return result


def _accesses(builder, address, i, code, count):
    """Pointers to group number `i` of `count` elements, one for each access, and how many each one holds."""
    step = min(count, max(1, ACCESS // SIZES[code]))
    kind = STORED[code] if step == 1 else _vector(code, step)
    first = builder.add(address, builder.mul(builder.zext(i, I64), I64(count * SIZES[code])))
    for k in range(0, count, step):
        place = builder.add(first, I64(k * SIZES[code]))
        yield builder.inttoptr(place, kind.as_pointer(1)), step


@intrinsic
def load(typingctx, addresses, layout, i, count):
    """Group number `i` (uint32) of `count` elements behind each address, as `count` tuples of numbers."""
    if not _known(layout, count):
        return None
    codes, lanes = _codes(layout), count.literal_value
    row = types.BaseTuple.from_types([_number(code) for code in codes])
    sig = types.UniTuple(row, lanes)(addresses, layout, i, count)

    def codegen(context, builder, sig, args):
        columns = []
        for address, code in zip(cgutils.unpack_tuple(builder, args[0], len(codes)), codes, strict=True):
            column = []
            for pointer, held in _accesses(builder, address, args[2], code, lanes):
                value = builder.load(pointer)
                value.align = held * SIZES[code]
                column += [_decode(context, builder, b, code) for b in _taken(builder, value, code, held)]
            columns.append(column)
        rows = [context.make_tuple(builder, row, list(lane)) for lane in zip(*columns, strict=True)]
        return context.make_tuple(builder, sig.return_type, rows)

    return sig, codegen


@intrinsic
def store(typingctx, addresses, layout, i, rows, key):
    """Write `rows`, tuples of numbers, as group number `i` (uint32) of elements behind each address.

    Codes such as "bf16:sr" are rounded stochastically: `key` (uint32) is that of the element that the
    addresses are of, and of the first one of these arrays.
    """
    if not _known(layout):
        return None
    codes, lanes, row = _codes(layout), len(rows), rows[0]
    stochastic = [n for n, code in enumerate(layout.literal_value.split()) if code.endswith(STOCHASTIC)]
    sig = types.void(addresses, layout, i, rows, key)

    def codegen(context, builder, sig, args):
        found = cgutils.unpack_tuple(builder, args[3], lanes)
        for c, code in enumerate(codes):
            values = [
                context.cast(builder, builder.extract_value(lane, c), row[c], _number(code)) for lane in found
            ]
            if c in stochastic:
                own = builder.add(args[4], I32(stochastic.index(c) * rounding.STATE & 0xFFFFFFFF))
                first = builder.mul(args[2], I32(lanes))
                values = [
                    _stochastic(context, builder, value, code, builder.add(first, I32(k)), own)
                    for k, value in enumerate(values)
                ]
            else:
                values = [_encode(context, builder, value, code) for value in values]
            address, at = builder.extract_value(args[0], c), 0
            for pointer, held in _accesses(builder, address, args[2], code, lanes):
                value = _joined(builder, values[at : at + held], code)
                builder.store(value, pointer).align = held * SIZES[code]
                at += held
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def numbers(typingctx, address, code, count):
    """`count` numbers that begin at an address."""
    if not _known(code, count):
        return None
    kind, n = code.literal_value, count.literal_value
    sig = types.UniTuple(_number(kind), n)(address, code, count)

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], STORED[kind].as_pointer(1))
        values = [builder.load(builder.gep(pointer, [I32(k)])) for k in range(n)]
        values = [_decode(context, builder, value, kind) for value in values]
        return context.make_tuple(builder, sig.return_type, values)

    return sig, codegen


@intrinsic
def put(typingctx, address, code, values):
    """Write a tuple of numbers from an address on."""
    if not _known(code):
        return None
    kind = code.literal_value
    sig = types.void(address, code, values)

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], STORED[kind].as_pointer(1))
        for k in range(len(values)):
            value = context.cast(builder, builder.extract_value(args[2], k), values[k], _number(kind))
            builder.store(_encode(context, builder, value, kind), builder.gep(pointer, [I32(k)]))
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def rounded(typingctx, number, code):
    """A number as it would be found again once it had been stored."""
    if not _known(code):
        return None
    kind = code.literal_value

    def codegen(context, builder, sig, args):
        return _decode(context, builder, _encode(context, builder, args[0], kind), kind)

    return number(number, code), codegen


@intrinsic
def moved(typingctx, addresses, layout, elements):
    """Addresses of arrays, so many elements further on."""
    if not _known(layout):
        return None
    codes = _codes(layout)
    sig = types.UniTuple(types.int64, len(codes))(addresses, layout, elements)

    def codegen(context, builder, sig, args):
        values = [
            builder.add(builder.extract_value(args[0], c), builder.mul(args[2], I64(SIZES[code])))
            for c, code in enumerate(codes)
        ]
        return context.make_tuple(builder, sig.return_type, values)

    return sig, codegen


@intrinsic
def aligned(typingctx, addresses):
    """Tell whether all of some addresses are where accesses of 16 bytes may begin."""
    sig = types.boolean(addresses)

    def codegen(context, builder, sig, args):
        bits = I64(0)
        for c in range(len(addresses)):
            bits = builder.or_(bits, builder.extract_value(args[0], c))
        return builder.icmp_unsigned("==", builder.and_(bits, I64(ACCESS - 1)), I64(0))

    return sig, codegen


@intrinsic
def shfl_xor(typingctx, number, mask):
    """The number that the thread of this warp has whose lane differs in the bits of `mask`."""
    sig = number(number, types.int32)
    words = number.bitwidth // 32

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(I32, [I32, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.shfl.sync.bfly.i32")
        whole = ir.IntType(32 * words)
        bits, result = builder.bitcast(args[0], whole), whole(0)
        for k in range(words):
            word = builder.trunc(builder.lshr(bits, whole(32 * k)), I32)
            word = builder.call(function, [I32(-1), word, args[1], I32(31)])
            result = builder.or_(result, builder.shl(builder.zext(word, whole), whole(32 * k)))
        return builder.bitcast(result, context.get_value_type(number))

    return sig, codegen


@intrinsic
def syncwarp(typingctx):
    """Let the threads of a warp wait for each other, and each see what the others have written."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.bar.warp.sync")
        builder.call(function, [I32(-1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def all_sync(typingctx, flag):
    """Tell whether a flag is set in all threads of a warp."""

    def codegen(context, builder, sig, args):
        flag = ir.IntType(1)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(flag, [I32, flag]), "llvm.nvvm.vote.all.sync"
        )
        return builder.zext(builder.call(function, [I32(-1), builder.trunc(args[0], flag)]), args[0].type)

    return flag(flag), codegen
