"""Each form of instruction on its edge cases, against exact arithmetic in Python's numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from . import kernels
from .arithmetic import FORMS, NAN
from .faults import KernelError, UnknownFormError
from .parsing import TYPES

BITS = {
    8: [0, 1, 2, 0x7F, 0x80, 0xFF],
    16: [0, 1, 7, 0x7FFF, 0x8000, 0xFFFF, 0x1234],
    32: [0, 1, 3, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678],
    64: [0, 1, 3, 63, 64, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0],
}
REALS = {
    "f16": [0x0000, 0x8000, 0x3C00, 0xBC01, 0x0001, 0x03FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E01],
    "f32": [
        *(0x00000000, 0x80000000, 0x3F800000, 0xBF800001, 0x00000001, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000),
        *(0xFF800000, 0x7FC00001, 0xFFC12345, 0x3EAAAAAB, 0x477FE000, 0x33000000, 0x4F000000, 0xCF000001),
    ],
    "f64": [
        *(0, 1 << 63, 0x3FF0000000000000, 0xBFF0000000000001, 1, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000),
        *(0xFFF0000000000000, 0x7FF8000000000001, 0x3FD5555555555555, 0x47EFFFFFF0000000, 0x3690000000000000),
        *(0x41E0000000000000, 0xC1F0000000100000),
    ],
}
REGISTERS = {"pred": "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def edges(kind):
    if kind == "pred":
        return [0, 1]
    return REALS.get(kind) or BITS[int(kind[1:])]


def number(kind, bits):
    """What some bits mean: a Python number, exactly."""
    if kind == "pred":
        return bool(bits)
    width = int(kind[1:])
    if kind[0] == "f":
        return float(np.array(bits, f"u{width // 8}").view(TYPES[kind]))
    bits &= (1 << width) - 1
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def nearest(kind, value):
    """The bits of the real number that is nearest to an exact one; ties go to the even one."""
    dtype = TYPES[kind]
    info, unsigned = np.finfo(dtype), np.dtype(f"u{dtype.itemsize}")
    if not isinstance(value, Fraction):
        if value != value:
            return int(NAN[dtype.str[1:]].view(unsigned))
        if math.isinf(value) or value == 0:
            return int(np.array(value, dtype).view(unsigned))
        value = Fraction(value)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, int(info.minexp)) - info.nmant)
    steps = round(size / step)  # Python rounds to even
    result = steps * step
    largest = Fraction(float(info.max))
    found = math.inf if result > largest else float(result)
    return int(np.array(-found if value < 0 else found, dtype).view(unsigned))


def real_result(op, kind, values):
    """A sum, product, quotient or root, exactly, or what IEEE says where there is none."""
    with np.errstate(all="ignore"):
        wide = [np.float64(v) for v in values]
        plain = {
            "add": lambda: wide[0] + wide[1],
            "sub": lambda: wide[0] - wide[1],
            "mul": lambda: wide[0] * wide[1],
            "div": lambda: wide[0] / wide[1],
            "sqrt": lambda: np.sqrt(wide[0]),
        }[op]()
    if (
        not all(map(math.isfinite, values))
        or (op == "div" and values[1] == 0)
        or (op == "sqrt" and values[0] <= 0)
    ):
        return float(plain)
    if op == "sqrt":
        return root(Fraction(values[0]))
    a, b = map(Fraction, values)
    found = {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / b}[op]()
    return found if found else float(plain)  # whose zero has the right sign


def root(value):
    """A square root, with more bits than any type has, and one more if there is a rest."""
    scale = 1 << 2400
    whole = value.numerator * scale // value.denominator
    found = math.isqrt(whole)
    return Fraction(2 * found + (found * found != whole or value * scale != whole), 2 << 1200)


def expected(form, bits):
    """The bits of what an instruction gives, told from its name."""
    op, *mods = form.split(".")
    kinds = FORMS[form].operands
    values = [number(kind, b) for kind, b in zip(kinds, bits, strict=True)]
    kind = mods[-1]
    if op in ("add", "sub", "mul", "div", "sqrt") and "rn" in mods:
        return nearest(FORMS[form].result, real_result(op, kind, values))
    if op == "cvt":
        return converted(mods, values, FORMS[form].result)
    if op == "setp":
        return compared(mods[0], *values)
    if op == "selp":
        return bits[0] if bits[2] else bits[1]
    if (op in ("mov", "abs", "neg") and kind[0] in "fbp") or op == "mov":
        sign = 0 if kind == "pred" or op == "mov" else 1 << (int(kind[1:]) - 1)
        return bits[0] & ~sign if op == "abs" else bits[0] ^ sign
    return whole(op, mods, kind, values, bits)


def converted(mods, values, result):
    if mods[-2] == "f16x2":
        return nearest("f16", values[1]) | nearest("f16", values[0]) << 16
    if mods[0] == "rzi":
        if values[0] != values[0]:
            return 0
        low, high = (int(x) for x in (np.iinfo(TYPES[result]).min, np.iinfo(TYPES[result]).max))
        return low if values[0] < low else high if values[0] > high else int(values[0])
    if result[0] == "f":
        return nearest(result, Fraction(values[0]) if isinstance(values[0], int) and values[0] else values[0])
    return number(result, values[0])


def compared(how, a, b):
    nan = a != a or b != b
    if how in ("num", "nan"):
        return nan == (how == "nan")
    if nan:
        return how.endswith("u")
    plain = how.removesuffix("u")
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[plain]


def whole(op, mods, kind, values, bits):
    width = 1 if kind == "pred" else int(kind[1:])
    a, b, c = (*values, 0, 0, 0)[:3]
    if op in ("div", "rem"):
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return quotient if op == "div" else a - quotient * b
    if op == "bfi":
        at, length = (min(x & 255, 1 << 8) for x in bits[2:])
        mask = ((1 << min(length, width)) - 1) << at & ((1 << width) - 1)
        return b & ~mask | a << at & mask
    if op == "prmt":
        pool, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
        for k in range(4):
            pick = c >> 4 * k & 15
            byte = pool[pick & 7]
            out.append((255 if byte >> 7 else 0) if pick & 8 else byte)
        return int.from_bytes(bytes(out), "little")
    return {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "mad": lambda: a * b + c,
        "min": lambda: min(a, b),
        "max": lambda: max(a, b),
        "neg": lambda: -a,
        "and": lambda: a & b,
        "or": lambda: a | b,
        "xor": lambda: a ^ b,
        "not": lambda: -1 - a,  # of a bool, too
        "shl": lambda: a << b if b < width else 0,
        "shr": lambda: a >> min(b, width),
    }[op]()


def register(kind, k):
    return f"{REGISTERS['pred' if kind == 'pred' else int(kind[1:])]}{k}"


def kernel_of(form):
    """A kernel in which each thread does one instruction: operands are 8 bytes each, as is the result."""
    operands, result = FORMS[form].operands, FORMS[form].result
    lines = [f"mul.wide.u32 %rd2, %r1, {8 * (1 + len(operands))};", "add.s64 %rd3, %rd1, %rd2;"]
    for k, kind in enumerate(operands, 4):
        place = f"[%rd3+{8 * (k - 3)}]"
        if kind == "pred":
            lines += [f"ld.global.u32 %r19, {place};", f"setp.ne.u32 %p{k}, %r19, 0;"]
        else:
            lines.append(f"ld.global.b{max(int(kind[1:]), 16)} {register(kind, k)}, {place};")
    args = ", ".join(register(kind, k) for k, kind in enumerate(operands, 4))
    if result == "pred":
        lines += [f"{form} %p3, {args};", "selp.b32 %r3, 1, 0, %p3;", "st.global.b32 [%rd3], %r3;"]
    else:
        own = f"b{max(int(result[1:]), 16)}"
        lines += [
            f"{form} {register(result, 10)}, {args};",
            f"st.global.{own} [%rd3], {register(result, 10)};",
        ]
    return kernels.program("\n".join(lines))


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    operands, result = FORMS[form].operands, FORMS[form].result
    divides = form.startswith(("div.u", "div.s", "rem."))
    cases = [case for case in itertools.product(*map(edges, operands)) if not (divides and case[1] == 0)][
        :1000
    ]
    memory = np.zeros((len(cases), 1 + len(operands)), np.uint64)
    memory[:, 1:] = cases
    found = kernels.run(kernel_of(form), memory, len(cases))[:, 0]
    width = 32 if result == "pred" else max(int(result[1:]), 16)
    for case, got in zip(cases, found.tolist(), strict=True):
        wanted = int(expected(form, case)) & (1 if result == "pred" else (1 << width) - 1)
        assert got & ((1 << width) - 1) == wanted, [hex(x) for x in (*case, got, wanted)]


@pytest.mark.parametrize("form", ["div.s32", "rem.u64"])
def test_division_by_zero(form):
    with pytest.raises(KernelError, match="divided by zero"):
        kernels.run(kernel_of(form), np.zeros((1, 3), np.uint64), 1)


@pytest.mark.parametrize(
    "line",
    [
        *("fma.rn.f32 %f1, %f2, %f3, %f4;", "add.f32 %f1, %f2, %f3;", "add.rz.f32 %f1, %f2, %f3;"),
        *("sqrt.approx.f32 %f1, %f2;", "div.full.f32 %f1, %f2, %f3;", "cvt.rz.f16.f32 %rs1, %f2;"),
        *("add.rn.ftz.f32 %f1, %f2, %f3;", "ld.volatile.global.u32 %r3, [%rd3];", "ld.u32 %r3, [%rd3];"),
        *("ld.local.u32 %r3, [%rd3];", "atom.global.add.u32 %r3, [%rd3], 1;"),
        "setp.lt.and.s32 %p1, %r1, 0, %p2;",
        *("membar.gl;", "shfl.sync.up.b32 %r3, %r4, 1, 0, -1;", "shfl.sync.bfly.b32 %r3, %r1, 1, 31, 1;"),
        *("bar.sync 1;", "vote.sync.any.pred %p1, %p2, -1;", "@%p1 add.s32 %r3, %r1, 1;"),
        "mov.u32 %r3, %clock;",
        *("add.s32 %r3, %r1, %rd1;", "cvt.u32.u64 %r3, %r1;", "mul.hi.u32 %r3, %r1, %r2;", "exit;"),
    ],
)  # fmt: skip
def test_what_is_not_known(line):
    before = "setp.eq.u32 %p2, %r1, 0;\nmov.f32 %f2, 0f3F800000;\n"
    with pytest.raises(UnknownFormError):
        kernels.run(kernels.program(before + line), np.zeros(64, "u4"))


@pytest.mark.parametrize(
    "kind", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores(kind, count, space):
    """Bytes come as they are; a narrower one in a wider register has its sign, if it has any."""
    size = int(kind[1:]) // 8
    if size * count > 16:
        pytest.skip("an access has 16 bytes at most")
    vector = f".v{count}" if count > 1 else ""
    names = [f"{REGISTERS[8 * size]}{12 + k}" for k in range(count)]
    listed = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    content = np.random.default_rng(0).integers(0, 256, (32, 2, 16)).astype(np.uint8)
    body = f"""
        mul.wide.u32 %rd2, %r1, 32;
        add.s64 %rd3, %rd1, %rd2;
        ld.global{vector}.{kind} {listed}, [%rd3+16];
        mul.wide.u32 %rd4, %r1, 16;
        mov.u64 %rd5, held;
        add.s64 %rd6, %rd5, %rd4;
    """
    if space == "shared":
        body += f"st.shared{vector}.{kind} [%rd6], {listed};\nld.shared{vector}.{kind} {listed}, [%rd6];\n"
    # through memory of another kind: registers hold no more than bits
    found = kernels.run(kernels.program(body + f"st.global{vector}.{kind} [%rd3], {listed};", 512), content)
    whole = size * count
    assert (found[:, 0, :whole] == content[:, 1, :whole]).all()
    assert (found[:, 0, whole:] == content[:, 0, whole:]).all()


@pytest.mark.parametrize(("kind", "value"), [("u8", 0x80), ("s8", -0x80), ("u16", 0x8000), ("s16", -0x8000)])
def test_loads_into_wider_registers(kind, value):
    body = f"ld.global.{kind} %r4, [%rd3+4];\nst.global.u32 [%rd3], %r4;"
    content = np.array([[0, value & 0xFFFFFFFF]] * 4, np.uint32)
    assert (kernels.run(kernels.program(body), content, 4)[:, 0] == np.uint32(value & 0xFFFFFFFF)).all()


def test_halves():
    body = """
        ld.global.b64 %rd4, [%rd3];
        mov.b64 {%r4, %r5}, %rd4;
        mov.b64 {_, %r6}, %rd4;
        mov.b32 {%rs1, %rs2}, %r4;
        mov.b32 %r7, {%rs2, %rs1};
        xor.b32 %r8, %r5, %r6;
        add.s32 %r9, %r7, %r8;
        mov.b64 %rd5, {%r5, %r9};
        st.global.b64 [%rd3], %rd5;
    """
    found = kernels.run(kernels.program(body), np.array([0x1111222233334444], np.uint64), 1)
    assert hex(found[0]) == "0x4444333311112222"


def test_what_threads_know_of_themselves():
    body = """
        mov.u32 %r3, %ntid.x;
        mov.u32 %r4, %nctaid.x;
        mov.u32 %r5, %laneid;
        mad.lo.s32 %r6, %r2, %r3, %r1;
        mul.wide.u32 %rd2, %r6, 16;
        add.s64 %rd3, %rd1, %rd2;
        st.global.v4.u32 [%rd3], {%r1, %r2, %r4, %r5};
    """
    found = kernels.run(kernels.program(body), np.zeros((96, 4), "u4"), 48, 2)
    assert found.tolist() == [[t % 48, t // 48, 2, t % 48 % 32] for t in range(96)]


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 5, 31])
@pytest.mark.parametrize("given", ["constant", "register"])
def test_shuffles(mask, given):
    """Each warp's threads with those whose numbers differ in the mask's bits."""
    name = str(mask) if given == "constant" else "%r5"
    body = f"""
        ld.global.u32 %r4, [%rd3];
        mov.b32 %r5, {mask};
        shfl.sync.bfly.b32 %r6, %r4, {name}, 31, -1;
        st.global.u32 [%rd3+4], %r6;
    """
    content = np.random.default_rng(1).integers(0, 1 << 32, (64, 2)).astype("u4")
    found = kernels.run(kernels.program(body), content, 64)
    assert (found[:, 1] == content[np.arange(64) ^ mask, 0]).all()


def test_votes():
    body = """
        ld.global.u32 %r4, [%rd3];
        setp.ne.s32 %p1, %r4, 0;
        vote.sync.all.pred %p2, %p1, -1;
        selp.b32 %r5, 7, 9, %p2;
        st.global.u32 [%rd3+4], %r5;
    """
    content = np.ones((96, 2), "u4")
    content[40, 0] = 0
    found = kernels.run(kernels.program(body), content, 96)
    assert found[:, 1].tolist() == [7] * 32 + [9] * 32 + [7] * 32
