"""The files that every kernel is made of, and what belongs to packages whose versions tell what it is."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Where compiled functions of this package are.
PACKAGE = Path(__file__).parents[1]
OWN = (
    "scalar.py",
    "core/columns.py",
    "core/rules.py",
    "core/storage.py",
    "compiler/*.py",
    "cpu/*.py",
    "cuda/*.py",
    "torch/counters.py",
    "torch/dlpack.py",
)

# Packages whose functions need no look, as their versions, and Python's, are part of every kernel's key.
VERSIONED = ("builtins", "numba", "llvmlite", "numpy")

# The package's files that kernels are made of, and their modules.
OWN_FILES = sorted(path for pattern in OWN for path in PACKAGE.glob(pattern))
OWN_MODULES = frozenset(
    ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)) for path in OWN_FILES
)


def known_name(value: Any) -> str:
    """The name of what a versioned package, or this one's loops, has under that name; else empty."""
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            return f"{value.__module__}.{value.__qualname__}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return ""
    if not (is_of(value, VERSIONED) or is_own(value)):
        return ""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else ""


def is_of(value: Any, packages: Sequence[str]) -> bool:
    """Tell whether an object's module belongs to one of some packages."""
    return str(value.__module__).partition(".")[0] in packages


def is_own(value: Any) -> bool:
    """Tell whether an object's module is part of every fingerprint."""
    return value.__module__ in OWN_MODULES
