"""Optimizers and their states as safetensors: plain arrays, plain values, and nothing that executes.

A checkpoint holds named arrays and one JSON text, with a format version and a digest of everything in
it. What is read is checked as a whole before anything is handed over: a file that was cut off or altered
is refused.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import operator
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from .. import device
from ..cpu.arrays import check_writable
from ..errors import CheckpointError
from . import files, tensor_file
from .found import part, refusing, shown
from .mxnet_states import load_mxnet_optimizer, load_mxnet_states

__all__ = ["CheckpointError", "load_mxnet_optimizer", "load_mxnet_states", "refusing"]

Arrays = tensor_file.Arrays

FORMAT = 1
KEY = "numba_opt"  # of the JSON text among the file's metadata
ARRAY, TUPLE = "\0array", "\0tuple"  # keys of what stands for an array, and for a tuple
DEEPEST = 100  # nests of values
NONE = type(None)

Calls = list[partial[Any]]  # what takes a checkpoint over, none of it written in Python


def to_bytes(arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> bytes:
    """Arrays and values (as JSON) as the content of a safetensors file."""
    file = io.BytesIO()
    _write(file, arrays, values)
    return file.getvalue()


def from_bytes(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and values that `to_bytes` was given; the arrays are views of the content.

    Raises
    ------
    CheckpointError
        The content was cut off or altered, or is not of this package.
    """
    if not isinstance(content, (bytes, bytearray)):
        raise TypeError(f"a checkpoint must be bytes, got {type(content).__name__}")
    return _opened(*tensor_file.parse(content))


