"""What an array is: its address, dtype and shape, and whether a kernel may have it.

Kernels work on raw addresses, so this is the border where memory safety is decided. `bind` takes the
arrays of one call and returns what the kernels need, or raises before anything has been written. Plain
NumPy arrays are read in bulk (`numba_opt.kernels.ndarray`); anything else is looked at one by one, and
what a kernel cannot take as it lies (a strided view, a half-precision array) is worked on in a copy
that is written back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .kernels import ndarray

Columns = Sequence[Sequence[Any]]


class Table(NamedTuple):
    """The tensors of a call that share a dtype, as a kernel takes them."""

    dtype: str
    members: np.ndarray  # their positions in the call's lists
    addresses: np.ndarray
    offsets: np.ndarray  # each tensor's first element on the kernel's long line, then the line's length


class Bound(NamedTuple):
    """The arrays of a call, checked. It keeps them alive for as long as it holds their addresses."""

    tables: list[Table]
    arrays: Columns  # gradients, weights, then each state, as the kernels work on them
    copies: list[tuple[np.ndarray, np.ndarray]]  # (the caller's array, what is worked on instead)

    def write_back(self) -> None:
        """Bring what was worked on in copies to where it came from."""
        for array, copy in self.copies:
            array[...] = copy


def bind(columns: Columns, names: Sequence[str], per_row: bool, label: Callable[[int], str]) -> Bound:
    """The arrays of a call as tables of addresses, one for each dtype, all of it checked.

    Parameters
    ----------
    columns : sequence of sequence of array
        The gradients, the weights and each state, every column of the same length.
    names : sequence of str
        What a column holds, for the errors.
    per_row : bool
        Weights are matrices and a state holds one number for each row, shape ``(rows, 1)``.
    label : callable
        Names the parameter at a position, for the errors.

    Raises
    ------
    TypeError
        Something is not an array, or of a dtype that no kernel takes.
    ValueError
        Shapes or dtypes differ, something cannot be written, or arrays share memory.
    """
    copies: list[tuple[np.ndarray, np.ndarray]] = []
    found = ndarray.read(columns, per_row) if ndarray.readable() else None
    if found is None or ndarray.overlapping(found):
        columns, copies = _one_by_one(columns, names, per_row, label)
        found = _ask(columns)
    return Bound(_tables(found), columns, copies)


def _tables(found: ndarray.Survey) -> list[Table]:
    """One table for each dtype among the arrays."""
    result = []
    for kind, dtype in enumerate(ndarray.DTYPES):
        members = np.flatnonzero(found.kinds == kind)
        if len(members):
            offsets = np.zeros(len(members) + 1, np.int64)
            np.cumsum(found.sizes[members], out=offsets[1:])
            result.append(Table(dtype.str[1:], members, found.addresses[members], offsets))
    return result


def as_array(value: Any, what: str) -> np.ndarray:
    """A NumPy view of somebody's array, sharing its memory.

    NumPy arrays, CPU tensors of PyTorch (detached), and what offers ``__array_interface__`` or DLPack.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array; expected one without a mask")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{what} is a CUDA array ({_type(value)}); this version updates arrays on the CPU")
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            return value.detach().numpy()
        if hasattr(value, "__array_interface__"):
            return np.asarray(value)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError, ValueError) as error:
        raise TypeError(f"{what} ({_type(value)}) cannot be viewed as a NumPy array: {error}") from error
    raise TypeError(f"{what} is {_type(value)}; expected an array")


def is_half(dtype: np.dtype) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype == np.float16 or dtype.name == "bfloat16"


def master(weight: np.ndarray, grad: np.ndarray, state: Any, label: str) -> tuple[np.ndarray, Any]:
    """The float32 copy and the states of a half-precision weight, checked against it and its gradient."""
    if not (isinstance(state, (tuple, list)) and len(state) == 2 and isinstance(state[0], np.ndarray)):
        raise TypeError(f"state of {label} is {_type(state)}; expected (float32 weight, states)")
    _check_match(state[0], f"float32 weight of {label}", np.dtype(np.float32), weight.shape)
    _check_match(grad, f"gradient of {label}", weight.dtype, weight.shape)
    _check_writable(weight, f"weight of {label}")
    _check_apart([[grad], [weight]], ("gradient", "weight"), lambda t: label)
    return state[0], state[1]


