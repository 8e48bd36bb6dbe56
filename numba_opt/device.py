"""What an array is: its address, dtype and shape, and whether a kernel may have it.

Kernels work on raw addresses, so this is the border where memory safety is decided. `bind` takes the
arrays of one call and returns what the kernels need, or raises before anything has been written. Plain
NumPy arrays are read in bulk (`numba_opt.cpu.ndarray`); anything else is looked at one by one, and
what a kernel cannot take as it lies (a strided view, a misaligned array) is worked on in a copy that is
written back.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .cpu import ndarray

Columns = Sequence[Sequence[Any]]

STATE_DTYPES = {"float32": "f4", "bfloat16": "b2", "float16": "f2"}  # to be asked for, and their codes


class Table(NamedTuple):
    """The tensors of a call that are stored alike, as a kernel takes them (`numba_opt.cpu.loops`)."""

    layout: str
    members: np.ndarray  # their positions in the call's lists
    addresses: np.ndarray
    offsets: np.ndarray  # each tensor's first element on the kernel's long line, then the line's length

    @property
    def elements(self) -> int:
        """The line's length."""
        return int(self.offsets[-1])


class Bound(NamedTuple):
    """The arrays of a call, checked. It keeps them alive for as long as it holds their addresses."""

    tables: list[Table]
    found: ndarray.Survey
    arrays: Columns  # as the kernels work on them
    replaced: list[tuple[np.ndarray, np.ndarray]]  # (the caller's array, what is worked on instead)
    stored: str = ""  # how states are, as in the request

    def write_back(self) -> list[partial[Any]]:
        """What brings the arrays that were worked on in others' place to where they belong."""
        return [partial(operator.setitem, array, ..., work) for array, work in self.replaced]


class Request(NamedTuple):
    """The arrays of one call and what is asked of them.

    `columns` holds the gradients, the weights and each state, every column of the same length, and perhaps
    the half-precision copies of the weights, None for a weight that has none; `label` says what the parameter
    at a position is called, for the errors. With `per_row`, weights are matrices and a state has the shape
    ``(rows, 1)``. A gradient that is None comes another way: `apart` then has the arrays that hold it, by
    position, which must not share memory with what is written. States are `stored` as that code says, or, if
    it is empty, as the weight; if they are rounded stochastically, `numbers` has one for each weight. What
    `sparse` gradients mean is as `Optimizer` says.
    """

    columns: Columns
    states: Sequence[str]  # their names
    per_row: bool
    label: Callable[[int], str]
    apart: Mapping[int, Sequence[np.ndarray]] = {}
    stamps: Mapping[int, Any] = {}  # of rows, where they catch up exactly: written, too
    stored: str = ""
    numbers: tuple[int, ...] = ()
    sparse: str = "lazy"
    histories: Mapping[int, Any] = {}  # of parameters with stamps, on GPUs

    @property
    def n_state(self) -> int:
        """How many states a weight has."""
        return len(self.states)

    def names(self) -> list[str]:
        """What each column holds."""
        states = [f"state {name!r}" for name in self.states]
        return ["gradient", "weight", *states, "half-precision weight"][: len(self.columns)]


def bind(request: Request) -> Bound:
    """The arrays of a call as tables of addresses, one for each way to store them, all of it checked.

    Raises
    ------
    TypeError
        Something is not an array, or of a dtype that no kernel takes.
    ValueError
        Shapes or dtypes differ, something cannot be written, or arrays share memory.
    """
    columns = request.columns
    replaced: list[tuple[np.ndarray, np.ndarray]] = []
    found = ndarray.read(columns, request.n_state, request.per_row) if ndarray.readable() else None
    if found is None or not _fit_apart(found, request):
        columns, replaced = _one_by_one(request)
        found = _ask(columns)
    if request.numbers:
        found.addresses[:, -3] = request.numbers
    return Bound(tables(found, request.n_state, request.stored), found, columns, replaced, request.stored)


