"""Optimizers and their states as safetensors: plain arrays, plain values, and nothing that executes.

A checkpoint holds named arrays and one JSON text, with a format version and a digest of everything in
it. What is read is checked as a whole before anything is handed over: a file that was cut off or altered
is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arguments, cuda_arrays
from .device import as_array, on_cuda
from .errors import CheckpointError
from .mxnet_states import load_mxnet_optimizer, load_mxnet_states

if TYPE_CHECKING:
    from .optimizer import Optimizer

__all__ = ["CheckpointError", "load_mxnet_optimizer", "load_mxnet_states"]

FORMAT = 1
KEY = "numba_opt"  # of the JSON text among the file's metadata
ARRAY, TUPLE = "\0array", "\0tuple"  # keys of what stands for an array, and for a tuple

Arrays = dict[str, np.ndarray]


def to_bytes(arrays: Mapping[str, np.ndarray], values: Any) -> bytes:
    """Arrays and values (as JSON) as the content of a safetensors file."""
    plain, metadata = _sealed(arrays, values)
    return bytes(_safetensors().numpy.save(plain, metadata))


def from_bytes(content: bytes) -> tuple[Arrays, Any]:
    """What `to_bytes` was given.

    Raises
    ------
    CheckpointError
        The content was cut off or altered, or is not of this package.
    """
    if not isinstance(content, (bytes, bytearray)):
        raise TypeError(f"a checkpoint must be bytes, got {type(content).__name__}")
    library = _safetensors()
    return _opened(lambda: (library.numpy.load(bytes(content)), _metadata(content)))


def write(path: str | Path, arrays: Mapping[str, np.ndarray], values: Any) -> None:
    """Write arrays and values to a file, which appears whole or not at all, whatever happens."""
    plain, metadata = _sealed(arrays, values)
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    library = _safetensors()
    try:
        with open(fresh, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # as the user's umask has it; safetensors makes it 0600
        try:
            library.numpy.save_file(plain, fresh, metadata)
        except library.SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from error
        with open(fresh, "rb+") as file:
            os.chmod(fresh, mode)
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    if os.name == "posix":  # the new name, too, must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | Path) -> tuple[Arrays, Any]:
    """What `write` was given. Errors as in `from_bytes`."""
    library = _safetensors()

    def load() -> tuple[Arrays, Any]:
        with library.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    try:
        return _opened(load)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _sealed(arrays: Mapping[str, np.ndarray], values: Any) -> tuple[Arrays, dict[str, str]]:
    """Arrays as safetensors takes them, and the metadata that belong to them."""
    plain = {name: np.require(array, requirements=["C", "A"]) for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "values": values})
    return plain, {KEY: text, "digest": _digest(plain, text)}


def _opened(load: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
    """The arrays and values of a safetensors file, if they are what was once sealed."""
    try:
        arrays, metadata = load()
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own and, on odd headers, others
        raise CheckpointError(f"not a whole safetensors file: {error}") from error
    if not metadata or KEY not in metadata:
        raise CheckpointError("a safetensors file, but not a checkpoint of numba_opt")
    text = metadata[KEY]
    if metadata.get("digest") != _digest(arrays, text):
        raise CheckpointError("the checkpoint has been altered: its digest does not match")
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise CheckpointError(f"format {found['format']} of checkpoints; this version reads {FORMAT}")
    return arrays, found["values"]


def _metadata(content: bytes) -> Any:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install numba_opt[checkpoint]") from error
    return safetensors


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())  # processors have instructions for it: 1.4 GB/s, BLAKE2b 0.5
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


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
    while name in arrays:
        name += "'"
    # safetensors' NumPy half does not read bfloat16
    arrays[name] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return {ARRAY: name, "dtype": array.dtype.name}


def put_together(form: Any, arrays: Arrays) -> Any:
    """The structure that `take_apart` took apart."""
    if isinstance(form, list):
        return [put_together(part, arrays) for part in form]
    if not isinstance(form, dict):
        return form
    if form.keys() == {ARRAY, "dtype"}:
        array = arrays[form[ARRAY]]
        if form["dtype"] != "bfloat16":
            return array
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    if form.keys() == {TUPLE}:
        return tuple(put_together(part, arrays) for part in form[TUPLE])
    return {key[key.startswith("\0") :]: put_together(part, arrays) for key, part in form.items()}


def leaves(state: Any) -> list[Any]:
    """The arrays of a state."""
    if isinstance(state, tuple):
        return [array for part in state for array in leaves(part)]
    return [] if state is None else [state]


def pairs(mine: Any, theirs: Any, what: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays of this trainer beside those of a checkpoint, which must be alike."""
    here, there = leaves(mine), leaves(theirs)
    if len(here) != len(there):
        raise CheckpointError(f"{what} has {len(there)} arrays in the checkpoint; expected {len(here)}")
    pairs = []
    for a, b in zip(here, there, strict=True):
        target = cuda_arrays.writable(a, what) if on_cuda(a) else as_array(a, what)
        source = _content(b, what)
        if (target.shape, target.dtype) != (source.shape, source.dtype):
            raise CheckpointError(
                f"{what} has shape {source.shape} and dtype {source.dtype} in the checkpoint; "
                f"expected {target.shape} and {target.dtype}"
            )
        pairs.append((target, source))
    return pairs