def _type(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _one_by_one(
    columns: Columns, names: Sequence[str], per_row: bool, label: Callable[[int], str]
) -> tuple[list[list[np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """`columns` as arrays that a kernel can take, and the copies among them; every array is checked."""
    arrays = [
        [as_array(value, f"{name} of {label(t)}") for t, value in enumerate(column)]
        for name, column in zip(names, columns, strict=True)
    ]
    for t, weight in enumerate(arrays[1]):
        _check_dtype(weight, f"weight of {label(t)}")
        if per_row and weight.ndim != 2:
            raise ValueError(f"weight of {label(t)} has shape {weight.shape}; expected 2 dimensions")
        for c, (name, column) in enumerate(zip(names, arrays, strict=True)):
            shape = (weight.shape[0], 1) if per_row and c > 1 else weight.shape
            _check_match(column[t], f"{name} of {label(t)}", weight.dtype, shape)
            if c > 0:
                _check_writable(column[t], f"{name} of {label(t)}")
    _check_apart(arrays, names, label)
    copies = []
    for c, column in enumerate(arrays):
        for t, array in enumerate(column):
            dtype = np.float32 if is_half(array.dtype) else array.dtype
            column[t] = np.require(array, dtype, ["C", "A"])
            if c > 0 and column[t] is not array:
                copies.append((array, column[t]))
    return arrays, copies


def _check_dtype(weight: np.ndarray, what: str) -> None:
    if weight.dtype not in ndarray.DTYPES and not is_half(weight.dtype):
        raise TypeError(f"{what} is {weight.dtype}; expected float32, float64, float16 or bfloat16")


def _check_match(array: np.ndarray, what: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype:
        kind = TypeError if array.dtype.kind not in "fV" else ValueError
        raise kind(f"{what} is {array.dtype}; expected {dtype}, as the weight")
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}; expected {shape}")


def _check_writable(array: np.ndarray, what: str) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only; expected an array that can be written")
    reach = 0  # bytes from the first to past the last element of the inner dimensions
    for stride, length in sorted(
        (abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ):
        if stride < max(reach, array.itemsize) and array.size:
            raise ValueError(f"{what} has elements that share memory (strides {array.strides})")
        reach = max(reach, array.itemsize) + stride * (length - 1)


def _check_apart(arrays: list[list[np.ndarray]], names: Sequence[str], label: Callable[[int], str]) -> None:
    """Refuse an array that will be written and shares memory with any other."""
    spans = []
    for c, column in enumerate(arrays):
        for t, array in enumerate(column):
            if array.size:
                start, stop = np.lib.array_utils.byte_bounds(array)
                spans.append((start, stop, c, t))
    spans.sort()
    active: list[tuple[int, int, int, int]] = []  # those that may reach into the next ones
    for start, stop, c, t in spans:
        active = [span for span in active if span[1] > start]
        for _, _, c2, t2 in active:
            if (c or c2) and _share(arrays[c][t], arrays[c2][t2]):
                this, that = sorted([(t2, c2), (t, c)])
                raise ValueError(
                    f"{names[that[1]]} of {label(that[0])} shares memory with "
                    f"{names[this[1]]} of {label(this[0])}; expected arrays of their own"
                )
        active.append((start, stop, c, t))


def _share(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have an element in common; true also where finding out takes too long."""
    try:
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _ask(columns: Sequence[Sequence[np.ndarray]]) -> ndarray.Survey:
    """What `numba_opt.kernels.ndarray.read` finds, from each array's own word."""
    weights = columns[1]
    width = [w.shape[-1] if w.ndim else 1 for w in weights]
    at = [[a.__array_interface__["data"][0] for a in column] for column in columns]
    return ndarray.Survey(
        addresses=np.array([*at, width], np.uint64).T.copy(),
        bytes=np.array([[a.nbytes for a in column] for column in columns], np.int64).T.copy(),
        sizes=np.array([w.size for w in weights], np.int64),
        kinds=np.array([ndarray.DTYPES.index(w.dtype) for w in weights], np.int8),
    )
