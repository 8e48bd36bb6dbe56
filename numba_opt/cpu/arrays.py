"""Arrays in the CPU's memory: views of them, and whether a kernel may have them.

What is not a plain NumPy array is looked at here one by one, and what a kernel cannot take as it lies (a
strided view, a misaligned array) is worked on in a copy that is written back. Errors are worded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..core.call import Arrays, Scan
from ..core.columns import GRAD, STATES, WEIGHT
from ..core.foreign import lack_of_memory, loaded, on_cuda, type_name
from ..core.storage import (
    ABSENT,
    CODES,
    EXPECTED,
    bfloat16,
    code_of,
    gradients_for,
    is_half,
    pack,
    state_dtype,
)


def as_array(value: Any, what: str) -> np.ndarray:
    """A NumPy view of somebody's array, sharing its memory.

    NumPy arrays, CPU tensors of PyTorch (detached), and what offers ``__array_interface__`` or DLPack.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array; expected one without a mask")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if on_cuda(value):
        raise TypeError(
            f"{what} is on a GPU ({type_name(value)}); expected an array on the CPU, as the weight"
        )
    tensor = loaded("torch", "Tensor")
    try:
        if tensor is not None and isinstance(value, tensor):
            if lack := lack_of_memory(value):
                raise ValueError(f"it {lack}")
            return value.detach().numpy()  # a view of its own, from which nobody can take the memory away
        if hasattr(value, "__array_interface__") and not isinstance(value, np.generic):  # a scalar is a copy
            return np.asarray(value)
        if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
            return np.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError, ValueError) as error:
        raise TypeError(f"{what} ({type_name(value)}) cannot be viewed as a NumPy array: {error}") from error
    raise TypeError(f"{what} is {type_name(value)}; expected an array")


look_at = as_array  # as `numba_opt.cuda.arrays` has it


