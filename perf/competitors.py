"""The table of competitors: who performs a workload's step, and how it is called.

A competitor makes, for a workload, a function that performs a number of steps and returns the seconds they
took, or None where it has no such optimizer. Its arrays are made once, there. Those that are not installed
are left out of the table and named, with the reason.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba

import numba_opt

from . import bare
from .clock import sample
from .workloads import RULES, Workload, arrays

Runner = Callable[[int, bool], float]  # (number of steps, warm) -> seconds, as `clock.sample`

UPDATE, STEP = "numba_opt update", "numba_opt step"
TRAINER, FRESH = "numba_opt Trainer", "numba_opt Trainer, fresh gradients"
CLIPPED = "numba_opt Trainer, clip_global_norm"
TORCH_LOOP, TORCH_FOREACH, TORCH_FUSED = TORCH = ("torch for-loop", "torch foreach", "torch fused")
MXNET = "MXNet"
BARE_SERIAL, BARE_PARALLEL = BARE = ("bare, serial", "bare, prange")

FRESH_ELEMENTS = 1_000_000  # gradients come in fresh arrays only in workloads up to this size
FRESH_SETS = 8


class Competitor(NamedTuple):
    name: str
    prepare: Callable[[Workload], Runner | None]


class Table(NamedTuple):
    """Who takes part; who does not, and why; and whose versions matter."""

    competitors: list[Competitor]
    skipped: dict[str, str]
    versions: dict[str, str]


def table(mxnet: str | None, threads: int) -> Table:
    """All competitors, set to the same number of threads. `mxnet` is an interpreter that has it."""
    numba.set_num_threads(threads)
    found = Table(
        [
            Competitor(UPDATE, functools.partial(_optimizer, "update")),
            Competitor(STEP, functools.partial(_optimizer, "step")),
        ],
        {},
        {"numba_opt": numba_opt.__version__, "numba": numba.__version__},
    )
    _add_trainer(found)
    _add_torch(found, threads)
    _add_mxnet(found, mxnet, threads)
    for name, parallel in zip(BARE, (False, True), strict=True):
        found.competitors.append(Competitor(name, functools.partial(_bare, parallel)))
    return found


def _runner(call: Callable[[], object]) -> Runner:
    return functools.partial(sample, call)


def _bare(parallel: bool, workload: Workload) -> Runner:
    return _runner(bare.floor(workload, parallel))


# -------------------------------------------------------------------- numba_opt


def _optimizer(method: str, workload: Workload) -> Runner:
    rule = RULES[workload.rule]
    optimizer = numba_opt.create(rule.optimizer, **rule.options)
    weights, grads = arrays(workload.shapes)
    indices = list(range(len(weights)))
    states = [optimizer.create_state(i, weight) for i, weight in enumerate(weights)]
    return _runner(lambda: getattr(optimizer, method)(indices, weights, grads, states))


def _add_trainer(found: Table) -> None:
    if not hasattr(numba_opt, "Trainer"):
        found.skipped[TRAINER] = "this version has none"
        return
    found.competitors.extend([Competitor(TRAINER, _trainer), Competitor(FRESH, _trainer_fresh)])
    if "clip_global_norm" in inspect.signature(numba_opt.Trainer).parameters:
        found.competitors.append(Competitor(CLIPPED, _trainer_clipped))


def _bound(workload: Workload, **options: Any) -> tuple[Any, list[Any]]:
    rule = RULES[workload.rule]
    weights, grads = arrays(workload.shapes)
    return numba_opt.Trainer(weights, rule.optimizer, **rule.options, **options), grads


def _trainer(workload: Workload) -> Runner:
    trainer, grads = _bound(workload)
    return _runner(lambda: trainer.step(grads))


def _trainer_fresh(workload: Workload) -> Runner | None:
    if workload.elements > FRESH_ELEMENTS:
        return None
    trainer, grads = _bound(workload)
    sets = itertools.cycle([[grad.copy() for grad in grads] for _ in range(FRESH_SETS)])
    return _runner(lambda: trainer.step(next(sets)))


def _trainer_clipped(workload: Workload) -> Runner:
    trainer, grads = _bound(workload, clip_global_norm=1.0)
    return _runner(lambda: trainer.step(grads))


# -------------------------------------------------------------------- PyTorch

# Class and options of what comes nearest, and the ways of running it that exist on the CPU. Adagrad keeps
# a number for each element where GroupAdaGrad keeps one for each row, so it moves more.
TORCH_OPTIMIZERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "nag": ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}, TORCH),
    "rmsprop": ("RMSprop", {"lr": 0.001, "alpha": 0.9}, TORCH[:2]),
    "rmsprop-centered": (
        "RMSprop",
        {"lr": 0.001, "alpha": 0.9, "momentum": 0.9, "centered": True},
        TORCH[:2],
    ),
    "adamax": ("Adamax", {"lr": 0.002}, TORCH[:2]),
    "groupadagrad": ("Adagrad", {"lr": 0.01}, TORCH),
}
TORCH_SWITCHES = {
    TORCH_LOOP: {"foreach": False},
    TORCH_FOREACH: {"foreach": True},
    TORCH_FUSED: {"fused": True},
}


def _add_torch(found: Table, threads: int) -> None:
    try:
        import torch
    except ImportError as error:
        found.skipped["torch"] = str(error)
        return
    torch.set_num_threads(threads)
    found.versions["torch"] = torch.__version__
    found.competitors.extend(Competitor(name, functools.partial(_torch, name)) for name in TORCH)


def _torch(way: str, workload: Workload) -> Runner | None:
    import torch

    name, options, ways = TORCH_OPTIMIZERS.get(workload.rule, ("", {}, ()))
    if way not in ways:
        return None
    weights, grads = arrays(workload.shapes)
    parameters = [torch.nn.Parameter(torch.from_numpy(weight)) for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(grad)
    return _runner(getattr(torch.optim, name)(parameters, **options, **TORCH_SWITCHES[way]).step)


# -------------------------------------------------------------------- MXNet


def _add_mxnet(found: Table, interpreter: str | None, threads: int) -> None:
    if interpreter is None:
        found.skipped[MXNET] = "no interpreter given (--mxnet or NUMBA_OPT_MXNET)"
        return
    try:
        worker = _Worker(interpreter, threads)
    except (OSError, RuntimeError) as error:
        found.skipped[MXNET] = str(error)
        return
    found.versions["mxnet"] = worker.version
    found.competitors.append(Competitor(MXNET, worker.prepare))


class _Worker:
    """`mxnet_worker.py` in MXNet's own interpreter; it times itself and answers with seconds."""

    def __init__(self, interpreter: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [interpreter, "-m", f"{__package__}.mxnet_worker"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._ask(do="version")

    def prepare(self, workload: Workload) -> Runner:
        self._ask(do="prepare", workload=workload.name)
        return lambda repeats, warm: self._ask(do="run", repeats=repeats, warm=warm)

    def _ask(self, **command: Any) -> Any:
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        return answer
