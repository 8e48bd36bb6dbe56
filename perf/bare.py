"""The floor: kernels that read and write the arrays of a step and do nothing but one addition.

Written with nothing but Numba's ordinary means, so that they owe nothing to the package they judge. Many
tensors are stood in for by one of the same length, which no list of tensors can beat.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import prange

from .workloads import RULES, Workload, arrays


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


def floor(workload: Workload, parallel: bool) -> Callable[[], object]:
    """A call that moves what a workload's step must move, on one thread or on all."""
    rule = RULES[workload.rule]
    if rule.per_row:
        width = workload.shapes[0][1]
        shape, held, function = (workload.elements // width, width), 1, row_state
    else:
        shape = held = (workload.elements,)
        function = (one_state, two_states, three_states)[rule.states - 1]
    (weight,), (grad,) = arrays((shape,))
    held = (shape[0], 1) if rule.per_row else shape
    states = [np.zeros(held, np.float32) for _ in range(rule.states)]
    kernel = numba.njit(parallel=parallel)(function)
    return lambda: kernel(weight, grad, *states)
