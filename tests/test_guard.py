"""What a step costs, in counts that no other work on the machine can change, and a ratio that it hardly can.

The ratio is that of a kernel's loop to a plain one, whose calls take turns. Other work makes calls slower and
none faster, so the least of many is taken, and of more of them until there is nothing to complain of: only a
kernel that is slow every time fails.

Each check is then shown to fail: the last tests slow a step down on purpose.
"""

from __future__ import annotations

import math
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import pytest

import numba_opt
from numba_opt.cpu import threads
from numba_opt.cpu.executor import PreparedKernel

from .table import Row, each, leaves, make, row


class Limits(NamedTuple):
    """Of Python's side of a call on one tensor, and of what each further one adds."""

    bytecodes: int
    functions: int  # of C
    each: int  # bytecodes


# Counted with CPython 3.11: 1090 to 1167 bytecodes in a step of a Trainer, whatever the number of tensors;
# 1240 to 1383 in an update, and 37 for each tensor whose state is a tuple. Other versions of Python have
# others, so there is room for half more.
STEP, UPDATE = Limits(1700, 40, 1), Limits(2050, 70, 55)
ROOM = 64 << 10  # bytes that a step may take and give back, however large the tensors are
LEAST = 0.5  # of a plain loop's speed; measured: 0.9 to 1.1, and 0.75 at least on a busy machine
SMALL, LARGE = 1 << 13, 1 << 17  # elements; what both take is a call's own cost, and of no interest here
ROUNDS, MOST = 40, 2000


