"""The ways of numba_opt itself."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

import numba_opt

from .clock import Runner, runner, timed
from .workloads import RULES, Workload, arrays, touched

FRESH_ELEMENTS = 1_000_000  # gradients come in fresh arrays only in workloads up to this size
FRESH_SETS = 8


def update(workload: Workload, fused: bool) -> Runner | None:
    """`Optimizer.update`, by kernels or on whole arrays, which is not done in a hurry."""
    if not fused and (workload.what not in ("2^8", "10M", "200 x 256") or workload.dtype != "float32"):
        return None
    rule = RULES[workload.rule]
    optimizer = numba_opt.create(
        rule.optimizer, **rule.options, use_fused_step=fused, multi_precision=workload.masters
    )
    weights, grads = arrays(workload)
    indices = list(range(len(weights)))
    states = [optimizer.create_state_multi_precision(i, weight) for i, weight in enumerate(weights)]
    call = optimizer.update_multi_precision if workload.masters else optimizer.update
    return runner(lambda: call(indices, weights, grads, states))


def bound(workload: Workload, **options: Any) -> tuple[numba_opt.Trainer, list[Any]]:
    """A Trainer of a workload's weights, and their gradients."""
    rule = RULES[workload.rule]
    weights, grads = arrays(workload)
    given = rule.options | {"multi_precision": workload.masters} | options
    return numba_opt.Trainer(weights, rule.optimizer, **given), grads


def trainer(workload: Workload, **options: Any) -> Runner:
    """`Trainer.step` with gradients that stay where they are."""
    bound_trainer, grads = bound(workload, **options)
    return runner(lambda: bound_trainer.step(grads))


def fresh(workload: Workload) -> Runner | None:
    """`Trainer.step` with gradients in other arrays at each step."""
    if workload.elements > FRESH_ELEMENTS:
        return None
    bound_trainer, grads = bound(workload)
    sets = itertools.cycle([[grad.copy() for grad in grads] for _ in range(FRESH_SETS)])
    return runner(lambda: bound_trainer.step(next(sets)))


def reduced(workload: Workload) -> Runner | None:
    """FTML with one state."""
    return trainer(workload, reduced=True) if workload.rule == "ftml" and _usual(workload) else None


def small_states(workload: Workload, chance: bool = False) -> Runner | None:
    """float32 weights with states in bfloat16, rounded to nearest or by chance."""
    options = {"state_dtype": "bfloat16", "stochastic_rounding": chance}
    return trainer(workload, **options) if _usual(workload) else None


def _usual(workload: Workload) -> bool:
    return workload.what == "10M" and workload.dtype == "float32"


# -------------------------------------------------------------------- sparse gradients


def rows(workload: Workload, form: str = "", **options: Any) -> Runner | None:
    """`Trainer.step` with gradients of some rows.

    The form "csr" brings them as CSR matrices, where all are in order, "once" each row once, "exact" lets
    rows catch up, where they come back.
    """
    assert workload.rows is not None
    if form == "csr" and (workload.rows.occurrences or workload.rows.turns > 1):
        return None
    if form == "once" and not workload.rows.occurrences:
        return None
    if form == "exact":
        if workload.rows.turns == 1:
            return None
        options["sparse_update"] = "exact"
    (shape,), rule = workload.shapes, RULES[workload.rule]
    found = touched(
        workload._replace(rows=workload.rows._replace(occurrences=0)) if form == "once" else workload
    )
    grads = [_csr(*grad, shape) if form == "csr" else numba_opt.RowSparse(*grad, shape) for grad in found]
    turn = itertools.cycle([[grad] for grad in grads])
    trainer = numba_opt.Trainer([np.zeros(shape, np.float32)], rule.optimizer, **rule.options, **options)
    return runner(lambda: trainer.step(next(turn)))


def _csr(numbers: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Full rows as a CSR matrix."""
    height, width = shape
    starts = np.zeros(height + 1, np.int64)
    starts[numbers + 1] = width
    columns = np.tile(np.arange(width, dtype=np.int32), len(numbers))
    return scipy.sparse.csr_array((values.ravel(), columns, np.cumsum(starts).astype(np.int32)), shape=shape)


# -------------------------------------------------------------------- files


def save(workload: Workload) -> Runner:
    folder = tempfile.TemporaryDirectory()
    trainer, _ = bound(workload)
    return runner(lambda: trainer.save(Path(folder.name) / "state.safetensors"), folder)


def load(workload: Workload) -> Runner:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "state.safetensors"
    trainer, _ = bound(workload)
    trainer.save(path)
    return runner(lambda: trainer.load(path), folder)


# -------------------------------------------------------------------- start-up

FIRST_UPDATE = """
import numpy, numba_opt
optimizer = numba_opt.create("ftml")
weight, grad = numpy.ones(256, "f4"), numpy.ones(256, "f4")
optimizer.update([0], [weight], [grad], [optimizer.create_state(0, weight)])
"""
WARMUP = """
import time, numba_opt
start = time.perf_counter()
numba_opt.warmup(dtypes=("float32", "float64"), progress=False)
print(time.perf_counter() - start)
"""


def start(workload: Workload) -> Runner:
    """A process from its start to its end: the first update, or a warm-up, which alone is timed."""
    folder = tempfile.TemporaryDirectory()
    script = WARMUP if workload.what.startswith("warmup") else FIRST_UPDATE
    command = [sys.executable, "-c", script]
    root = Path(numba_opt.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))

    def run(cache: str) -> float | None:
        env = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": path}
        said = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
        return float(said.split()[-1]) if said else None

    def cold() -> float | None:
        with tempfile.TemporaryDirectory() as empty:
            return run(empty)

    def warm() -> float | None:
        return run(folder.name)

    if workload.what in ("cold", "warmup, empty cache"):
        return timed(cold)
    warm()
    return timed(warm)
