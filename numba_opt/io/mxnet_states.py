"""The states that MXNet saves (`Trainer.save_states`, `Updater.get_states`), read without running them.

Such a file is a pickle, which is a program: whoever unpickles it runs it. Here nobody does. `pickletools`
of the standard library cuts the file into instructions, and `_unpickle` follows the few that build numbers,
strings, lists and dictionaries. The names in the file stay names: nothing is imported, looked up or
called. Any other instruction, name or shape of things is refused.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NONSENSE, CheckpointError
from . import files

__all__ = ["load_mxnet_optimizer", "load_mxnet_states"]

BYTES = "builtins.bytearray"
ARRAYS = {"mxnet.ndarray.ndarray.NDArray", "mxnet.ndarray.sparse.RowSparseNDArray", "mxnet.numpy.ndarray"}
OPTIMIZERS = {
    "mxnet.optimizer.adamax.Adamax",
    "mxnet.optimizer.contrib.GroupAdaGrad",
    "mxnet.optimizer.ftml.FTML",
    "mxnet.optimizer.nag.NAG",
    "mxnet.optimizer.rmsprop.RMSProp",
}
SCHEDULERS = {f"mxnet.lr_scheduler.{kind}Scheduler" for kind in ("Factor", "MultiFactor", "Poly", "Cosine")}
INTERNALS = {"_all_index_update_counts", "sym_info"}  # attributes of MXNet's optimizers that serve nobody

V2, V3 = 0xF993FAC9, 0xF993FACA  # how MXNet begins an array; V3 under NumPy's shape semantics
DENSE, ROW_SPARSE = 0, 1
FLOATS = {0: np.float32, 1: np.float64, 2: np.float16}
INT64 = 6
DEVICES = {1, 2, 3, 5}  # CPU, GPU, pinned and shared memory: where the array was
LIMIT = 2**32  # bytes that the arrays of a file may take beyond the file's own: row_sparse ones grow


def load_mxnet_states(path: str | os.PathLike[str]) -> dict[int | str, Any]:
    """Read the states in a file that MXNet saved, as `numba_opt.Updater.states` holds them.

    Nothing in the file is executed and MXNet is not needed.

    Parameters
    ----------
    path : path
        A file of `Trainer.save_states` or `KVStore.save_optimizer_states`, or the bytes of
        `Updater.get_states` in a file, with the optimizer or without.

    Returns
    -------
    dict
        By parameter index: None, an array, or a tuple of these; ``(float32 weight, state)`` with
        `multi_precision`. Row-sparse arrays come out dense.

    Raises
    ------
    CheckpointError
        The file is damaged, or holds something that states do not consist of.

    Examples
    --------
    >>> import numba_opt
    >>> from numba_opt.io.mxnet_states import load_mxnet_optimizer, load_mxnet_states
    >>> path = "tests/golden/states_adamax_optimizer.pkl"
    >>> updater = numba_opt.get_updater(numba_opt.Adamax(learning_rate=0.01))
    >>> updater.states = load_mxnet_states(path)
    >>> [state.shape for state in updater.states[0]]
    [(2, 3), (2, 3)]

    Adamax and FTML depend on the number of updates so far, so this goes with the states:

    >>> saved = load_mxnet_optimizer(path)
    >>> saved["class"], saved["num_update"], saved["_index_update_count"]
    ('Adamax', 3, {0: 3, 1: 3})
    >>> updater.optimizer.num_update = saved["num_update"]
    >>> updater.optimizer._index_update_count = saved["_index_update_count"]
    """
    return _read(path)[0]


def load_mxnet_optimizer(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the optimizer's attributes in a file of states: hyper-parameters, multipliers and counts.

    Parameters
    ----------
    path : path
        As for `load_mxnet_states`.

    Returns
    -------
    dict or None
        MXNet's attributes as plain values, with the name of the class under ``"class"``; `lr_scheduler` is
        such a dict too, or None. None if the states were saved without their optimizer.

    Raises
    ------
    CheckpointError
        As `load_mxnet_states`.

    Examples
    --------
    >>> saved = load_mxnet_optimizer("tests/golden/states_ftml_optimizer.pkl")
    >>> saved["class"], saved["beta1"], saved["lr_scheduler"]["class"], saved["lr_scheduler"]["step"]
    ('FTML', 0.6, 'FactorScheduler', 2)
    """
    return _read(path)[1]