def fit(found: ndarray.Survey, n_state: int, stored: str = "") -> bool:
    """Whether kernels take these arrays together: their dtypes match, and none that is written overlaps."""
    columns = found.bytes.shape[1]
    known = all(layout_of(code, columns, n_state, stored) for code in set(found.codes.tolist()))
    return known and not ndarray.overlapping(found)


def _fit_apart(found: ndarray.Survey, request: Request) -> bool:
    """`fit`, where some gradients come another way and some parameters have stamps."""
    if not request.apart and not request.stamps:
        return fit(found, request.n_state, request.stored)
    columns = found.bytes.shape[1]
    codes = found.codes.tolist()
    if any((code & ndarray.ABSENT == ndarray.ABSENT) != (t in request.apart) for t, code in enumerate(codes)):
        return False
    if not all(own_layout(code, columns, request.n_state, request.stored) for code in set(codes)):
        return False
    for t, stamps in request.stamps.items():
        _check_stamps(stamps, f"stamps of {request.label(t)}", request.columns[1][t].shape[:1] or (1,))
    read = [array for arrays in request.apart.values() for array in arrays]
    return not ndarray.overlapping(found, read, list(request.stamps.values()))


def tables(found: ndarray.Survey, n_state: int, stored: str = "") -> list[Table]:
    """One table for each layout among the arrays."""
    result = []
    codes = sorted(set(found.codes.tolist()))
    for code in codes:
        if code & ndarray.ABSENT == ndarray.ABSENT:  # of a gradient that comes another way
            continue
        members = np.flatnonzero(found.codes == code)
        addresses = found.addresses if len(codes) == 1 else found.addresses[members]
        offsets = line(found.sizes[members])
        layout = layout_of(code, found.bytes.shape[1], n_state, stored)
        result.append(Table(layout, members, addresses, offsets))
    return result


def line(counts: np.ndarray) -> np.ndarray:
    """Where each one's part of a kernel's long line begins, and where the line ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


@functools.cache
def layout_of(code: int, columns: int, n_state: int, stored: str = "") -> str:
    """How arrays with these dtypes are laid out for a kernel; empty if none takes them together.

    States must be `stored` as that code says, or, if it is empty, as the weight. A code with "s" before it
    asks for stochastic rounding.
    """
    numbers = [code >> (ndarray.BITS * c) & ndarray.ABSENT for c in range(columns)]
    if numbers[-1] == ndarray.ABSENT:
        numbers.pop()
    if ndarray.ABSENT in numbers:
        return ""
    grad, weight, *rest = (ndarray.CODES[number] for number in numbers)
    states, copy = rest[:n_state], rest[n_state:]
    kept = stored or weight
    fits = grad in gradients_for(weight, *copy) and all(state == kept[-2:] for state in states)
    return " ".join((grad, weight, *[kept] * n_state, *copy)) if fits else ""


def own_layout(code: int, columns: int, n_state: int, stored: str = "") -> str:
    """How a tensor's arrays other than its gradient, which may be absent, are laid out."""
    if code & ndarray.ABSENT == ndarray.ABSENT:  # as if there were one of the weight's dtype
        code += (code >> ndarray.BITS & ndarray.ABSENT) - ndarray.ABSENT
    return layout_of(code, columns, n_state, stored).partition(" ")[2]


def state_dtype(stored: str, weight: np.dtype) -> np.dtype:
    """The dtype of the states of a weight, where they are stored as that code says, or as the weight."""
    code = stored[-2:]
    if code == "b2":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError("bfloat16 states need ml_dtypes: pip install numba_opt[bfloat16]") from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(code) if code else weight


def gradients_for(weight: str, copy: str = "") -> tuple[str, ...]:
    """The gradients' dtypes that go with a weight's: the same, or half precision for a float32 weight."""
    if copy:
        return (copy, "f4")
    return ("f4", "f2", "b2") if weight == "f4" else (weight,)


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


def loaded(module: str, name: str) -> Any:
    """What a module calls by some name, if it has been imported that far, perhaps by another thread."""
    return getattr(sys.modules.get(module), name, None)