def copied(value: Any) -> Any:
    """A structure with copies of its arrays."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(copied, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return cuda_arrays.to_host(value, "array") if on_cuda(value) else as_array(value, "array").copy()


def _content(value: Any, what: str) -> np.ndarray:
    """An array that can be read here."""
    return cuda_arrays.to_host(value, what) if on_cuda(value) else as_array(value, what)


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's name, hyper-parameters, counts and scheduler as plain values."""
    scheduler = optimizer.lr_scheduler
    hyper = {name: _plain(getattr(optimizer, name)) for name in _plain_parameters(optimizer)}
    hyper["learning_rate"] = None if scheduler is not None else _plain(optimizer.lr)
    position = {} if scheduler is None else {k: _plain(v) for k, v in vars(scheduler).items() if _is_plain(v)}
    return {
        "name": type(optimizer).__name__,
        "states": list(optimizer.state_names),
        "hyper": hyper,
        "num_update": optimizer.num_update,
        "counts": list(map(list, optimizer._index_update_count.items())),
        "lr_mult": list(map(list, optimizer.lr_mult.items())),
        "wd_mult": list(map(list, optimizer.wd_mult.items())),
        "scheduler": None if scheduler is None else [type(scheduler).__name__, position],
    }


def restorer(optimizer: Optimizer, found: Mapping[str, Any]) -> list[partial[Any]]:
    """What gives an optimizer the hyper-parameters, counts and scheduler position that `describe` found.

    They are calls of which none is written in Python.

    Raises
    ------
    CheckpointError
        It is of another class, or its states or scheduler are others.
    KeyError
        Something is missing.
    """
    name = type(optimizer).__name__
    if found["name"] != name:
        raise CheckpointError(f"the checkpoint is of {found['name']}; this optimizer is {name}")
    if found["states"] != list(optimizer.state_names):
        here, there = ", ".join(optimizer.state_names) or "none", ", ".join(found["states"]) or "none"
        raise CheckpointError(f"the checkpoint's {name} has the states {there}; this one has {here}")
    try:
        fresh = type(optimizer)(**found["hyper"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's hyper-parameters are not {name}'s: {error}") from error
    scheduler = optimizer.lr_scheduler
    mine = None if scheduler is None else type(scheduler).__name__
    theirs = found["scheduler"] and found["scheduler"][0]
    if mine != theirs:
        raise CheckpointError(f"the checkpoint's lr_scheduler is {theirs}; this optimizer's is {mine}")
    attributes = {k: getattr(fresh, k) for k in _plain_parameters(fresh) if k in found["hyper"]}
    attributes |= {
        "lr": None if scheduler is not None else fresh.lr,
        "num_update": found["num_update"],
        "_counts": dict(found["counts"]),
        "_ahead": (),
        "lr_mult": dict(found["lr_mult"]),
        "wd_mult": dict(found["wd_mult"]),
    }

    calls = [partial(vars(optimizer).update, attributes)]
    if scheduler is not None:
        calls.append(partial(vars(scheduler).update, found["scheduler"][1]))
    return calls


def _plain_parameters(optimizer: Optimizer) -> list[str]:
    """The constructor's parameters that are kept under their own names as plain values."""
    held = vars(optimizer)
    return [name for name in arguments.parameters(type(optimizer)) if name in held and _is_plain(held[name])]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return not math.isnan(value)
    return value is None or isinstance(value, (bool, int, str, np.number))
