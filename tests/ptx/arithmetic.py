"""What each form of instruction computes, on NumPy arrays with one element for each thread.

Arithmetic is IEEE's, each operation rounded by itself, as that of PTX is without ``.ftz``, ``.approx`` and
``fma``; a NaN that is computed has the bits that NVIDIA's devices give it. Forms that are not in the table
are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .faults import KernelError
from .parsing import TYPES

NAN = {
    "f2": np.uint16(0x7FFF).view(np.float16),
    "f4": np.uint32(0x7FFFFFFF).view(np.float32),
    "f8": np.uint64(0x7FFFFFFFFFFFFFFF).view(np.float64),
}


class Form(NamedTuple):
    """A form of instruction: types of its result and its operands, and a function of these."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Any]


def device_nan(x: Any) -> Any:
    """With the device's NaN in the place of any other."""
    bad = x != x
    return np.where(bad, NAN[x.dtype.str[1:]], x) if bad.any() else x


def shifted_left(x: Any, by: Any) -> Any:
    bits = np.uint32(8 * x.dtype.itemsize)
    return np.where(by >= bits, x.dtype.type(0), x << np.minimum(by, bits - np.uint32(1)).astype(x.dtype))


def shifted_right(x: Any, by: Any) -> Any:
    """Signs fill the bits that come free, where there are signs."""
    bits = np.uint32(8 * x.dtype.itemsize)
    shifted = x >> np.minimum(by, bits - np.uint32(1)).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by >= bits, x.dtype.type(0), shifted)


def quotient(a: Any, b: Any) -> Any:
    """Rounded towards zero."""
    _refuse_zero(b)
    return a // b if a.dtype.kind == "u" else (a - np.fmod(a, b)) // b


def remainder(a: Any, b: Any) -> Any:
    _refuse_zero(b)
    return np.fmod(a, b)


def _refuse_zero(b: Any) -> None:
    if np.any(b == 0):
        raise KernelError("an integer is divided by zero")


def inserted(bits: Any, base: Any, at: Any, length: Any) -> Any:
    """`base` with its bits from number `at` on, so many, replaced by the lowest ones of `bits`."""
    width = 8 * base.dtype.itemsize
    at, length = at & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(width))
    whole = np.full(np.broadcast(base, at, length).shape, -1, "i8").view("u8").astype(base.dtype)
    low = np.where(length >= width, whole, ~shifted_left(whole, length))
    mask = shifted_left(low, at)
    return (base & ~mask) | (shifted_left(bits + np.zeros_like(mask), at) & mask)


