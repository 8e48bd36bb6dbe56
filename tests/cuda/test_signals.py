"""Signals whose handlers raise: what is launched on a GPU is counted, whenever they come."""

from __future__ import annotations

import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import numba_opt

from .. import table
from ..conformance.backends import Ptx
from ..conformance.gradients import SHAPE, block
from ..interruptions import Interrupted
from ..ptx import arrays

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal that nobody else uses"),
    pytest.mark.skipif(
        threading.current_thread() is not threading.main_thread(), reason="needs the main thread"
    ),
]

on_gpu = Ptx().put
PACKAGE = str(Path(numba_opt.__file__).parent)


def signalled(call, at):
    """Call something, with a signal before instruction number `at` of the package's code; None for never.

    How many instructions there were, and whether the signal's handler has raised, which may be later.
    """
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGUSR1)
        return trace

    def handler(number, frame):
        raise Interrupted

    kept = signal.signal(signal.SIGUSR1, handler)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return count, True
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGUSR1, kept)
    return count, False


def whenever(make, count, check):
    """Interrupt a call at some of its instructions: `make` gives it and what it is to be checked with."""
    whole = set()
    for _ in range(2):  # the second one compiles nothing
        call, held = make()
        total, raised = signalled(call, None)
        assert not raised
        check(*held)
    for at in random.Random(0).sample(range(1, total + 1), min(count, total)):
        call, held = make()
        _, raised = signalled(call, at)
        assert raised
        whole.add(check(*held))
    return whole


def content(trainer):
    return [*trainer.params.values(), *table.leaves(list(trainer.states.values()))]


@pytest.mark.parametrize("form", ["dense", "accumulated", "exact"])
def test_a_trainers_step(form):
    """It is made and counted or neither, with what it has accumulated; the next ones go on from there."""
    row = table.row("adamax")
    grads = [[block([1, 7, 7], seed=n)] for n in range(3)] if form == "exact" else None
    call = table.make(row, [SHAPE])
    grads = grads or [table.make(row, [SHAPE], seed=n).grads for n in range(3)]
    options = {"sparse_update": "exact"} if form == "exact" else {}

    def trainers():
        for weights in (arrays.on_gpu(call.weights), [w.copy() for w in call.weights]):
            yield numba_opt.Trainer(weights, table.build(row, **options), clip_global_norm=1e9)

    def given(grad):
        return on_gpu(grad[0]) if form == "exact" else arrays.DeviceArray(grad[0])

    def make():
        gpu, cpu = trainers()
        for trainer, wrap in ((gpu, given), (cpu, lambda grad: grad[0])):
            trainer.step([wrap(grads[0])])
            if form == "accumulated":
                trainer.accumulate([wrap(grads[1])])
        grad = given(grads[2])
        return (lambda: gpu.step([grad])), (gpu, cpu)

    def check(gpu, cpu):
        made = gpu.optimizer.num_update == 2
        assert (gpu._totals is None) == (made or form != "accumulated")
        if made:
            cpu.step(grads[2])
        for trainer, wrap in ((gpu, given), (cpu, lambda grad: grad[0])):
            trainer.step([wrap(grads[1])])
            trainer.flush()
        table.assert_near(arrays.on_cpu(content(gpu)), content(cpu), 1e-6)
        assert gpu.optimizer.num_update == cpu.optimizer.num_update
        return made

    assert whenever(make, 40, check) == {False, True}


@pytest.mark.parametrize("sparse", [False, True])
def test_accumulating(sparse):
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    theirs = [block([3, 3, 1])] if sparse else call.grads
    ours = [on_gpu(theirs[0])] if sparse else arrays.on_gpu(theirs)

    def make():
        gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row))
        gpu.accumulate(ours)
        before = gpu._totals
        return (lambda: gpu.accumulate(ours)), (gpu, before)

    def check(gpu, before):
        made = gpu._totals is not before
        cpu = numba_opt.Trainer([w.copy() for w in call.weights], table.build(row))
        for _ in range(2 + made):
            cpu.accumulate(theirs)
        gpu.accumulate(ours)
        gpu.step()
        cpu.step()
        table.assert_bits(arrays.on_cpu(content(gpu)), content(cpu))
        return made

    assert whenever(make, 30, check) == {False, True}


def test_an_optimizers_update():
    row = table.row("adamax")
    call = table.make(row, [(5, 7), 33])

    def make():
        optimizer = table.build(row)
        given = [arrays.on_gpu(part) for part in call[1:]]
        optimizer.update(call.indices, *given)
        return (lambda: optimizer.update(call.indices, *given)), (optimizer, given)

    def check(optimizer, given):
        made = optimizer.num_update == 2
        cpu, copied = table.build(row), call.copy()
        for _ in range(2 + made):
            cpu.update(*copied)
        optimizer.update(call.indices, *given)
        assert optimizer._index_update_count == cpu._index_update_count
        table.assert_bits(arrays.on_cpu([given[0], given[2]]), table.outputs(copied))
        return made

    assert whenever(make, 40, check) == {False, True}


def test_a_signal_between_launches(driver):
    """However few instructions there are between them."""
    row = table.row("nag")
    call = table.make(row, [(5, 7), 33])

    def handler(number, frame):
        raise Interrupted

    kept = signal.signal(signal.SIGUSR1, handler)
    submit = type(driver)._submit
    try:
        for k in range(5):
            gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row), clip_global_norm=1.0)
            grads, left = arrays.on_gpu(call.grads), [k]

            def submitting(*args, left=left):
                found = submit(driver, *args)
                left[0] -= args[2] in ("copy", "set_coefficients", "squares", "clip_norm", "dense")
                if left[0] == -1:
                    left[0] = -2
                    signal.raise_signal(signal.SIGUSR1)
                return found

            driver._submit = submitting
            with pytest.raises(Interrupted):
                gpu.step(grads)
            del driver._submit
            assert gpu.optimizer.num_update == 1
            assert not np.array_equal(gpu.params["0"].array, call.weights[0])
    finally:
        vars(driver).pop("_submit", None)
        signal.signal(signal.SIGUSR1, kept)
