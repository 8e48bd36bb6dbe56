"""THE table of optimizers: every test module draws its cases from it.

A new optimizer adds one row for each of its variants, with its formula in float64 NumPy written from the
class's docstring, never by calling its rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import numba_opt
from numba_opt.core.storage import Layout, TouchedForm


def nag(w, g, lr, t, mom=None, *, momentum=0.9):
    if mom is None:
        return (w - lr * g,)
    mom = momentum * mom - lr * g
    return w + momentum * mom - lr * g, mom


def rmsprop(w, g, lr, t, *states, rho=0.9, momentum=0.9, epsilon=1e-8, centered=False, clip_weights=None):
    limit = np.inf if clip_weights is None else clip_weights
    if not centered:
        var = rho * states[0] + (1 - rho) * g**2
        return np.clip(w - lr * g / (np.sqrt(var) + epsilon), -limit, limit), var
    mean = rho * states[0] + (1 - rho) * g
    var = rho * states[1] + (1 - rho) * g**2
    mom = momentum * states[2] - lr * g / np.sqrt(np.maximum(var - mean**2, 0) + epsilon)
    return np.clip(w + mom, -limit, limit), mean, var, mom


def adamax(w, g, lr, t, mean, var, *, beta1=0.9, beta2=0.999, epsilon=1e-8):
    mean = beta1 * mean + (1 - beta1) * g
    var = np.maximum(beta2 * var, np.abs(g))
    return w - lr / (1 - beta1**t) * mean / (var + epsilon), mean, var


def ftml(w, g, lr, t, *states, beta1=0.6, beta2=0.999, epsilon=1e-8, reduced=False):
    if reduced:
        v = beta2 * states[0] + (1 - beta2) * g**2
        d = (1 - beta1**t) / lr * (np.sqrt(v / (1 - beta2**t)) + epsilon)
        return w - (1 - beta1) * g / d, v
    d, v, z = states
    v = beta2 * v + (1 - beta2) * g**2
    d_next = (1 - beta1**t) / lr * (np.sqrt(v / (1 - beta2**t)) + epsilon)
    z = beta1 * z + (1 - beta1) * g - (d_next - beta1 * d) * w
    return -z / d_next, d_next, v, z


def groupadagrad(w, g, lr, t, history, *, epsilon=1e-6):
    history = history + np.mean(g**2, axis=1, keepdims=True)
    return w - lr * g / (np.sqrt(history) + epsilon), history


class Row(NamedTuple):
    """One variant of an optimizer."""

    id: str
    cls: type[numba_opt.Optimizer]
    kwargs: dict[str, Any]
    states: int  # how many arrays a parameter's state has
    learning_rate: float  # the class's default
    formula: Callable[..., Any]  # (weight, grad, lr, t, *states, **kwargs) -> (weight, *states)
    instructions: str = (
        ""  # what the compiled kernel is made of, beyond moves, products and sums: LLVM's names
    )


TABLE = [
    Row("nag", numba_opt.NAG, {}, 1, 0.1, nag),
    Row("nag-plain", numba_opt.NAG, {"momentum": 0}, 0, 0.1, nag),
    Row("rmsprop", numba_opt.RMSProp, {}, 1, 0.001, rmsprop, "sqrt fdiv"),
    Row("rmsprop-centered", numba_opt.RMSProp, {"centered": True}, 3, 0.001, rmsprop, "sqrt fdiv"),
    Row("rmsprop-clipweights", numba_opt.RMSProp, {"clip_weights": 0.5}, 1, 0.001, rmsprop, "sqrt fdiv"),
    Row("adamax", numba_opt.Adamax, {}, 2, 0.002, adamax, "fdiv"),
    Row("ftml", numba_opt.FTML, {}, 3, 0.0025, ftml, "sqrt fdiv"),
    Row("ftml-reduced", numba_opt.FTML, {"reduced": True}, 1, 0.0025, ftml, "sqrt fdiv"),
    Row("groupadagrad", numba_opt.GroupAdaGrad, {}, 1, 0.01, groupadagrad, "fdiv"),
]

each = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
each_elementwise = pytest.mark.parametrize(
    "row", [row for row in TABLE if not row.cls.per_row], ids=lambda row: row.id
)
each_path = pytest.mark.parametrize("path", ["step", "fused_step"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def row(name: str) -> Row:
    return next(row for row in TABLE if row.id == name)


class Call(NamedTuple):
    """The arguments of `update`."""

    indices: list
    weights: list
    grads: list
    states: list

    def copy(self) -> Call:
        return copy.deepcopy(self)


def layout(text: str, n_state: int) -> Layout:
    """How a gradient (or "-" for none), a weight, so many states and perhaps a model weight are stored."""
    grad, weight, *rest = text.split()
    return Layout("" if grad == "-" else grad, weight, tuple(rest[:n_state]), "".join(rest[n_state:]))


def form(text: str) -> TouchedForm:
    """How a sparse gradient is given: its kind, perhaps how indices are stored, how its numbers are."""
    kind, *codes = text.split()
    return TouchedForm(kind, *reversed(codes))


def build(row: Row, **kwargs: Any) -> numba_opt.Optimizer:
    return row.cls(**row.kwargs, **kwargs)


def common(row: Row) -> dict[str, float]:
    """Every option that all optimizers share, weight decay where there is one."""
    wd = {} if row.cls.per_row else {"wd": 0.05}
    return {"learning_rate": 0.02, "rescale_grad": 0.5, "clip_gradient": 0.7, **wd}


def fit(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape like the given one that the row's optimizer takes."""
    if not row.cls.per_row or len(shape) == 2:
        return shape
    size = int(np.prod(shape))
    width = next(k for k in (7, 5, 3, 2, 1) if size % k == 0)
    return size // width, width


