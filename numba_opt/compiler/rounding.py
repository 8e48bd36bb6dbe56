"""Stochastic rounding: up or down by chance, so that a sum of many small changes is right on average.

Where the chance comes from is a hash of what is being stored, and nothing else: the seed and the step, the
parameter, the state's number and the element's. So it is the same for any number of threads, for one tensor
among many or alone, and for a run that goes on from a checkpoint.

The functions work on arrays and, inside kernels, on scalars, as those of `numba_opt.scalar` do. All
integers are of 32 bits, sixteen of which an AVX-512 instruction takes at once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from numba.extending import overload, register_jitable

from ..scalar import where
from . import half

STATE = 0x9E3779B9  # between the numbers that two states of one element are hashed from

u32 = np.uint32


def bits(x):
    """float32 as the bits that it is stored in."""
    return x.view(np.uint32)


def number(u):
    """Bits as the float32 that they are."""
    return u.view(np.float32)


@overload(bits)
def _bits(x):
    return lambda x: half._bits(x)


@overload(number)
def _number(u):
    return lambda u: half._number(u)


@register_jitable
def mixed(x):
    """A hash of 32 bits: each bit of `x` changes half of them (the last steps of MurmurHash3)."""
    x = u32(x ^ u32(x >> u32(16)))
    x = u32(x * u32(0x85EBCA6B))
    x = u32(x ^ u32(x >> u32(13)))
    x = u32(x * u32(0xC2B2AE35))
    return u32(x ^ u32(x >> u32(16)))


@register_jitable
def key_of(step_low, step_high, tensor):
    """Return the key of a tensor's random bits in a step, to which the elements' numbers come later."""
    step = u32(u32(step_low) | u32(u32(step_high) << u32(16)))
    return mixed(u32(mixed(step) + u32(tensor)))


@register_jitable
def random_bits(element, key):
    """32 random bits for an element; numbers count modulo 2**32."""
    return mixed(u32(u32(element) + u32(key)))


def to_bfloat(x, random):
    """float32 as bfloat16 bits: up with the probability of what the lower 16 bits are of a step.

    Beyond the largest finite number, where there is nothing above to go to but infinity, to nearest.
    """
    u = bits(x)
    size = u32(u & u32(0x7FFFFFFF))
    nearest = u32(u32(0x7FFF) + u32(u32(u >> u32(16)) & u32(1)))
    raised = u32(u + where(size > u32(0x7F7F0000), nearest, u32(random >> u32(16))))
    quiet = u32(u | u32(0x400000))
    return u32(where(size > u32(0x7F800000), quiet, raised) >> u32(16))


def to_half(x, random):
    """float32 as float16 bits, likewise; a normal number loses 13 bits.

    Below 2**-14 the steps are 2**-24, and the chance is right to 2**-14 of a step.
    """
    u = bits(x)
    sign = u32(u32(u >> u32(16)) & u32(0x8000))
    size = u32(u & u32(0x7FFFFFFF))
    kept = u32(random >> u32(19))
    nearest = u32(u32(0xFFF) + u32(u32(size >> u32(13)) & u32(1)))
    raised = u32(size + where(size > u32(0x477FE000), nearest, kept))  # 65504
    normal = u32(u32(raised - u32(112 << 23)) >> u32(13))
    share = number(u32(u32(kept << u32(10)) | u32(0x3F800200))) - np.float32(1)  # (kept + 0.5) / 2**13
    steps = number(where(size < u32(0x38800000), size, u32(0))) * np.float32(2.0**24) + share
    small = u32(np.int32(steps))
    found = where(size < u32(0x38800000), small, normal)
    found = where(size >= u32(0x47800000), u32(0x7C00), found)  # 65536
    payload = u32(u32(0x7E00) | u32(u32(size >> u32(13)) & u32(0x3FF)))
    return u32(sign | where(size > u32(0x7F800000), payload, found))


def rounded(values: np.ndarray, dtype: np.dtype, elements: Any, key: Any, state: int) -> np.ndarray:
    """float32 as float16 or bfloat16, as kernels store it; `elements` are the numbers of the elements."""
    with np.errstate(all="ignore"):
        bits_of = random_bits(elements, u32((int(key) + state * STATE) & 0xFFFFFFFF))
        convert = to_half if dtype == np.float16 else to_bfloat
        return convert(np.ascontiguousarray(values, np.float32), bits_of).astype(np.uint16).view(dtype)


@functools.lru_cache(maxsize=1 << 16)
def tensor_number(index: Any) -> int:
    """32 bits that stand for a parameter, by its index, in any process."""
    return _hash(f"tensor {index!r}")


def step_numbers(seed: int, step: int) -> tuple[float, float]:
    """Two numbers of 16 bits that stand for a step, as float32 can hold them."""
    found = _hash(f"step {seed} {step}")
    return float(found & 0xFFFF), float(found >> 16)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
