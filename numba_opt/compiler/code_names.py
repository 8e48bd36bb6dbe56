"""The names that a function's code mentions."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(256)  # taking a function apart takes longer than all else that a look at it does
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function looks up, nested functions included."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return tuple(sorted(found.union(*map(global_names, nested_codes(code)))))


def attribute_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function may ask modules for, nested functions included."""
    return tuple(sorted({*code.co_names}.union(*map(attribute_names, nested_codes(code)))))


def nested_codes(code: types.CodeType) -> Iterable[types.CodeType]:
    """The code of the functions within."""
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
