"""Parts of a checkpoint, looked at before they are believed; errors say what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np

from ..core import arguments
from ..errors import NONSENSE, CheckpointError

NAMES: dict[type, str] = {Mapping: "a dict", dict: "a dict", list: "a list", tuple: "a tuple", str: "a text"}
NAMES |= {int: "a whole number", Integral: "a whole number", type(None): "None"}

SCALARS = (bool, int, float, str, type(None))


def part(holder: Any, key: str, kinds: Any, what: str) -> Any:
    """A part of something, which must be of one of some kinds."""
    if not isinstance(holder, Mapping):
        raise CheckpointError(f"{what} is {shown(holder)}; expected a dict with {key!r}")
    if key not in holder:
        raise CheckpointError(f"{what} lacks {key!r}")
    value, kinds = holder[key], kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(dict.fromkeys(NAMES[kind] for kind in kinds))
        raise CheckpointError(f"{key!r} of {what} is {shown(value)}; expected {expected}")
    return value


def count(name: str, value: Any) -> int:
    """A number of updates."""
    with refusing("the checkpoint"):
        found = arguments.count(name, value, 0)
    if found >= 2**63:
        raise CheckpointError(f"the checkpoint's {name} is {shown(found)}; expected less than 2**63")
    return found


def by_index(pairs: Any, name: str, checked: Callable[[str, Any], Any]) -> dict[Any, Any]:
    """A dict that was saved as a list of pairs."""
    if not isinstance(pairs, list) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise CheckpointError(f"the checkpoint's {name} are {shown(pairs)}; expected a list of pairs")
    found = {}
    for index, value in pairs:
        try:
            twice = index in found
        except TypeError as error:
            raise CheckpointError(
                f"the checkpoint's {name} have the index {shown(index)}; expected a number, text or tuple"
            ) from error
        if twice:
            raise CheckpointError(f"the checkpoint's {name} have the index {shown(index)} twice")
        with refusing("the checkpoint"):
            found[index] = checked(f"{name}[{shown(index)}]", value)
    return found


def shown(value: Any) -> str:
    """A value as messages have it, however large."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, shape {value.shape}"
    if isinstance(value, tuple) and len(value) < 6 and all(isinstance(v, SCALARS) for v in value):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def named(value: Any) -> str:
    """A name as messages have it: bare, if it is short enough to be one."""
    return value if isinstance(value, str) and len(value) <= 60 else shown(value)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Say of errors over what a checkpoint holds that they are the checkpoint's."""
    try:
        yield
    except CheckpointError:
        raise
    except NONSENSE as error:
        raise CheckpointError(f"{what}: {str(error)[:400]}") from error
