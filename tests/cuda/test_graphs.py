"""CUDA graphs of more than a dense step: rows that catch up, and gradients that add up before the step."""

from __future__ import annotations

import numpy as np
import pytest

import numba_opt

from .. import table
from ..conformance.backends import Ptx
from ..conformance.gradients import SHAPE, block, csr, dense
from ..ptx import arrays

DENSE = dense(seed=7)
given = on_gpu = Ptx().put


def twins(name="adamax", **options):
    row = table.row(name)
    call = table.make(row, [SHAPE])
    return [
        numba_opt.Trainer(weights, table.build(row, **table.common(row) | options))
        for weights in (arrays.on_gpu(call.weights), call.weights)
    ]


def agree(gpu, cpu):
    found, expected = (
        [*trainer.params.values(), *table.leaves(list(trainer.states.values()))] for trainer in (gpu, cpu)
    )
    table.assert_bits(arrays.on_cpu(found), expected)
    assert gpu.optimizer.num_update == cpu.optimizer.num_update


# ---------------------------------------------------------------- rows that catch up


def test_rows_that_catch_up(driver, monkeypatch):
    """More steps than a history has room for, with other rows and rates each time, and eager ones between."""
    monkeypatch.setattr(numba_opt.cuda.deferred, "ROOM", 3)
    gpu, cpu = twins(sparse_update="exact")
    theirs = block([1, 7, 7, 2])
    ours = given(theirs)
    gpu.step([ours])
    cpu.step([theirs])
    with driver.capture(0) as graph:
        gpu.step([ours])
    assert gpu.optimizer._deferred[0].recorded == gpu.optimizer.num_update == 1
    assert [name for name in graph.names if name not in ("keys", "merge")] == ["catch_up", "rows", "record"]
    for n in range(9):
        ours.rows.array[:] = theirs.rows[:] = [n % 9, 3, n % 9, (2 * n + 1) % 9]
        for trainer in (gpu, cpu):
            trainer.set_learning_rate(0.1 / (n + 1))
        if n % 4 == 3:
            gpu.step([ours])
        else:
            gpu.advance()
            graph.launch(0)
        cpu.step([theirs])
        if n == 4:
            gpu.flush()
            cpu.flush()
            agree(gpu, cpu)
    gpu.flush()
    cpu.flush()
    agree(gpu, cpu)


def test_a_dense_gradient_whose_rows_are_late(driver):
    gpu, cpu = twins(sparse_update="exact")
    dense, sparse = given(DENSE), block([1, 7])
    gpu.step([dense])
    cpu.step([DENSE])
    with driver.capture(0) as graph:
        gpu.step([dense])
    for _ in range(2):
        gpu.step([given(sparse)])
        cpu.step([sparse])
        gpu.advance()
        graph.launch(0)
        cpu.step([DENSE])
        table.assert_bits([gpu.params["0"].array], [cpu.params["0"]])


def test_histories_that_are_replaced(driver):
    gpu, _ = twins(sparse_update="exact")
    grad = given(block([1, 7]))
    gpu.step([grad])
    with driver.capture(0):
        gpu.step([grad])
    gpu.advance()
    gpu.load_state_dict(gpu.state_dict())
    before = gpu.optimizer.num_update
    with pytest.raises(ValueError, match="steps that rows have yet to take are others"):
        gpu.advance()
    assert gpu.optimizer.num_update == before


def test_replays_that_nobody_announces(driver, monkeypatch):
    """A history is not written behind its end."""
    monkeypatch.setattr(numba_opt.cuda.deferred, "ROOM", 3)
    gpu, _ = twins(sparse_update="exact")
    grad = given(block([1, 7]))
    gpu.step([grad])
    with driver.capture(0) as graph:
        gpu.step([grad])
    for _ in range(8):
        graph.launch(0)
    driver.finish()


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(
    "grads",
    [[DENSE, 2 * DENSE], [block(), csr()], [block(), DENSE], [DENSE, block(), csr()]],
    ids=["dense", "sparse", "sparse, then dense", "dense, then sparse"],
)
@pytest.mark.parametrize("last", [False, True])
def test_sums_in_a_graph(driver, grads, last):
    """The whole of it, with the last gradients given to the step or not; others then, and eager steps."""
    gpu, cpu = twins()
    ours = [given(grad) for grad in grads]

    def all_of_it(trainer, grads):
        for grad in grads[:-1] if last else grads:
            trainer.accumulate([grad])
        trainer.step([grads[-1]] if last else None)

    all_of_it(gpu, ours)
    all_of_it(cpu, grads)
    driver.launches.clear()
    with driver.capture(0) as graph:
        all_of_it(gpu, ours)
    assert not driver.launches
    assert not {"set_coefficients", "copy"} & {*graph.names}
    assert gpu._totals is None
    agree(gpu, cpu)
    for n in range(5):
        for trainer in (gpu, cpu):
            trainer.set_learning_rate(0.1 / (n + 1))
        if n == 2:
            more = [block(np.arange(9).repeat(20)), *grads[1:]]  # more memory than before
            all_of_it(gpu, [given(grad) for grad in more])
            all_of_it(cpu, more)
            continue
        gpu.advance()
        graph.launch(0)
        all_of_it(cpu, grads)
        agree(gpu, cpu)


def test_graphs_of_parts(driver):
    """One that begins a sum, one that adds to it and one that takes it, replayed in that order."""
    gpu, cpu = twins("nag")
    ours = given(DENSE)
    for _ in range(2):
        for trainer, grad in ((gpu, ours), (cpu, DENSE)):
            trainer.accumulate([grad])
    gpu.step()
    cpu.step()
    graphs = []
    for call in (lambda: gpu.accumulate([ours]), lambda: gpu.accumulate([ours]), gpu.step):
        with driver.capture(0) as graph:
            call()
        graphs.append(graph)
    for scale in (1, 3):
        ours.array[...] = scale * DENSE
        for graph in (graphs[0], graphs[1], graphs[1]):
            graph.launch(0)
            cpu.accumulate([scale * DENSE])
        gpu.advance()
        graphs[2].launch(0)
        cpu.step()
        agree(gpu, cpu)


@pytest.mark.parametrize("grad", [DENSE, block()], ids=["dense", "sparse"])
def test_what_has_not_been_made_before(driver, grad):
    gpu, cpu = twins()
    ours = given(grad)
    for _ in range(2):
        with driver.capture(0), pytest.raises(RuntimeError, match="make one before the capture"):
            gpu.accumulate([ours])
        assert gpu._totals is None
    gpu.accumulate([ours])
    gpu.step()
    cpu.step([grad])
    agree(gpu, cpu)
    optimizer = table.build(table.row("nag"))
    weight = gpu.params["0"]
    state = optimizer.create_state(0, weight)
    optimizer.update([0], [weight], [ours], [state])
    with driver.capture(0), pytest.raises(RuntimeError, match="only a step of a Trainer can be captured"):
        optimizer.update([0], [weight], [ours], [state])