def write(path: str | Path, arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Write arrays and values to a file, which appears whole or not at all, whatever happens."""
    files.write(path, lambda file: _write(file, arrays, values))


def read(path: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """Read the arrays and values that `write` was given. Errors as in `from_bytes`."""
    with files.opened(path) as file:
        try:
            return _opened(*tensor_file.read(file, os.fstat(file.fileno()).st_size))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _write(file: Any, arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "values": values})
    tensor_file.write(file, arrays, {KEY: text}, ("digest", _hash(text)))


def _opened(arrays: Arrays, texts: Mapping[str, str]) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and values of a safetensors file, if they are what was once written."""
    if KEY not in texts:
        raise CheckpointError("a safetensors file, but not a checkpoint of numba_opt")
    digest = _hash(texts[KEY])
    for name in sorted(arrays):
        digest.update(tensor_file.described(name, arrays[name]))
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    if texts.get("digest") != digest.hexdigest():
        raise CheckpointError("the checkpoint has been altered: its digest does not match")
    with refusing("the checkpoint's values"):
        found = tensor_file.parsed(texts[KEY])
    version = part(found, "format", int, "the checkpoint")
    if version != FORMAT:
        raise CheckpointError(f"format {shown(version)} of checkpoints; this version reads {FORMAT}")
    return arrays, part(found, "values", dict, "the checkpoint")


def _hash(text: str) -> Any:
    # processors have instructions for it: 1.4 GB/s, BLAKE2b 0.5
    return hashlib.sha256(text.encode(errors="surrogatepass"))


def take_apart(value: Any, arrays: Arrays, name: str = "") -> Any:
    """A structure's plain values as JSON can hold them; its arrays go into `arrays`, under their paths."""
    if isinstance(value, Mapping):
        return {
            "\0" * key.startswith("\0") + key: take_apart(part, arrays, f"{name}/{key}")
            for key, part in value.items()
        }
    if isinstance(value, (tuple, list)):
        parts = [take_apart(part, arrays, f"{name}/{k}") for k, part in enumerate(value)]
        return {TUPLE: parts} if isinstance(value, tuple) else parts
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    array = _content(value, name)
    name = name.encode(errors="backslashreplace").decode()  # files have no lone surrogates
    while name in arrays:
        name += "'"
    # the format knows no bfloat16 of NumPy's
    arrays[name] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return {ARRAY: name, "dtype": array.dtype.name}


def put_together(form: Any, arrays: Arrays, depth: int = 0) -> Any:
    """The structure that `take_apart` took apart.

    Raises
    ------
    CheckpointError
        It did not make that.
    """
    if depth > DEEPEST:
        raise CheckpointError(f"the checkpoint's values are nested more than {DEEPEST} deep")
    if isinstance(form, list):
        return [put_together(value, arrays, depth + 1) for value in form]
    if not isinstance(form, dict):
        return form
    if form.keys() == {ARRAY, "dtype"}:
        return _array(form[ARRAY], form["dtype"], arrays)
    if form.keys() == {TUPLE}:
        return tuple(put_together(value, arrays, depth + 1) for value in part(form, TUPLE, list, "a tuple"))
    return {key[key.startswith("\0") :]: put_together(v, arrays, depth + 1) for key, v in form.items()}


def _array(name: Any, dtype: Any, arrays: Arrays) -> np.ndarray:
    """One of a file's arrays, which must be of that dtype."""
    array = arrays.get(name) if isinstance(name, str) else None
    if array is None:
        raise CheckpointError(f"the checkpoint lacks the array {shown(name)}")
    if dtype == "bfloat16" and array.dtype == np.uint16:
        try:
            import ml_dtypes
        except ImportError as error:
            needed = "bfloat16 arrays need ml_dtypes: pip install numba_opt[bfloat16]"
            raise CheckpointError(f"array {name!r} cannot be read: {needed}") from error
        return array.view(ml_dtypes.bfloat16)
    if array.dtype.name != dtype:
        raise CheckpointError(f"array {name!r} is {array.dtype}; expected {shown(dtype)}")
    return array


def leaves(state: Any) -> list[Any]:
    """The arrays of a state."""
    if isinstance(state, tuple):
        return [array for part in state for array in leaves(part)]
    return [] if state is None else [state]


def pairs(mine: Any, theirs: Any, what: str) -> list[tuple[Any, np.ndarray]]:
    """Arrays of this trainer beside those of a checkpoint, which must be alike."""
    if isinstance(mine, tuple):
        if not isinstance(theirs, (tuple, list)) or len(theirs) != len(mine):
            raise CheckpointError(f"{what} is {shown(theirs)} in the checkpoint; expected {shown(mine)}")
        return [pair for a, b in zip(mine, theirs, strict=True) for pair in pairs(a, b, what)]
    if mine is None or theirs is None or isinstance(theirs, (tuple, list)):
        if mine is not theirs:
            expected = "None" if mine is None else "an array"
            raise CheckpointError(f"{what} is {shown(theirs)} in the checkpoint; expected {expected}")
        return []
    target = device.writable(mine, what)
    if isinstance(target, np.ndarray):
        check_writable(target, what)
    with refusing("the checkpoint"):
        source = _content(theirs, what)
    if (target.shape, target.dtype) != (source.shape, source.dtype):
        raise CheckpointError(
            f"{what} has shape {source.shape} and dtype {source.dtype} in the checkpoint; "
            f"expected {target.shape} and {target.dtype}"
        )
    return [(target, source)]


def check_flushed(state: Any, what: str) -> None:
    """Refuse stamps, a state's last part, of steps that rows have yet to take: those are not there."""
    while isinstance(state, (tuple, list)):
        state = state[-1]
    late = np.count_nonzero(_content(state, what))
    if late:
        raise CheckpointError(f"{what} has {late} rows in the checkpoint that lag behind; expected none")


def assignments(pairs: Iterable[tuple[Any, np.ndarray]]) -> Calls:
    """Return calls that copy the second array of each pair into the first; none reads what another wrote."""
    pairs = list(pairs)
    written = [target for target, _ in pairs if isinstance(target, np.ndarray) and target.size]
    spans = sorted(map(byte_bounds, written))
    starts = [start for start, _ in spans]
    reached = list(itertools.accumulate((stop for _, stop in spans), max))

    def unwritten(source: np.ndarray) -> np.ndarray:
        start, stop = byte_bounds(source)
        before = bisect_left(starts, stop)
        return source.copy() if before and reached[before - 1] > start else source

    return [partial(operator.setitem, target, ..., unwritten(source)) for target, source in pairs]


def copied(value: Any) -> Any:
    """A structure with copies of its arrays."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(copied, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return device.to_host(value, "array").copy()


def _content(value: Any, what: str) -> np.ndarray:
    """An array that can be read here."""
    return device.to_host(value, what)
