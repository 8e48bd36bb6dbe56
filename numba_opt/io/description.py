"""Optimizers as plain values: what a checkpoint says of one, and how another one becomes like it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..core import arguments
from ..core.storage import is_half, state_dtype
from ..errors import CheckpointError
from ..lr_scheduler import LRScheduler
from ..optimizer.states import HasStates
from .checkpoint import Calls, copied
from .found import by_index, count, named, part, refusing, shown

NONE = type(None)


def describe(optimizer: HasStates) -> dict[str, Any]:
    """An optimizer's name, hyper-parameters, counts and scheduler as plain values."""
    scheduler = optimizer.lr_scheduler
    hyper = {name: _plain(getattr(optimizer, name)) for name in _plain_parameters(optimizer)}
    hyper["learning_rate"] = None if scheduler is not None else _plain(optimizer.lr)
    position = {k: _plain(v) for k, v in _attributes(scheduler).items() if _is_plain(v)}
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


class Restoration(NamedTuple):
    """An optimizer as `describe` found it, and the calls that make another one like it."""

    optimizer: HasStates  # another one, as that one will be
    calls: Calls  # what makes it so


def restoration(optimizer: HasStates, found: Any) -> Restoration:
    """Give an optimizer the hyper-parameters, counts and scheduler position that `describe` found.

    Raises
    ------
    CheckpointError
        It is of another class, its states or scheduler are others, or no optimizer is described so.
    """
    name, what = type(optimizer).__name__, "the checkpoint's optimizer"
    theirs = part(found, "name", str, what)
    if theirs != name:
        raise CheckpointError(f"the checkpoint is of {theirs}; this optimizer is {name}")
    states = part(found, "states", list, what)
    if not all(isinstance(state, str) for state in states) or states != list(optimizer.state_names):
        here, there = (", ".join(map(named, names)) or "none" for names in (optimizer.state_names, states))
        raise CheckpointError(f"the checkpoint's {name} has the states {there}; this one has {here}")
    hyper = part(found, "hyper", Mapping, what)
    with refusing(f"the checkpoint's hyper-parameters are not {name}'s"):
        fresh = type(optimizer)(**hyper)
    position, calls = _position(optimizer.lr_scheduler, part(found, "scheduler", (list, tuple, NONE), what))
    kept = [k for k in _plain_parameters(fresh) if k in hyper and k != "lr_scheduler"]
    attributes = {k: getattr(fresh, k) for k in kept} | {
        "lr": None if position is not None else fresh.lr,
        "num_update": count("num_update", part(found, "num_update", Integral, what)),
        "_counts": by_index(part(found, "counts", list, what), "counts", count),
        "_counted_groups": (),
        "lr_mult": by_index(part(found, "lr_mult", list, what), "lr_mult", arguments.number),
        "wd_mult": by_index(part(found, "wd_mult", list, what), "wd_mult", arguments.number),
    }
    after = object.__new__(type(optimizer))
    vars(after).update(vars(optimizer) | attributes)
    _check_row(after)
    return Restoration(after, [partial(vars(optimizer).update, attributes), *calls])


def _position(scheduler: Any, saved: Any) -> tuple[Mapping[str, Any] | None, Calls]:
    """Return a scheduler's saved position, None if there was no scheduler, and the calls that restore it."""
    mine = None if scheduler is None else type(scheduler).__name__
    theirs, position = (None, None) if saved is None else saved if len(saved) == 2 else (saved, None)
    if not isinstance(theirs, (str, NONE)) or theirs != mine:
        raise CheckpointError(f"the checkpoint's lr_scheduler is {named(theirs)}; this optimizer's is {mine}")
    if scheduler is None:
        return None, []
    what, held = f"the checkpoint's lr_scheduler {mine}", _attributes(scheduler)
    if not isinstance(position, Mapping):
        raise CheckpointError(f"{what} is at {shown(position)}; expected a dict")
    for key, value in position.items():
        if key not in held or not _alike(held[key], value):
            here = shown(held[key]) if key in held else "no such attribute"
            raise CheckpointError(f"{what} has {shown(key)}: {shown(value)}; this one has {here}")
    if isinstance(scheduler, LRScheduler) and arguments.parameters(type(scheduler)).keys() == held.keys():
        with refusing(what):
            type(scheduler)(**{**held, **position})
    return position, [partial(held.update, copied(dict(position)))]


