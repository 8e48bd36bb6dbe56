"""The ways of NumPy: the formulas on whole arrays, as one would write them down."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .clock import Runner, runner
from .workloads import RULES, Workload, arrays, touched


def nag(w: Any, g: Any, mom: Any) -> None:
    mom *= 0.9
    mom -= 0.01 * g
    w += 0.9 * mom - 0.01 * g


def rmsprop(w: Any, g: Any, var: Any) -> None:
    var *= 0.9
    var += 0.1 * g**2
    w -= 0.001 * g / (np.sqrt(var) + 1e-8)


def rmsprop_centered(w: Any, g: Any, mean: Any, var: Any, mom: Any) -> None:
    mean *= 0.9
    mean += 0.1 * g
    var *= 0.9
    var += 0.1 * g**2
    mom *= 0.9
    mom -= 0.001 * g / np.sqrt(np.maximum(var - mean**2, 0) + 1e-8)
    w += mom


def adamax(w: Any, g: Any, mean: Any, var: Any) -> None:
    mean *= 0.9
    mean += 0.1 * g
    var *= 0.999
    np.maximum(var, np.abs(g), out=var)
    w -= 0.002 * mean / (var + 1e-8)


def ftml(w: Any, g: Any, d: Any, v: Any, z: Any) -> None:
    v *= 0.999
    v += 0.001 * g**2
    d_next = 400 * (np.sqrt(v) + 1e-8)
    z *= 0.6
    z += 0.4 * g - (d_next - 0.6 * d) * w
    d[...] = d_next
    w[...] = -z / d_next


def groupadagrad(w: Any, g: Any, history: Any) -> None:
    history += np.mean(g**2, axis=1, keepdims=True)
    w -= 0.01 * g / (np.sqrt(history) + 1e-6)


FORMULAS: dict[str, Callable[..., None]] = {
    "nag": nag,
    "rmsprop": rmsprop,
    "rmsprop-centered": rmsprop_centered,
    "adamax": adamax,
    "ftml": ftml,
    "groupadagrad": groupadagrad,
}


def _states(workload: Workload, weight: np.ndarray) -> list[np.ndarray]:
    rule = RULES[workload.rule]
    shape = (len(weight), 1) if rule.per_row else weight.shape
    return [np.zeros(shape, weight.dtype) for _ in range(rule.states)]


def step(workload: Workload) -> Runner | None:
    """One tensor after the other; half precision is left out, as it takes forever."""
    if workload.dtype not in ("float32", "float64"):
        return None
    formula, (weights, grads) = FORMULAS[workload.rule], arrays(workload)
    states = [_states(workload, weight) for weight in weights]

    def run() -> None:
        for weight, grad, state in zip(weights, grads, states, strict=True):
            formula(weight, grad, *state)

    return runner(run)


def clip(workload: Workload) -> Runner:
    formula, (weights, grads) = FORMULAS[workload.rule], arrays(workload)
    states = [_states(workload, weight) for weight in weights]

    def run() -> None:
        norm = np.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
        scale = np.float32(min(1.0, 1.0 / norm))
        for weight, grad, state in zip(weights, grads, states, strict=True):
            formula(weight, scale * grad, *state)

    return runner(run)


def rows(workload: Workload) -> Runner | None:
    """Rows picked out and put back; duplicates are summed first."""
    if workload.rule != "groupadagrad":
        return None
    ((numbers, values),), (shape,) = touched(workload), workload.shapes
    weight, history = np.zeros(shape, np.float32), np.zeros((shape[0], 1), np.float32)
    assert workload.rows is not None
    duplicates = workload.rows.occurrences

    def run() -> None:
        r, g = numbers, values
        if duplicates:
            r, where = np.unique(numbers, return_inverse=True)
            g = np.zeros((len(r), shape[1]), np.float32)
            np.add.at(g, where, values)
        w, h = weight[r], history[r]
        groupadagrad(w, g, h)
        weight[r], history[r] = w, h

    return runner(run)


def _file(workload: Workload) -> tuple[dict[str, np.ndarray], Path, Any]:
    folder = tempfile.TemporaryDirectory()
    weights, _ = arrays(workload)
    content = {f"{t}.weight": weight for t, weight in enumerate(weights)}
    content |= {f"{t}.state": weight.copy() for t, weight in enumerate(weights)}
    return content, Path(folder.name) / "state", folder


def durable(path: Path) -> None:
    """Wait until the disk has a file, as `Trainer.save` does."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def save(workload: Workload, safetensors: bool) -> Runner:
    content, path, folder = _file(workload)
    write = _writer(safetensors)

    def run() -> None:
        write(content, path)
        durable(path)

    return runner(run, folder)


def load(workload: Workload, safetensors: bool) -> Runner:
    content, path, folder = _file(workload)
    _writer(safetensors)(content, path)

    def run() -> None:
        found = _reader(safetensors)(path)
        for name, array in content.items():
            array[...] = found[name]

    return runner(run, folder)


def _writer(safetensors: bool) -> Callable[[dict[str, np.ndarray], Path], None]:
    if safetensors:
        from safetensors.numpy import save_file

        return save_file

    def savez(content: dict[str, np.ndarray], path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **content)

    return savez


def _reader(safetensors: bool) -> Callable[[Path], Any]:
    if safetensors:
        from safetensors.numpy import load_file

        return load_file
    return lambda path: np.load(io.FileIO(path))
