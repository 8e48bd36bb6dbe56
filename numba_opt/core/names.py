"""Parameters by name, patterns that fit names, and what people read of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def named_arrays(params: Any) -> dict[str, Any]:
    """Parameters by name: a dict as it is, those of a list as "0", "1" and so on."""
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                raise TypeError(f"params must have names that are str, got {name!r}")
        named = dict(params)
    elif isinstance(params, (list, tuple)):
        named = {str(i): array for i, array in enumerate(params)}
    else:
        raise TypeError(f"params must be a dict or a list of arrays, got {type(params).__name__}")
    if not named:
        raise ValueError("params must hold at least one array, got none")
    return named


def fitting(what: str, patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that some patterns fit, each of which must fit one, but for the pattern of all."""
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fit = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not fit and pattern != "*":
            raise ValueError(f"{what}: no parameter is called {pattern!r}; there are {few(names)}")
        found += fit
    return found


def few(names: Sequence[str]) -> str:
    """Some names, for a message."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def amount(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