def _attributes(scheduler: Any) -> dict[str, Any]:
    """A scheduler's own attributes; functions and the like may have none."""
    return getattr(scheduler, "__dict__", {})


def _alike(mine: Any, theirs: Any) -> bool:
    """Tell whether a plain value may take another one's place."""
    if not (_is_plain(mine) and _is_plain(theirs)):
        return False
    kinds = [type(_plain(value)) for value in (mine, theirs)]
    return NONE in kinds or kinds[0] == kinds[1] or set(kinds) == {int, float}


def _check_row(optimizer: HasStates) -> None:
    """Refuse an optimizer that does not have the coefficients that its rule takes."""
    if optimizer.rule is None:
        return
    length = optimizer.coefficient_row_length()
    name, lr = type(optimizer).__name__, 0.01 if optimizer.lr is None else optimizer.lr
    with refusing(f"the checkpoint's hyper-parameters are not {name}'s"):
        row = optimizer.coefficient_row(optimizer.rescale_grad, lr, optimizer.wd, optimizer.num_update + 1)
        if len(row) != length:
            raise CheckpointError(
                f"with the checkpoint's hyper-parameters, {name} has {len(row)} coefficients; "
                f"its rule takes {length}"
            )


def check_forms(before: HasStates, after: HasStates, weights: Iterable[Any]) -> None:
    """Refuse options of an optimizer by which states of some weights would be of another form."""
    for dtype in dict.fromkeys(device.look_at(weight, "weight").dtype for weight in weights):
        here, there = (state_form(optimizer, dtype) for optimizer in (before, after))
        if here != there:
            raise CheckpointError(
                f"the checkpoint's states of {dtype} weights are {there}; this optimizer's are {here}"
            )


def state_form(optimizer: HasStates, dtype: np.dtype) -> str:
    """Describe the states of weights of a dtype, with the options that an optimizer has."""
    master = optimizer.multi_precision and is_half(dtype)
    kept = state_dtype(optimizer.state_storage, np.dtype(np.float32) if master else dtype)
    form = f"({', '.join(optimizer.state_names)}) in {kept}"
    if optimizer.sparse_update == "exact":
        form = f"({form}, last_step)"
    return f"(float32 weight, {form})" if master else form


class Saved(NamedTuple):
    """A trainer's state dict, the parts of which are there and of the right kinds."""

    optimizer: Mapping[str, Any]
    parameters: dict[str, Mapping[str, Any]]
    counts: dict[Any, int]  # of updates, by position
    accumulated: Mapping[str, Any]
    skipped_steps: int


def saved(state_dict: Any, names: Sequence[str]) -> Saved:
    """The parts of a state dict that is of parameters with these names."""
    what = "the checkpoint"
    parameters = dict(part(state_dict, "parameters", Mapping, what))
    if list(parameters) != list(names):
        other = sorted(set(parameters) ^ set(names), key=repr) or list(parameters)
        few = ", ".join(map(shown, other[:5])) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise CheckpointError(f"the checkpoint's parameters are not this trainer's: {few} differ")
    counts = {}
    for t, (name, entry) in enumerate(parameters.items()):
        counts[t] = count("count", part(entry, "count", Integral, f"parameter {name!r} of the checkpoint"))
        if "state" not in entry:
            raise CheckpointError(f"parameter {name!r} of the checkpoint lacks 'state'")
    accumulated = part(state_dict, "accumulated", Mapping, what)
    for name in accumulated:
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint has accumulated gradients of {shown(name)}, which is no parameter"
            )
    skipped = count("skipped_steps", part(state_dict, "skipped_steps", Integral, what))
    return Saved(part(state_dict, "optimizer", Mapping, what), parameters, counts, accumulated, skipped)


def _plain_parameters(optimizer: HasStates) -> list[str]:
    """The constructor's parameters that are kept under their own names as plain values."""
    held = vars(optimizer)
    return [name for name in arguments.parameters(type(optimizer)) if name in held and _is_plain(held[name])]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    """Tell whether JSON can hold a value."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return not math.isnan(value)
    return value is None or isinstance(value, (bool, int, str, np.number))
