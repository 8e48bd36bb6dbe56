"""The vocabulary of rules: one name, the same meaning for whole arrays and for a kernel's scalars.

A rule is written with ``+ - * /`` and these functions. Called from Python they are NumPy's ufuncs, so
that the rule works on arrays; inside a compiled kernel Numba takes the overloads below. Both give the
same bits, NaN for NaN. Integer constants take the type of the other operand: a literal would otherwise
carry float32 arithmetic to float64, twice as slow on a CPU and ruinous on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

__all__ = ["absolute", "clip", "exp", "log", "maximum", "minimum", "sign", "sqrt", "where"]


def sqrt(x: Any) -> Any:
    """Square root."""
    return np.sqrt(x)


def exp(x: Any) -> Any:
    """e to the power of x."""
    return np.exp(x)


def log(x: Any) -> Any:
    """Natural logarithm."""
    return np.log(x)


def absolute(x: Any) -> Any:
    """Absolute value."""
    return np.abs(x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; NaN for NaN."""
    return np.sign(x)


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN if either is NaN."""
    return np.maximum(a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN if either is NaN."""
    return np.minimum(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, ``b`` elsewhere; both are evaluated."""
    return np.where(condition, a, b)


def clip(x: Any, bound: Any) -> Any:
    """x, brought into [-bound, bound]; NaN stays NaN."""
    x = np.where(-bound > x, -bound, x)
    return np.where(bound < x, bound, x)


@overload(sqrt)
def _sqrt(x):
    return lambda x: math.sqrt(x)


@overload(exp)
def _exp(x):
    return lambda x: math.exp(x)


@overload(log)
def _log(x):
    return lambda x: math.log(x)


@overload(absolute)
def _absolute(x):
    return lambda x: abs(x)


@overload(sign)
def _sign(x):
    real = x
    return lambda x: x if x != x else real(x > 0) - real(x < 0)


def _common(a, b):
    return b if isinstance(a, types.Integer) else a


@overload(maximum)
def _maximum(a, b):
    real = _common(a, b)

    def maximum(a, b):
        a, b = real(a), real(b)
        return a if (a > b or a != a) else b  # this form keeps NaN and still vectorises

    return maximum


@overload(minimum)
def _minimum(a, b):
    real = _common(a, b)

    def minimum(a, b):
        a, b = real(a), real(b)
        return a if (a < b or a != a) else b

    return minimum


@overload(where)
def _where(condition, a, b):
    real = _common(a, b)
    return lambda condition, a, b: real(a) if condition else real(b)


@overload(clip)
def _clip(x, bound):
    def clip(x, bound):
        x = -bound if -bound > x else x  # comparisons with NaN are false, so it falls through
        return bound if bound < x else x

    return clip