def make(row: Row, shapes: Any, dtype: Any = "float32", seed: int = 0) -> Call:
    """Random weights, gradients and (not negative) states."""
    rng = np.random.default_rng(seed)
    optimizer = build(row)
    shapes = [fit(row, shape if isinstance(shape, tuple) else (shape,)) for shape in shapes]
    weights = [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    grads = [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    states = [optimizer.create_state(t, weight) for t, weight in enumerate(weights)]
    for array in leaves(states):
        array[...] = rng.random(array.shape)
    return Call(list(range(len(shapes))), weights, grads, states)


def leaves(state: Any) -> list[np.ndarray]:
    """The arrays of a nest of tuples and lists, in order."""
    if state is None:
        return []
    return [leaf for part in state for leaf in leaves(part)] if isinstance(state, (tuple, list)) else [state]


def outputs(call: Call) -> list[np.ndarray]:
    """What an update may change, flat."""
    return [*call.weights, *leaves(call.states)]


def content(*things: Any) -> list[Any]:
    """All arrays as bytes, with dtype and shape, for comparing before and after."""
    arrays = [thing for thing in leaves(things) if isinstance(thing, np.ndarray)]
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


def reference(row: Row, weight: Any, grads: Any, states: Any = None, t: int = 0, **options: Any) -> list[Any]:
    """Weight and states after the gradients, one after the other, in float64; `t` updates came before."""
    rescale, clip, wd, lr = (
        options.pop(name, default)
        for name, default in [
            ("rescale_grad", 1.0),
            ("clip_gradient", None),
            ("wd", 0.0),
            ("learning_rate", row.learning_rate),
        ]
    )
    w = np.asarray(weight, np.float64)
    shape = (len(w), 1) if row.cls.per_row else w.shape
    if states is None:
        states = [np.zeros(shape) for _ in range(row.states)]
    out = [w, *(np.asarray(state, np.float64) for state in leaves(states))]
    for n, grad in enumerate(grads, t + 1):
        g = rescale * np.asarray(grad, np.float64)
        g = (g if clip is None else np.clip(g, -clip, clip)) + wd * out[0]
        out = list(row.formula(out[0], g, lr, n, *out[1:], **row.kwargs | options))
    return out


def assert_bits(found: Any, expected: Any) -> None:
    """Equal to the bit, zeros' signs included; any NaN for any NaN."""
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        nan = np.isnan(a)
        np.testing.assert_array_equal(np.signbit(a)[~nan], np.signbit(b)[~nan])


def assert_near(found: Any, expected: Any, tolerance: float, what: str = "", scale: float = 1e-3) -> None:
    """Within a fraction of each array's largest value, or of `scale` if that is larger."""
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        error, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=scale)
        assert error <= tolerance * largest, f"{what} array {k}: off by {error:.3g} of {largest:.3g}"


def assert_alike(row: Row, found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """To the bit, but for the order in which a row's squares are added."""
    if row.cls.per_row:
        assert_near(found, expected, tolerance)
    else:
        assert_bits(found, expected)