def permuted(a: Any, b: Any, how: Any) -> Any:
    """Four of the eight bytes of `a` and `b`, or copies of their signs, as the selector's digits say."""
    pool = (b.astype("u8") << np.uint64(32)) | a.astype("u8")
    out = np.uint64(0)
    for k in range(4):
        pick = how.astype("u8") >> np.uint64(4 * k) & np.uint64(15)
        byte = pool >> np.uint64(8) * (pick & np.uint64(7)) & np.uint64(255)
        byte = np.where(pick & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        out = out | byte << np.uint64(8 * k)
    return out.astype("u4")


def joined(low: Any, high: Any) -> Any:
    """Two halves as one word."""
    wide = np.dtype(f"u{2 * low.dtype.itemsize}")
    return low.astype(wide) | high.astype(wide) << wide.type(8 * low.dtype.itemsize)


def halves_of(high: Any, low: Any) -> Any:
    """Two float32 as float16 in one word."""
    return joined(*(device_nan(x.astype("f2")).view("u2") for x in (low, high)))


def toward_zero(target: np.dtype) -> Callable[[Any], Any]:
    """A real number as an integer: the nearest one there is of what is beyond them; NaN becomes 0."""
    limits = np.iinfo(target)

    def convert(x: Any) -> Any:
        number = np.where(x == x, x, 0).astype("f8")
        return np.clip(number, limits.min, limits.max).astype("i8").astype(target)

    return convert


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of real numbers with the device's NaN."""
    return lambda *args: device_nan(function(*args))


def to(kind: str) -> Callable[[Any], Any]:
    return lambda x: x.astype(TYPES[kind])


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNORDERED: dict[str, Callable[[Any, Any], Any]] = {  # true of NaN, too
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}


def _table() -> dict[str, Form]:
    forms: dict[str, Form] = {}

    def add(name: str, result: str, operands: tuple[str, ...], function: Callable[..., Any]) -> None:
        forms[name] = Form(result, operands, function)

    def sums(kind: str, prefix: str, wrap: Callable[..., Any], product: str) -> None:
        add(f"add{prefix}.{kind}", kind, (kind, kind), wrap(lambda a, b: a + b))
        add(f"sub{prefix}.{kind}", kind, (kind, kind), wrap(lambda a, b: a - b))
        add(f"mul{product}.{kind}", kind, (kind, kind), wrap(lambda a, b: a * b))

    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        sums(kind, "", lambda f: f, ".lo")
        add(f"mad.lo.{kind}", kind, (kind, kind, kind), lambda a, b, c: a * b + c)
        add(f"min.{kind}", kind, (kind, kind), np.minimum)
        add(f"max.{kind}", kind, (kind, kind), np.maximum)
        add(f"div.{kind}", kind, (kind, kind), quotient)
        add(f"rem.{kind}", kind, (kind, kind), remainder)
        add(f"shr.{kind}", kind, (kind, "u32"), shifted_right)
        for how in ("lt", "le", "gt", "ge"):
            add(f"setp.{how}.{kind}", "pred", (kind, kind), ORDERED[how])
        if kind[0] == "s":
            add(f"neg.{kind}", kind, (kind,), lambda a: -a)
        if kind[1:] != "64":
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            add(f"mul.wide.{kind}", wide, (kind, kind), _wide_product(TYPES[wide]))
    for bits in ("16", "32", "64"):
        kind = f"b{bits}"
        add(f"not.{kind}", kind, (kind,), lambda a: ~a)
        add(f"shl.{kind}", kind, (kind, "u32"), shifted_left)
        for own in (f"b{bits}", f"u{bits}", f"s{bits}"):
            add(f"setp.eq.{own}", "pred", (own, own), ORDERED["eq"])
            add(f"setp.ne.{own}", "pred", (own, own), ORDERED["ne"])
        for own in (f"b{bits}", f"u{bits}", f"s{bits}", *([] if bits == "16" else [f"f{bits}"])):
            add(f"selp.{own}", own, (own, own, "pred"), lambda a, b, c: np.where(c, a, b))
            add(f"mov.{own}", own, (own,), np.copy)
    for kind in ("b16", "b32", "b64", "pred"):
        add(f"and.{kind}", kind, (kind, kind), lambda a, b: a & b)
        add(f"or.{kind}", kind, (kind, kind), lambda a, b: a | b)
        add(f"xor.{kind}", kind, (kind, kind), lambda a, b: a ^ b)
    add("not.pred", "pred", ("pred",), lambda a: ~a)
    add("mov.pred", "pred", ("pred",), np.copy)
    for kind in ("b32", "b64"):
        add(f"bfi.{kind}", kind, (kind, kind, "u32", "u32"), inserted)
    add("prmt.b32", "b32", ("b32", "b32", "b32"), permuted)
    for kind in ("f16", "f32", "f64"):
        sums(kind, ".rn", real, ".rn")
    for kind in ("f32", "f64"):
        add(f"div.rn.{kind}", kind, (kind, kind), real(lambda a, b: a / b))
        add(f"sqrt.rn.{kind}", kind, (kind,), real(np.sqrt))
        add(f"abs.{kind}", kind, (kind,), np.abs)  # of a NaN, too, it changes the sign alone
        add(f"neg.{kind}", kind, (kind,), lambda a: -a)
        for how, function in {**ORDERED, **UNORDERED}.items():
            add(f"setp.{how}.{kind}", "pred", (kind, kind), function)
        for bits in ("32", "64"):
            for sign in "us":
                add(f"cvt.rn.{kind}.{sign}{bits}", kind, (f"{sign}{bits}",), to(kind))
        for target in ("u32", "s32"):
            add(f"cvt.rzi.{target}.{kind}", target, (kind,), toward_zero(TYPES[target]))
    integers = [f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64)]
    for target in integers:
        for source in integers:
            add(f"cvt.{target}.{source}", target, (source,), to(target))
    for target, source in (("f32", "f16"), ("f64", "f16"), ("f64", "f32")):
        add(f"cvt.{target}.{source}", target, (source,), real(to(target)))
        add(f"cvt.rn.{source}.{target}", source, (target,), real(to(source)))
    # The dialect of compute capability 10: a half goes into a sum as it is, and two are made at once.
    add("add.rn.f32.f16", "f32", ("f16", "f32"), real(lambda a, b: a.astype("f4") + b))
    add("sub.rn.f32.f16", "f32", ("f16", "f32"), real(lambda a, b: a.astype("f4") - b))
    add("cvt.rn.f16x2.f32", "b32", ("f32", "f32"), halves_of)
    return forms


def _wide_product(wide: np.dtype) -> Callable[[Any, Any], Any]:
    return lambda a, b: a.astype(wide) * b.astype(wide)


FORMS = _table()
