"""How numbers are stored: the dtypes that kernels load and store, and how a tensor's arrays lie together.

The one table of dtypes. Everything else names them by the codes that stand here.
"""

from __future__ import annotations

import contextlib
import sys
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

STOCHASTIC = ":sr"  # behind the code of states that are rounded stochastically


class Storage(NamedTuple):
    """A dtype of weights, gradients and states."""

    code: str  # in layouts, in kernels' names and in the keys under which they are kept
    name: str  # NumPy's and torch's
    size: int  # bytes

    @property
    def half(self) -> bool:
        """True if it is computed in float32."""
        return self.size == 2


# Their places here are their numbers in a `numba_opt.core.call.Scan`.
STORAGES = (
    Storage("f32", "float32", 4),
    Storage("f64", "float64", 8),
    Storage("f16", "float16", 2),
    Storage("bf16", "bfloat16", 2),
)
CODES = tuple(storage.code for storage in STORAGES)
HALVES = tuple(storage.code for storage in STORAGES if storage.half)
OF_NAME = {storage.name: storage.code for storage in STORAGES}
EXPECTED = "float32, float64, float16 or bfloat16"  # in errors

SIZES = {storage.code: storage.size for storage in STORAGES} | {"i32": 4, "i64": 8}

STATE_DTYPES = ("float32", "bfloat16", "float16")  # which may be asked for

# A tensor's arrays have one number together, in which each array's storage takes BITS bits, the first array's
# the lowest ones. ABSENT stands for an array that the tensor does not have.
BITS, ABSENT = 4, 15


def size_of(code: str) -> int:
    """The bytes of an element."""
    return SIZES[code.removesuffix(STOCHASTIC)]


def name_of(dtype: Any) -> str:
    """The name of a dtype that may be given as one, as a type of NumPy's or torch's, or by its name."""
    name = dtype
    if not isinstance(dtype, str):
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    return str(name).removeprefix("torch.")


def code_of(dtype: np.dtype) -> str:
    """The code of a NumPy dtype; empty if kernels do not know it."""
    return OF_NAME.get(dtype.name, "") if dtype.isnative else ""


def index_code(dtype: np.dtype) -> str:
    """The code of a dtype of row numbers or columns; empty if kernels do not know it."""
    return {"int32": "i32", "int64": "i64"}.get(dtype.name, "") if dtype.isnative else ""


def dtype_of(code: str) -> np.dtype:
    """The NumPy dtype of a code.

    Raises
    ------
    ImportError
        It is bfloat16, and ml_dtypes is missing.
    """
    if code != "bf16":
        return np.dtype(STORAGES[CODES.index(code)].name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 states need ml_dtypes: pip install numba_opt[bfloat16]") from error
    return np.dtype(ml_dtypes.bfloat16)


def bfloat16() -> Any:
    """NumPy's type of bfloat16, once somebody has imported ml_dtypes that far; else None."""
    return getattr(sys.modules.get("ml_dtypes"), "bfloat16", None)


def is_half(dtype: np.dtype) -> bool:
    """Tell whether a dtype is float16 or bfloat16."""
    return code_of(dtype) in HALVES


def compute_dtype(weight: np.dtype) -> np.dtype:
    """The precision in which a rule is evaluated: double for double weights, else single."""
    return np.dtype(np.float64 if weight == np.float64 else np.float32)


def state_dtype(state_storage: str, weight: np.dtype) -> np.dtype:
    """The dtype of the states of a weight, which are stored as that code says or, if it is empty, alike."""
    code = state_storage.removesuffix(STOCHASTIC)
    return dtype_of(code) if code else weight


def gradients_for(weight: str, model_weight: str = "") -> tuple[str, ...]:
    """The gradients' storages that go with a weight's: the same, or half precision for a float32 weight."""
    if model_weight:
        return (model_weight, "f32")
    return ("f32", *HALVES) if weight == "f32" else (weight,)


class _Fields(NamedTuple):
    grad: str
    weight: str
    states: tuple[str, ...]
    model_weight: str


class Layout(_Fields):
    """The storage of a tensor's arrays: a code for its gradient, its weight and each state.

    `grad` is empty where gradients come another way. `model_weight` is the code of the half-precision weight
    beside a float32 one; it is empty where there is none.
    """

    @cached_property
    def own(self) -> Layout:
        """The layout without a gradient."""
        return Layout("", *self[1:])

    @cached_property
    def codes(self) -> tuple[str, ...]:
        """The codes of the arrays that there are, in the order of a table's columns."""
        return tuple(code for code in (self.grad, self.weight, *self.states, self.model_weight) if code)

    @property
    def text(self) -> str:
        """The codes as a text, for keys and for compiled code."""
        return " ".join(self.codes)

    @cached_property
    def values(self) -> str:
        """The weight and the states, which a rule gets, as a text."""
        return " ".join((self.weight, *self.states))

    @property
    def stochastic(self) -> bool:
        """True if states are rounded stochastically."""
        return any(code.endswith(STOCHASTIC) for code in self.states)

    @property
    def compute(self) -> str:
        """The code of the precision in which the rule is evaluated."""
        return "f64" if self.weight == "f64" else "f32"

    @cached_property
    def real(self) -> np.dtype:
        """The dtype of the precision in which the rule is evaluated."""
        return dtype_of(self.compute)

    @property
    def widest(self) -> int:
        """The bytes of the largest elements."""
        return max(map(size_of, self.codes))


class TouchedForm(NamedTuple):
    """The form of a sparse gradient: what it is made of, how its numbers are stored, and its indices."""

    kind: str
    grad: str = ""
    indices: str = ""

    @property
    def text(self) -> str:
        """The form as a text, for keys."""
        return " ".join(filter(None, self))


@cache
def layout_of(packed: int, columns: int, n_state: int, state_storage: str = "") -> Layout | None:
    """Return the layout of arrays with these storages, packed into one number; None if no kernel takes them.

    States must be stored as `state_storage` says, or, if it is empty, as the weight.
    """
    numbers = [packed >> (BITS * c) & ABSENT for c in range(columns)]
    if numbers[-1] == ABSENT:
        numbers.pop()
    if ABSENT in numbers:
        return None
    grad, weight, *rest = (CODES[number] for number in numbers)
    states, model_weight = rest[:n_state], "".join(rest[n_state:])
    state = state_storage or weight
    if grad not in gradients_for(weight, model_weight):
        return None
    if any(found != state.removesuffix(STOCHASTIC) for found in states):
        return None
    return Layout(grad, weight, (state,) * n_state, model_weight)


@cache
def own_layout(packed: int, columns: int, n_state: int, state_storage: str = "") -> Layout | None:
    """Return the layout of a tensor's arrays other than its gradient, which may be absent."""
    if packed & ABSENT == ABSENT:  # as if there were one of the weight's storage
        packed += (packed >> BITS & ABSENT) - ABSENT
    layout = layout_of(packed, columns, n_state, state_storage)
    return None if layout is None else layout.own


def pack(numbers: Any) -> int:
    """The storages of a tensor's arrays as one number."""
    return sum(number << (BITS * c) for c, number in enumerate(numbers))