def zeros_like(weight: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros where a weight is."""
    return np.zeros(shape, dtype)


def as_single(weight: Any, what: str) -> np.ndarray:
    """A float32 copy of a weight."""
    return as_array(weight, what).astype(np.float32)


def to_host(array: Any, what: str) -> np.ndarray:
    """The array itself."""
    return as_array(array, what)


def writable(array: Any, what: str) -> np.ndarray:
    """Return something that takes ``[...] = array``, and has the array's shape and dtype."""
    return as_array(array, what)


# ---------------------------------------------------------------- one by one


def one_by_one(arrays: Arrays) -> tuple[list[list[Any]], list[tuple[np.ndarray, np.ndarray]]]:
    """Return the columns as arrays that a kernel can take, all checked, and what stands in for others."""
    names = arrays.names()
    columns: list[list[Any]] = [
        [
            None
            if value is None and arrays.may_lack(c, t)
            else as_array(value, f"{name} of {arrays.label(t)}")
            for t, value in enumerate(column)
        ]
        for c, (name, column) in enumerate(zip(names, arrays.columns, strict=True))
    ]
    for t in range(len(arrays.weights)):
        _check_tensor(arrays, [column[t] for column in columns], t)
    for t, last_step in arrays.last_steps.items():
        check_last_step(last_step, f"last_step of {arrays.label(t)}", columns[WEIGHT][t].shape[:1] or (1,))
    last_steps = [arrays.last_steps.get(t) for t in range(len(arrays.weights))]
    check_apart([*columns, last_steps], [*names, "last_step"], arrays.label, _touched_arrays(arrays))
    return columns, _replace(columns)


def _check_tensor(arrays: Arrays, own: Sequence[Any], t: int) -> None:
    """Refuse a tensor whose arrays do not go together, or cannot be written."""
    label, weight, end = arrays.label(t), own[WEIGHT], STATES + arrays.n_state
    if not code_of(weight.dtype):
        raise TypeError(f"weight of {label} is {weight.dtype}; expected {EXPECTED}")
    if arrays.rule.per_row and weight.ndim != 2:
        raise ValueError(f"weight of {label} has shape {weight.shape}; expected 2 dimensions")
    expected = state_dtype(arrays.state_storage, weight.dtype)
    for c, (name, array) in enumerate(zip(arrays.names(), own, strict=True)):
        if array is not None:
            what = f"{name} of {label}"
            check_shape(array, what, (weight.shape[0], 1) if arrays.of_row(c) else weight.shape)
            if c > GRAD:
                check_writable(array, what)
            if STATES <= c < end and array.dtype != expected:
                why = "state_dtype says" if arrays.state_storage else "the weight"
                raise TypeError(f"{what} is {array.dtype}; expected {expected}, as {why}")
    if own[GRAD] is not None:
        _check_gradient(own[GRAD], weight, f"gradient of {label}", *own[end:])


def _replace(columns: list[list[Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Put copies where arrays cannot be taken as they lie; those that are written to, with their copies."""
    replaced = []
    for c, column in enumerate(columns):
        for t, array in enumerate(column):
            if array is not None:
                column[t] = np.require(array, requirements=["C", "A"])
                if c > GRAD and column[t] is not array:
                    replaced.append((array, column[t]))
    return replaced


def scan_of(columns: Sequence[Sequence[Any]]) -> Scan:
    """Make the scan that `numba_opt.cpu.ndarray.read` would make, by each array's own word."""
    weights = columns[WEIGHT]
    width = [w.size // w.shape[0] if w.ndim and w.shape[0] else 1 for w in weights]
    nothing = [0] * len(weights)
    at = [[0 if a is None else a.__array_interface__["data"][0] for a in column] for column in columns]
    numbers = [[ABSENT if a is None else CODES.index(code_of(a.dtype)) for a in column] for column in columns]
    return Scan(
        addresses=np.array([*at, nothing, width, nothing], np.uint64).T.copy(),
        bytes=np.array([[0 if a is None else a.nbytes for a in column] for column in columns]).T.copy(),
        sizes=np.array([w.size for w in weights], np.int64),
        storages=np.array([pack(own) for own in zip(*numbers, strict=True)], np.int64),
    )


def _touched_arrays(arrays: Arrays) -> Iterable[tuple[int, np.ndarray]]:
    """The arrays that sparse gradients are made of, with their positions."""
    return [(t, array) for t, rows in arrays.touched.items() if rows is not None for array in rows.arrays()]


# ---------------------------------------------------------------- checks


def _check_gradient(grad: np.ndarray, weight: np.ndarray, what: str, model_weight: Any = None) -> None:
    """Refuse a gradient whose dtype does not go with the weight's, or a model weight that does not."""
    if model_weight is not None and not (weight.dtype == np.float32 and is_half(model_weight.dtype)):
        raise TypeError(f"{what}: expected a float32 weight with a half-precision copy")
    codes = gradients_for(code_of(weight.dtype), "" if model_weight is None else code_of(model_weight.dtype))
    if code_of(grad.dtype) not in codes:
        expected = weight.dtype if model_weight is None else model_weight.dtype
        raise TypeError(f"{what} is {grad.dtype}; expected {expected}, as the weight")


def check_shape(array: np.ndarray, what: str, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}; expected {shape}")


def check_writable(array: np.ndarray, what: str) -> None:
    """Refuse an array that cannot be written, or whose elements share memory."""
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only; expected an array that can be written")
    reach = 0  # bytes from the first to past the last element of the inner dimensions
    for stride, length in sorted(
        (abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ):
        if stride < max(reach, array.itemsize) and array.size:
            raise ValueError(f"{what} has elements that share memory (strides {array.strides})")
        reach = max(reach, array.itemsize) + stride * (length - 1)


def check_last_step(last_step: Any, what: str, shape: tuple[int, ...]) -> None:
    """Refuse last steps of rows that are not what `Optimizer.create_state` made."""
    plain = isinstance(last_step, np.ndarray) and not isinstance(last_step, np.ma.MaskedArray)
    if not (plain and last_step.dtype == np.int64):
        raise TypeError(f"{what} is {type_name(last_step)}; expected an array of int64 without a mask")
    check_shape(last_step, what, shape)
    if not (last_step.flags.c_contiguous and last_step.flags.aligned and last_step.flags.writeable):
        raise ValueError(f"{what} must be contiguous and writable")


def check_apart(
    columns: Sequence[Sequence[Any]],
    names: Sequence[str],
    label: Callable[[int], str],
    read: Iterable[tuple[int, np.ndarray]],
) -> None:
    """Refuse an array that will be written and shares memory with any other, one that is `read` included.

    All columns but the first are written. What is read are arrays of gradients, with their positions.
    """
    everything = [(array, c, t) for c, column in enumerate(columns) for t, array in enumerate(column)]
    everything += [(array, GRAD, t) for t, array in read]
    spans = []
    for array, c, t in everything:
        if array is not None and array.size:
            spans.append((*np.lib.array_utils.byte_bounds(array), c, t, array))
    spans.sort(key=lambda span: span[:4])
    active: list[tuple[Any, ...]] = []  # those that may reach into the next ones
    for start, stop, c, t, array in spans:
        active = [span for span in active if span[1] > start]
        for _, _, c2, t2, other in active:
            if (c or c2) and _share(array, other):
                this, that = sorted([(t2, c2), (t, c)])
                raise ValueError(
                    f"{names[that[1]]} of {label(that[0])} shares memory with "
                    f"{names[this[1]]} of {label(this[0])}; expected arrays of their own"
                )
        active.append((start, stop, c, t, array))


def _share(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays have an element in common; true also where finding out takes too long."""
    limit: Any = 1_000_000  # NumPy's own annotations have said different things of it
    try:
        return np.shares_memory(a, b, max_work=limit)
    except np.exceptions.TooHardError:
        return True


def known_dtypes() -> list[np.dtype]:
    """The dtypes of `CODES`: that of bfloat16 once somebody has imported ml_dtypes."""
    found: list[np.dtype] = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]
    if kind := bfloat16():
        found.append(np.dtype(kind))
    return found
