"""Optimizers and their states as safetensors: plain arrays, plain values, and nothing that executes.

A checkpoint holds named arrays and one JSON text, with a format version and a digest of everything in
it. What is read is checked as a whole before anything is handed over: a file that was cut off or altered
is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arguments

if TYPE_CHECKING:
    from .optimizer import Optimizer

FORMAT = 1
KEY = "numba_opt"  # of the JSON text among the file's metadata

Arrays = dict[str, np.ndarray]


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, of another format, or of something else."""


def to_bytes(arrays: Mapping[str, np.ndarray], values: Any) -> bytes:
    """Arrays and values (as JSON) as the content of a safetensors file."""
    plain = {name: _storable(array) for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "values": values})
    metadata = {KEY: text, "digest": _digest(plain, text)}
    return bytes(_safetensors().save(plain, metadata))


def from_bytes(content: bytes) -> tuple[Arrays, Any]:
    """What `to_bytes` was given.

    Raises
    ------
    CheckpointError
        The content was cut off or altered, or is not of this package.
    """
    library = _safetensors()
    try:
        arrays = library.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own and, on odd headers, others
        raise CheckpointError(f"not a whole safetensors file: {error}") from error
    if KEY not in metadata:
        raise CheckpointError("a safetensors file, but not a checkpoint of numba_opt")
    text = metadata[KEY]
    if metadata.get("digest") != _digest(arrays, text):
        raise CheckpointError("the checkpoint has been altered: its digest does not match")
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise CheckpointError(f"format {found['format']} of checkpoints; this version reads {FORMAT}")
    return arrays, found["values"]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install numba_opt[checkpoint]") from error
    return safetensors.numpy


def _storable(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape)


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def flatten(name: str, state: Any, arrays: Arrays) -> Any:
    """Put a state's arrays under names beginning with `name`; returns its form for `unflatten`."""
    if state is None:
        return None
    if isinstance(state, (tuple, list)):
        return [flatten(f"{name}.{k}", part, arrays) for k, part in enumerate(state)]
    arrays[name] = np.asarray(state)
    return name


def unflatten(form: Any, arrays: Arrays) -> Any:
    """The state that `flatten` took apart."""
    if isinstance(form, list):
        return tuple(unflatten(part, arrays) for part in form)
    return None if form is None else arrays[form]


def describe(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's name, hyper-parameters, counts and scheduler as plain values."""
    scheduler = optimizer.lr_scheduler
    hyper = {name: getattr(optimizer, name) for name in _plain_parameters(optimizer)}
    hyper["learning_rate"] = None if scheduler is not None else optimizer.lr
    return {
        "name": type(optimizer).__name__,
        "hyper": hyper,
        "num_update": optimizer.num_update,
        "counts": list(map(list, optimizer._index_update_count.items())),
        "lr_mult": list(map(list, optimizer.lr_mult.items())),
        "wd_mult": list(map(list, optimizer.wd_mult.items())),
        "scheduler": None if scheduler is None else [type(scheduler).__name__, _plain(vars(scheduler))],
    }


def restore(optimizer: Optimizer, found: Mapping[str, Any]) -> None:
    """Give an optimizer the hyper-parameters, counts and scheduler position that `describe` found.

    Raises
    ------
    CheckpointError
        It is of another class, or its states or scheduler are others; nothing has been changed.
    """
    name = type(optimizer).__name__
    if found["name"] != name:
        raise CheckpointError(f"the checkpoint is of {found['name']}; this optimizer is {name}")
    try:
        fresh = type(optimizer)(**found["hyper"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's hyper-parameters are not {name}'s: {error}") from error
    if fresh.state_names != optimizer.state_names:
        raise CheckpointError(
            f"the checkpoint's {name} has the states {fresh.state_names}; "
            f"this one has {optimizer.state_names}"
        )
    scheduler = optimizer.lr_scheduler
    here = None if scheduler is None else type(scheduler).__name__
    there = found["scheduler"] and found["scheduler"][0]
    if here != there:
        raise CheckpointError(f"the checkpoint's lr_scheduler is {there}; this optimizer's is {here}")
    if scheduler is not None:
        vars(scheduler).update(found["scheduler"][1])
    for attribute in _plain_parameters(optimizer):
        setattr(optimizer, attribute, getattr(fresh, attribute))
    optimizer.lr = None if scheduler is not None else fresh.lr
    optimizer.num_update = found["num_update"]
    optimizer._index_update_count = dict(found["counts"])
    optimizer.lr_mult = dict(found["lr_mult"])
    optimizer.wd_mult = dict(found["wd_mult"])


def _plain_parameters(optimizer: Optimizer) -> list[str]:
    """The constructor's parameters that are kept under their own names as plain values."""
    return [name for name in arguments.names(type(optimizer)) if name in _plain(vars(optimizer))]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values that JSON can hold."""
    return {k: v for k, v in values.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return not math.isnan(value)
    return value is None or isinstance(value, (bool, int, str))
