"""float16 and bfloat16 as bits: how the loops' loads and stores turn them to float32 and back.

Numba has no half-precision arithmetic on the CPU. Kernels see float16 arrays as uint16 and bfloat16 arrays
as int16, so that the type of a pointer says which they are, and compute in float32. Rounding is to nearest,
ties to even. Processors with F16C convert float16 in one instruction; on x86 without it LLVM would call a
library function that is not there and end the process, so integer arithmetic does it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

HALF, BFLOAT = types.uint16, types.int16

I16, I32, F32, F16 = ir.IntType(16), ir.IntType(32), ir.FloatType(), ir.HalfType()


def decode(context, builder, bits, kind):
    """A loaded value as a number: float32 for half precision, itself otherwise."""
    if kind == BFLOAT:
        return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), F32)
    if kind != HALF:
        return bits
    if converts_half(context):
        return builder.fpext(builder.bitcast(bits, F16), F32)
    return context.compile_internal(builder, half_to_float, types.float32(HALF), [bits])


def encode(context, builder, number, kind):
    """A number as the bits to store."""
    if kind == BFLOAT:
        u = builder.bitcast(number, I32)
        odd = builder.and_(builder.lshr(u, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(u, builder.add(odd, I32(0x7FFF))), I32(16))
        quiet = builder.or_(builder.lshr(u, I32(16)), I32(0x40))
        return builder.trunc(
            builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded), I16
        )
    if kind != HALF:
        return number
    if converts_half(context):
        return builder.bitcast(builder.fptrunc(number, F16), I16)
    return context.compile_internal(builder, float_to_half, HALF(types.float32), [number])


def converts_half(context):
    """Tell whether the processor that code is made for converts float16 by itself."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or not triple.startswith(("x86", "i386", "i686"))


@intrinsic
def _bits(typingctx, number):
    return types.uint32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@intrinsic
def _number(typingctx, bits):
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], F32)


def half_to_float(h):
    """float16 bits as float32, by integer arithmetic and one exact product."""
    sign = types.uint32(h & types.uint32(0x8000)) << types.uint32(16)
    body = types.uint32(h & types.uint32(0x7FFF)) << types.uint32(13)
    if h & types.uint32(0x7C00) == types.uint32(0x7C00):  # infinity or NaN
        return _number(types.uint32(sign | body | types.uint32(0x7F800000)))
    scaled = _bits(types.float32(_number(types.uint32(body)) * types.float32(2.0**112)))
    return _number(types.uint32(sign | scaled))


def float_to_half(x):
    """float32 as float16 bits, to nearest, ties to even."""
    u = _bits(x)
    sign = types.uint32((u >> types.uint32(16)) & types.uint32(0x8000))
    a = types.uint32(u & types.uint32(0x7FFFFFFF))
    if a > types.uint32(0x7F800000):  # NaN: quiet, with the payload's upper bits
        r = types.uint32(0x7E00) | ((a >> types.uint32(13)) & types.uint32(0x3FF))
    elif a >= types.uint32(0x47800000):  # 65536 and more
        r = types.uint32(0x7C00)
    elif a < types.uint32(0x38800000):  # below 2**-14: adding 0.5 rounds at a subnormal's last bit
        r = types.uint32(_bits(types.float32(_number(a) + types.float32(0.5))) - types.uint32(0x3F000000))
    else:  # the exponent's bias from 127 to 15, and rounding
        odd = (a >> types.uint32(13)) & types.uint32(1)
        r = types.uint32(a - types.uint32(112 << 23) + types.uint32(0xFFF) + odd) >> types.uint32(13)
    return types.uint16(sign | r)