def lack_of_memory(tensor: Any) -> str:
    """What keeps the memory of torch's strided tensor from being read; empty if there is nothing."""
    if tensor.numel() == 0 or str(tensor.layout) != "torch.strided":
        return ""
    reach = 1 + sum((n - 1) * stride for stride, n in extents(tensor, tensor.stride()))
    size = tensor.element_size()
    there = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
    if reach * size > there:
        return f"needs {reach * size} bytes of its storage, which has {max(there, 0)} for it"
    return "" if tensor.data_ptr() else "has no memory"


def extents(tensor: Any, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Strides and lengths of the dimensions in which torch's tensor has more than one element."""
    if tensor.numel() == 0:
        return []
    return [(stride, n) for stride, n in zip(strides, tensor.shape, strict=True) if n > 1]


def zeros_like(weight: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros where a weight is."""
    return np.zeros(shape, dtype)


def as_single(weight: Any, what: str) -> np.ndarray:
    """A float32 copy of a weight."""
    return as_array(weight, what).astype(np.float32)


def on_cuda(value: Any) -> bool:
    """Whether an array is on a GPU: what decides between `numba_opt.cpu.execution` and `numba_opt.cuda`."""
    if isinstance(value, np.ndarray):
        return False
    tensor = loaded("torch", "Tensor")
    if tensor is not None and isinstance(value, tensor):
        return bool(value.is_cuda)
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == DLPACK_CUDA


DLPACK_CUDA = 2  # kDLCUDA


def is_half(dtype: np.dtype) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype == np.float16 or dtype.name == "bfloat16"


def name_of(dtype: Any) -> str:
    """The name of a dtype that may be given as one, as a type of NumPy's or torch's, or by its name."""
    name = dtype
    if not isinstance(dtype, str):
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    return str(name).removeprefix("torch.")


def code_of(dtype: np.dtype) -> str:
    """The code of a dtype in layouts; empty if kernels do not know it."""
    known = ndarray.dtypes()
    return ndarray.CODES[known.index(dtype)] if dtype in known else ""


def type_name(value: Any) -> str:
    """What an object is called in errors."""
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _one_by_one(request: Request) -> tuple[list[list[Any]], list[tuple[np.ndarray, np.ndarray]]]:
    """The columns as arrays that a kernel can take, and what stands in for others; all of it checked."""
    columns, _, per_row, label, apart, stamps, stored, *_ = request
    names, n_state = request.names(), request.n_state

    def may_lack(c: int, t: int) -> bool:
        return c == 2 + n_state or (c == 0 and t in apart)

    arrays: list[list[Any]] = [
        [
            None if value is None and may_lack(c, t) else as_array(value, f"{name} of {label(t)}")
            for t, value in enumerate(column)
        ]
        for c, (name, column) in enumerate(zip(names, columns, strict=True))
    ]
    for t, weight in enumerate(arrays[1]):
        if not code_of(weight.dtype):
            raise TypeError(
                f"weight of {label(t)} is {weight.dtype}; expected float32, float64, float16 or bfloat16"
            )
        if per_row and weight.ndim != 2:
            raise ValueError(f"weight of {label(t)} has shape {weight.shape}; expected 2 dimensions")
        for c, (name, column) in enumerate(zip(names, arrays, strict=True)):
            if column[t] is not None:
                what = f"{name} of {label(t)}"
                rows = per_row and 2 <= c < 2 + n_state
                check_shape(column[t], what, (weight.shape[0], 1) if rows else weight.shape)
                if c > 0:
                    check_writable(column[t], what)
                expected = state_dtype(stored, weight.dtype)
                if 2 <= c < 2 + n_state and column[t].dtype != expected:
                    why = "state_dtype says" if stored else "the weight"
                    raise TypeError(f"{what} is {column[t].dtype}; expected {expected}, as {why}")
        copies = arrays[2 + n_state : 3 + n_state]
        if arrays[0][t] is not None:
            _check_gradient(arrays[0][t], weight, f"gradient of {label(t)}", *(copy[t] for copy in copies))
    for t, marks in stamps.items():
        _check_stamps(marks, f"stamps of {label(t)}", arrays[1][t].shape[:1] or (1,))
    last = [stamps.get(t) for t in range(len(arrays[1]))]
    check_apart([*arrays, last], [*names, "stamps"], label, apart)
    replaced = []
    for c, column in enumerate(arrays):
        for t, array in enumerate(column):
            if array is not None:
                column[t] = np.require(array, requirements=["C", "A"])
                if c > 0 and column[t] is not array:
                    replaced.append((array, column[t]))
    return arrays, replaced


def _check_gradient(grad: np.ndarray, weight: np.ndarray, what: str, copy: np.ndarray | None = None) -> None:
    """Refuse a gradient whose dtype does not go with the weight's, or a copy's that does not."""
    if copy is not None and not (weight.dtype == np.float32 and is_half(copy.dtype)):
        raise TypeError(f"{what}: expected a float32 weight with a half-precision copy")
    codes = gradients_for(code_of(weight.dtype), "" if copy is None else code_of(copy.dtype))
    if code_of(grad.dtype) not in codes:
        expected = weight.dtype if copy is None else copy.dtype
        raise TypeError(f"{what} is {grad.dtype}; expected {expected}, as the weight")


def check_shape(array: np.ndarray, what: str, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}; expected {shape}")


def check_writable(array: np.ndarray, what: str) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only; expected an array that can be written")
    reach = 0  # bytes from the first to past the last element of the inner dimensions
    for stride, length in sorted(
        (abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ):
        if stride < max(reach, array.itemsize) and array.size:
            raise ValueError(f"{what} has elements that share memory (strides {array.strides})")
        reach = max(reach, array.itemsize) + stride * (length - 1)


def check_apart(
    arrays: list[list[Any]],
    names: Sequence[str],
    label: Callable[[int], str],
    apart: Mapping[int, Sequence[np.ndarray]],
) -> None:
    """Refuse an array that will be written and shares memory with any other."""
    everything = [(array, c, t) for c, column in enumerate(arrays) for t, array in enumerate(column)]
    everything += [(array, 0, t) for t, parts in apart.items() for array in parts]
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


def _check_stamps(stamps: Any, what: str, shape: tuple[int, ...]) -> None:
    """Refuse stamps of rows that are not what `Optimizer.create_state` made."""
    plain = isinstance(stamps, np.ndarray) and not isinstance(stamps, np.ma.MaskedArray)
    if not (plain and stamps.dtype == np.int64):
        raise TypeError(f"{what} are {type_name(stamps)}; expected an array of int64 without a mask")
    check_shape(stamps, what, shape)
    if not (stamps.flags.c_contiguous and stamps.flags.aligned and stamps.flags.writeable):
        raise ValueError(f"{what} must be contiguous and writable")


def _share(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have an element in common; true also where finding out takes too long."""
    try:
        limit: Any = 1_000_000  # NumPy's own annotations have said different things of it
        return np.shares_memory(a, b, max_work=limit)
    except np.exceptions.TooHardError:
        return True


def _ask(columns: Sequence[Sequence[Any]]) -> ndarray.Survey:
    """What `numba_opt.cpu.ndarray.read` finds, from each array's own word."""
    weights = columns[1]
    width = [w.size // w.shape[0] if w.ndim and w.shape[0] else 1 for w in weights]
    blank = [0] * len(weights)
    at = [[0 if a is None else a.__array_interface__["data"][0] for a in column] for column in columns]
    numbers = [
        [ndarray.ABSENT if a is None else ndarray.CODES.index(code_of(a.dtype)) for a in column]
        for column in columns
    ]
    return ndarray.Survey(
        addresses=np.array([*at, blank, width, blank], np.uint64).T.copy(),
        bytes=np.array([[0 if a is None else a.nbytes for a in column] for column in columns]).T.copy(),
        sizes=np.array([w.size for w in weights], np.int64),
        codes=np.array([pack(kinds) for kinds in zip(*numbers, strict=True)], np.int64),
    )


def pack(kinds: Sequence[int]) -> int:
    return sum(kind << (ndarray.BITS * c) for c, kind in enumerate(kinds))
