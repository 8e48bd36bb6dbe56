"""The floor: what reads and writes the same memory as a workload and does nothing but one addition.

Written with nothing but Numba's ordinary means, so that it owes nothing to the package it judges. Many
tensors are stood in for by one of the same length, which no list of tensors can beat. Half-precision
numbers are moved as integers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import numpy as np
from numba import prange

from .clock import Runner, runner, timed
from .workloads import RULES, Workload, random, touched


def one_state(weight, grad, a):
    for i in prange(weight.size):
        weight[i] += grad[i]
        a[i] += grad[i]


def two_states(weight, grad, a, b):
    for i in prange(weight.size):
        weight[i] += grad[i]
        a[i] += grad[i]
        b[i] += grad[i]


def three_states(weight, grad, a, b, c):
    for i in prange(weight.size):
        weight[i] += grad[i]
        a[i] += grad[i]
        b[i] += grad[i]
        c[i] += grad[i]


def row_state(weight, grad, a):
    for r in prange(weight.shape[0]):
        a[r, 0] += grad[r, 0]
        for j in range(weight.shape[1]):
            weight[r, j] += grad[r, j]


def one_state_and_copy(weight, grad, a, copy):
    for i in prange(weight.size):
        g = np.float32(grad[i])
        weight[i] += g
        a[i] += g
        copy[i] = grad[i]


def two_states_and_copy(weight, grad, a, b, copy):
    for i in prange(weight.size):
        g = np.float32(grad[i])
        weight[i] += g
        a[i] += g
        b[i] += g
        copy[i] = grad[i]


def three_states_and_copy(weight, grad, a, b, c, copy):
    for i in prange(weight.size):
        g = np.float32(grad[i])
        weight[i] += g
        a[i] += g
        b[i] += g
        c[i] += g
        copy[i] = grad[i]


def row_state_and_copy(weight, grad, a, copy):
    for r in prange(weight.shape[0]):
        a[r, 0] += np.float32(grad[r, 0])
        for j in range(weight.shape[1]):
            weight[r, j] += np.float32(grad[r, j])
            copy[r, j] = grad[r, j]


def gather_scatter(weight, state, rows, values):
    """Touched rows read and written, their state too, and the gradient read."""
    for k in prange(rows.size):
        r = rows[k]
        for j in range(state.shape[1]):
            state[r, j] += values[k, j]
        for j in range(values.shape[1]):
            weight[r, j] += values[k, j]


def step(workload: Workload, parallel: bool) -> Runner:
    """The arrays of a dense step, on one thread or on all."""
    rule = RULES[workload.rule]
    shape = held = (workload.elements,)
    if rule.per_row:
        width = workload.shapes[0][1]
        shape = (workload.elements // width, width)
        held = (shape[0], 1)
    few = row_state, one_state, two_states, three_states
    copied = row_state_and_copy, one_state_and_copy, two_states_and_copy, three_states_and_copy
    function = (copied if workload.masters else few)[0 if rule.per_row else rule.states]
    half = workload.dtype in ("float16", "bfloat16")
    grad = random(shape, "float16").view(np.uint16) if half else random(shape, workload.dtype)
    kept = np.float32 if workload.masters else grad.dtype
    written = [np.ones(shape, kept), *(np.zeros(held, kept) for _ in range(rule.states))]
    copy = [np.zeros_like(grad)] if workload.masters else []
    kernel = numba.njit(parallel=parallel)(function)
    return runner(lambda: kernel(written[0], grad, *written[1:], *copy))


def rows(workload: Workload, parallel: bool) -> Runner:
    """The rows that a sparse gradient touches, each once, and all of its values."""
    rule, ((height, width),) = RULES[workload.rule], workload.shapes
    held = (height, 1) if rule.per_row else (height, width * rule.states)
    weight, state = np.zeros((height, width), np.float32), np.zeros(held, np.float32)
    kernel = numba.njit(parallel=parallel)(gather_scatter)
    grads = touched(workload)
    if not rule.per_row:
        grads = [(numbers, np.tile(values, rule.states)) for numbers, values in grads]
    turn = iter(range(10**9))
    return runner(lambda: kernel(weight, state, *grads[next(turn) % len(grads)]))


def save(workload: Workload) -> Runner:
    """As many bytes written to a file, and waited for until the disk has them."""
    content = np.ones(workload.bytes, np.uint8)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "plain"

    def run() -> None:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return runner(run, folder)


def load(workload: Workload) -> Runner:
    """As many bytes read from a file into memory that is there."""
    content = np.ones(workload.bytes, np.uint8)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "plain"
    content.tofile(path)

    def run() -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(content)

    return runner(run, folder)


def start(workload: Workload) -> Runner | None:
    """A process that imports what this package stands on and ends."""
    if workload.what.startswith("warmup"):
        return None
    command = [sys.executable, "-c", "import numba, scipy.sparse"]
    return timed(lambda: subprocess.run(command, check=True))
