"""User arguments: numbers within limits, counts, keywords. Each error names the parameter, what came
and what was expected."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from typing import Any, SupportsIndex

import numpy as np


def count(name: str, value: SupportsIndex, minimum: int) -> int:
    """`value` as an int of at least `minimum`."""
    try:
        found = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        found = None
    expected = f"{name} must be an integer >= {minimum}, got {value!r}"
    if found is None:
        raise TypeError(f"{expected} of type {type(value).__name__}")
    if found < minimum:
        raise ValueError(expected)
    return found


def number(
    name: str,
    value: object,
    minimum: float = 0.0,
    maximum: float = math.inf,
    below: float = math.inf,
) -> float:
    """`value` as a finite float, with ``minimum <= value <= maximum`` and ``value < below``."""
    if type(value) is float and minimum <= value <= maximum and -math.inf < value < below:
        return value  # most are, and steps ask often
    limits = {
        (0, math.inf, math.inf): " >= 0",
        (-math.inf, math.inf, math.inf): "",
    }.get(
        (minimum, maximum, below),
        f" in [{minimum:g}, {min(maximum, below):g}{']' if below > maximum else ')'}",
    )
    expected = f"{name} must be a finite number{limits}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected} of type {type(value).__name__}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and minimum <= found <= maximum and found < below):
        raise ValueError(expected)
    return found


def optional(name: str, value: object) -> float | None:
    """Return None, or `value` as a finite float of at least 0."""
    return None if value is None else number(name, value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value` if it is one of some texts."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def parameters(cls: type) -> dict[str, Any]:
    """The parameters that the constructors of a class and of its bases take, its own first, with defaults."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        for name, parameter in inspect.signature(base.__init__).parameters.items():  # type: ignore[misc]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self":
                found.setdefault(name, parameter.default)
    return found


def unknown(cls: type, given: dict[str, Any]) -> TypeError:
    """The error for keywords that no constructor of a class takes; it lists those that are taken."""
    first = next(iter(given))
    return TypeError(f"{cls.__name__}() has no parameter {first!r}; it takes {', '.join(parameters(cls))}")


def outside() -> int:
    """The `stacklevel` at which a warning speaks of the code that called this package."""
    level, frame, package = 1, inspect.currentframe(), __name__.partition(".")[0]
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level - 1