def stepped(row: Row, tensors: int, size: int = 256, fresh: bool = False) -> Callable[[], object]:
    """A Trainer's step, made a few times so that everything is bound and compiled."""
    call = make(row, [(size // 64, 64)] * tensors)
    trainer = numba_opt.Trainer(call.weights, row.cls(**row.kwargs))
    sets = [call.grads, [grad.copy() for grad in call.grads]] if fresh else [call.grads]
    turn = iter(range(10**9))
    return warm(lambda: trainer.step(sets[next(turn) % len(sets)]))


def updated(row: Row, tensors: int, size: int = 256) -> Callable[[], object]:
    """An optimizer's update, likewise."""
    call, optimizer = make(row, [(size // 64, 64)] * tensors), row.cls(**row.kwargs)
    return warm(lambda: optimizer.update(*call))


def warm(call: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        call()
    return call


TURNS = range(3)  # the least of three: the garbage collector and other threads have their own business


def instructions(call: Callable[[], object]) -> tuple[int, int]:
    """Python's side of a call: how many bytecodes it runs and how many functions of C it calls."""
    _instructions(call)  # in Python 3.12 the first one in a process is told of no bytecode
    found = min(_instructions(call) for _ in TURNS)
    assert min(found) > 0
    return found


def _instructions(call: Callable[[], object]) -> tuple[int, int]:
    counts = {"opcode": 0, "c_call": 0}

    def trace(frame, event, arg):
        frame.f_trace_opcodes = True
        if event == "opcode":
            counts[event] += 1
        return trace

    def profile(frame, event, arg):
        if event == "c_call":
            counts[event] += 1

    before = sys.gettrace(), sys.getprofile()
    sys.setprofile(profile)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return counts["opcode"], counts["c_call"]


def kernel_calls(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many kernels a call runs."""
    run, count = threads.run, 0

    def counted(jobs, *args):
        nonlocal count
        jobs = list(jobs)
        count += len(jobs)
        return run(jobs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "run", counted)
        call()
    return count


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """How many bytes a call holds at most beyond those before it, NumPy's included, and how many it keeps."""
    tracemalloc.start()
    try:
        call()  # what tracemalloc itself needs
        return min(_allocated(call) for _ in TURNS)
    finally:
        tracemalloc.stop()


def _allocated(call: Callable[[], object]) -> tuple[int, int]:
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    call()
    after, peak = tracemalloc.get_traced_memory()
    return peak - before, after - before


@numba.njit(error_model="numpy")
def plain_nag(weight, grad, mom, lr, momentum):
    for i in range(weight.size):
        mom[i] = momentum * mom[i] - lr * grad[i]
        weight[i] += momentum * mom[i] - lr * grad[i]


@numba.njit(error_model="numpy")
def plain_rmsprop(weight, grad, var, lr, rho, rest, epsilon):
    for i in range(weight.size):
        var[i] = rho * var[i] + rest * grad[i] * grad[i]
        weight[i] -= lr * grad[i] / (math.sqrt(var[i]) + epsilon)


@numba.njit(error_model="numpy")
def plain_ftml(weight, grad, d, v, z, beta1, rest1, beta2, rest2, per_lr, unbiased, epsilon):
    for i in range(weight.size):
        v[i] = beta2 * v[i] + rest2 * grad[i] * grad[i]
        new = per_lr * (math.sqrt(v[i] * unbiased) + epsilon)
        z[i] = beta1 * z[i] + rest1 * grad[i] - (new - beta1 * d[i]) * weight[i]
        weight[i] = -z[i] / new
        d[i] = new


# The same arithmetic in a loop that Numba compiles by ordinary means, on arrays that are just there.
PLAIN: dict[str, tuple[Callable[..., None], tuple[float, ...]]] = {
    "nag": (plain_nag, (0.1, 0.9)),
    "rmsprop": (plain_rmsprop, (0.001, 0.9, 0.1, 1e-8)),
    "ftml": (plain_ftml, (0.6, 0.4, 0.999, 0.001, 160.0, 1000.0, 1e-8)),
}


def of_plain(row: Row, monkeypatch: pytest.MonkeyPatch) -> float:
    """The speed of a Trainer's step on one thread beside the plain loop's, for each further element."""
    monkeypatch.setattr(threads, "count", lambda: 1)
    calls = [made(row, size) for made in (stepped_alone, plain) for size in (SMALL, LARGE)]
    best = [math.inf] * len(calls)
    for n in range(MOST):
        for k, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[k] = min(best[k], time.perf_counter() - start)
        ours, floor = best[1] - best[0], best[3] - best[2]
        if n >= ROUNDS and floor > LEAST * ours:
            break
    return floor / ours


def stepped_alone(row: Row, size: int) -> Callable[[], object]:
    return stepped(row, 1, size)


def plain(row: Row, size: int) -> Callable[[], object]:
    """The plain loop over arrays like a step's."""
    call, (loop, constants) = make(row, [size]), PLAIN[row.id]
    arrays = [call.weights[0], call.grads[0], *leaves(call.states[0])]
    numbers = list(map(np.float32, constants))
    return warm(lambda: loop(*arrays, *numbers))


# -------------------------------------------------------------------- checks


def check_python(make: Callable[[Row, int], Callable[[], object]], row: Row, limits: Limits) -> None:
    (bytecodes, functions), (many, _) = (instructions(make(row, tensors)) for tensors in (1, 200))
    assert bytecodes <= limits.bytecodes
    assert functions <= limits.functions
    assert many - bytecodes <= 199 * limits.each


def check_kernels(call: Callable[[], object], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_calls(call, monkeypatch) == expected


def check_memory(call: Callable[[], object]) -> None:
    held, kept = allocated(call)
    assert held < ROOM
    assert kept < 1024


def check_speed(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_plain(row, monkeypatch) > LEAST


@each
def test_python_of_a_small_step_is_bounded_and_without_a_loop_over_tensors(row):
    check_python(stepped, row, STEP)


@each
def test_python_of_a_small_update_is_bounded(row):
    check_python(updated, row, UPDATE)


@each
@pytest.mark.parametrize("fresh", [False, True], ids=["same gradients", "fresh gradients"])
def test_a_step_is_one_kernel_call(row, fresh, monkeypatch):
    check_kernels(stepped(row, 200, fresh=fresh), 1, monkeypatch)
    check_kernels(updated(row, 200), 1, monkeypatch)


def test_clipping_is_one_more_kernel_call(monkeypatch):
    call = make(row("nag"), [256] * 200)
    trainer = numba_opt.Trainer(call.weights, "nag", clip_global_norm=1.0)
    check_kernels(warm(lambda: trainer.step(call.grads)), 2, monkeypatch)


@each
@pytest.mark.parametrize(("tensors", "size"), [(200, 256), (1, 1 << 20)])
def test_a_step_allocates_next_to_nothing(row, tensors, size):
    check_memory(stepped(row, tensors, size))
    check_memory(updated(row, tensors, size))


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_not_far_from_a_plain_loop(name, monkeypatch):
    check_speed(row(name), monkeypatch)


# -------------------------------------------------------------------- and that they would fail


def test_a_loop_over_tensors_would_be_noticed(monkeypatch):
    def unfrozen(self, grads):
        return [grad if name not in self._frozen else None for name, grad in zip(self._names, grads)]  # noqa: B905

    monkeypatch.setattr(numba_opt.Trainer, "_unfrozen", unfrozen)
    with pytest.raises(AssertionError):
        check_python(stepped, row("nag"), STEP)


def test_more_python_for_each_call_would_be_noticed(monkeypatch):
    hyper = numba_opt.NAG.hyper
    monkeypatch.setattr(numba_opt.NAG, "hyper", lambda *args: [hyper(*args) for _ in range(150)][-1])
    with pytest.raises(AssertionError):
        check_python(stepped, row("nag"), STEP)


def test_a_kernel_call_for_each_tensor_would_be_noticed(monkeypatch):
    job = PreparedKernel.job

    def one_each(kernel, rows):
        for t in range(len(kernel.table)):
            offsets = kernel.offsets[t : t + 2] - kernel.offsets[t]
            threads.run([job(kernel._replace(table=kernel.table[t : t + 1], offsets=offsets), rows)])
        return job(kernel, rows)

    monkeypatch.setattr(PreparedKernel, "job", one_each)
    with pytest.raises(AssertionError):
        check_kernels(stepped(row("nag"), 200), 1, monkeypatch)


@pytest.mark.parametrize(("tensors", "size"), [(200, 256), (1, 1 << 20)])
def test_a_copy_of_the_gradients_would_be_noticed(tensors, size, monkeypatch):
    in_order = numba_opt.Trainer._in_order
    copied = lambda self, grads: [grad.copy() for grad in in_order(self, grads)]  # noqa: E731
    monkeypatch.setattr(numba_opt.Trainer, "_in_order", copied)
    with pytest.raises(AssertionError):
        check_memory(stepped(row("nag"), tensors, size))


@pytest.mark.parametrize("name", PLAIN)
def test_a_kernel_that_takes_four_passes_would_be_noticed(name, monkeypatch):
    run = threads.run

    def slow(jobs, *args):
        jobs = list(jobs)
        for _ in range(3):
            run(jobs)
        run(jobs, *args)

    monkeypatch.setattr(threads, "run", slow)
    with pytest.raises(AssertionError):
        check_speed(row(name), monkeypatch)