def _read(path: str | os.PathLike[str]) -> tuple[dict[int | str, Any], dict[str, Any] | None]:
    with files.opened(path) as file:
        content = file.readall()
    try:
        return parse(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse(content: bytes) -> tuple[dict[int | str, Any], dict[str, Any] | None]:
    """The states and the optimizer's attributes in the content of a file."""
    try:
        found = _unpickle(content)
        states, optimizer = found if type(found) is tuple and len(found) == 2 else (found, None)
        if type(states) is not dict:
            raise CheckpointError("no dictionary of states by index")
        seen: set[int] = set()
        nests = {index: _state(state, seen) for index, state in states.items()}
        return nests, None if optimizer is None else _attributes(optimizer, OPTIMIZERS)
    except CheckpointError:
        raise
    except NONSENSE as error:  # pickletools and the stack below raise many kinds on damaged files
        raise CheckpointError(f"not a whole file of MXNet's states: {str(error)[:200]}") from error


@dataclass(frozen=True)
class _Class:
    """A class's name in the file."""

    name: str


@dataclass(frozen=True)
class _Object:
    """An object of that class; its state comes later."""

    name: str
    state: dict[Any, Any] | None = None


def _unpickle(content: bytes) -> Any:
    """Return what the pickle describes, with arrays decoded and each other object as an `_Object`."""
    stream = io.BytesIO(content)
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    room = len(content) + LIMIT

    def take(start: int) -> list[Any]:
        if len(stack) < -start:
            raise CheckpointError("less on the stack than an instruction takes")
        taken = stack[start:]
        del stack[start:]
        return taken

    arg: Any
    for opcode, arg, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "BINBYTES" | "BINBYTES8" | "SHORT_BINBYTES" | "BYTEARRAY8":
                stack.append(bytes(arg))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(-int(opcode.name[-1]))))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take(marks.pop())))
            case "APPEND":
                _extend(stack[-2], take(-1))
            case "APPENDS":
                _extend(stack[marks[-1] - 1], take(marks.pop()))
            case "SETITEM":
                _update(stack[-3], take(-2))
            case "SETITEMS":
                _update(stack[marks[-1] - 1], take(marks.pop()))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_class(*arg.split(" ")))
            case "STACK_GLOBAL":
                stack.append(_class(*take(-2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_make(*take(-2)))
            case "BUILD":
                made, state = take(-2)
                made = _build(made, state, room)
                room -= made.nbytes if isinstance(made, np.ndarray) else 0
                stack.append(made)
            case other:
                raise CheckpointError(f"the instruction {other}, which MXNet does not save")
    (result,) = stack
    if marks or stream.read(1):
        raise CheckpointError("more than one object")
    return result


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise CheckpointError("items for something else than a list")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    if type(target) is not dict or not all(type(key) in (int, str) for key in keys):
        raise CheckpointError("items for something else than a dictionary by index or name")
    before = len(target)
    target.update(zip(keys, items[1::2], strict=True))
    if len(target) != before + len(keys):
        raise CheckpointError("an index or name comes twice")


def _class(module: Any, name: Any) -> _Class:
    full = f"{module}.{name}" if type(module) is type(name) is str else "no name"
    if full != BYTES and full not in ARRAYS | OPTIMIZERS | SCHEDULERS:
        raise CheckpointError(f"{full[:100]!r}, which is not known here")
    return _Class(full)


def _make(cls: Any, args: Any) -> Any:
    match cls, args:
        case _Class(name), (bytes(data),) if name == BYTES:
            return data
        case _Class(name), (None,) if name in ARRAYS:
            return _Object(name)
        case _Class(name), () if name in OPTIMIZERS | SCHEDULERS:
            return _Object(name)
    raise CheckpointError("something is made as MXNet does not make it")


def _build(made: Any, state: Any, room: int) -> Any:
    match made, state:
        case _Object(name, None), {"handle": bytes(data)} if name in ARRAYS and len(state) == 1:
            return _array(data, room)
        case _Object(name, None), dict() if name not in ARRAYS:
            return _Object(name, state)
    raise CheckpointError("an object has a state that MXNet does not give it")


def _array(data: bytes, room: int) -> np.ndarray:
    """The array in `MXNDArraySaveRawBytes`'s format, of at most `room` bytes."""
    view, at = memoryview(data), 0

    def read(kind: str, shape: Iterable[int]) -> np.ndarray:
        nonlocal at
        dtype, shape = np.dtype(kind).newbyteorder("<"), tuple(shape)
        end = at + math.prod(shape) * dtype.itemsize
        if any(n < 0 for n in shape) or end > len(data):
            raise CheckpointError("an array is larger than its data")
        found = np.frombuffer(view[at:end], dtype).reshape(shape)
        at = end
        return found.astype(kind)  # the machine's byte order, and memory of its own

    def number(kind: str = "i4") -> int:
        return int(read(kind, (1,))[0])

    def shape() -> list[int]:
        ndim = number()
        if not 0 <= ndim <= 32:
            raise CheckpointError(f"an array of {ndim} dimensions")
        return [int(n) for n in read("i8", (ndim,))]

    magic, storage = number("u4"), number()
    if (magic, storage) not in {(V2, DENSE), (V3, DENSE), (V2, ROW_SPARSE)}:
        raise CheckpointError(f"an array of format {magic:#x} and storage {storage}")
    stored = shape() if storage == ROW_SPARSE else []
    full = shape()
    device, _, flag = number(), number(), number()
    if device not in DEVICES or flag not in FLOATS:
        raise CheckpointError(f"an array of type {flag} from a device of type {device}")
    dtype = np.dtype(FLOATS[flag])
    if min(full, default=0) < 0 or math.prod(full) * dtype.itemsize > room:
        raise CheckpointError(f"arrays of more than {LIMIT} bytes beyond the file's")
    if storage == DENSE:
        array = read(dtype.str, full)
    else:
        kind, (count,) = number(), shape()
        values, rows = read(dtype.str, stored), read("i8", (count,))
        if kind != INT64 or stored != [count, *full[1:]] or not _are_rows(rows, full[0]):
            raise CheckpointError("a row_sparse array whose parts do not fit together")
        array = np.zeros(full, dtype)
        array[rows] = values
    if at != len(data):
        raise CheckpointError("an array is smaller than its data")
    return array


def _are_rows(rows: np.ndarray, count: int) -> bool:
    return bool(np.all(rows >= 0) and np.all(rows < count) and np.all(rows[1:] > rows[:-1]))


def _state(state: Any, seen: set[int], depth: int = 0) -> Any:
    """Check the structure of a state and return it; `seen` makes sure that no two share memory."""
    if state is None:
        return None
    if id(state) in seen:
        raise CheckpointError("two states share an array")
    seen.add(id(state))
    if isinstance(state, np.ndarray):
        return state
    if type(state) is tuple and state and depth < 2:  # (float32 weight, (mean, var)) is the deepest
        return tuple(_state(part, seen, depth + 1) for part in state)
    raise CheckpointError("a state that is neither None nor an array nor a tuple of these")


def _attributes(made: Any, names: set[str]) -> dict[str, Any]:
    """The attributes of an optimizer or scheduler as plain values."""
    if not isinstance(made, _Object) or made.name not in names or len(made.state or ()) not in range(1, 100):
        raise CheckpointError("an optimizer or scheduler that is not whole")
    found: dict[str, Any] = {"class": made.name.rpartition(".")[2]}
    for key, value in (made.state or {}).items():
        if key == "class":
            raise CheckpointError("an attribute is called 'class'")
        if key == "lr_scheduler" and value is not None and names is OPTIMIZERS:
            found[key] = _attributes(value, SCHEDULERS)
        elif _is_flat(value):
            found[key] = value
        elif key not in INTERNALS:
            raise CheckpointError(f"the attribute {str(key)[:100]!r} is not of plain values")
    return found


def _is_flat(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    parts = value if isinstance(value, (list, tuple)) else (value,)
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in parts)
