"""What steps launch on a GPU, what kernels read and write, and that the host waits for none of it."""

from __future__ import annotations

import numpy as np
import pytest

import numba_opt

from .. import table
from ..conformance.backends import Ptx
from ..conformance.gradients import SHAPE, block, csr, dense, some_csr
from ..conformance.pairs import Twins
from ..ptx import arrays

PTX = Ptx()


def test_one_launch_for_all_tensors_of_a_layout(driver):
    row = table.row("nag")
    call = table.make(row, [4] * 30)
    optimizer = table.build(row)
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    driver.launches.clear()
    for _ in range(3):
        optimizer.update(call.indices, weights, grads, states)
    assert driver.launches == ["copy", "set_coefficients", "dense", "dense", "dense"]
    optimizer.set_learning_rate(0.5)
    optimizer.update(call.indices, weights, grads, states)
    assert driver.launches[5:] == ["set_coefficients", "dense"]  # nothing is compiled or copied again


def test_every_element_is_read_and_written_once(driver):
    row = table.row("rmsprop-centered")
    call = table.make(row, [4096 + 30, 9])
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    optimizer = table.build(row)
    optimizer.update(call.indices, weights, grads, states)
    arrays.on_cpu(weights)
    held = [array for array in table.leaves([weights, grads, states]) if array.size]
    touched = [
        place + size * k
        for _, places, _, size, count, _, _ in driver.last.log.entries
        for k in range(count)
        for place in places.tolist()
        if any(array.address <= place < array.address + 4 * array.size for array in held)
    ]
    places = np.unique(touched, return_counts=True)
    elements = sum(w.size for w in call.weights)
    assert len(places[0]) == 5 * elements
    assert sorted(places[1]) == [1] * elements + [2] * 4 * elements  # gradients are only read


@pytest.mark.parametrize(("count", "merges"), [(0, 0), (70, 0), (1024, 0), (1025, 1), (2048, 1), (2500, 2)])
def test_keys_are_sorted_by_blocks_and_merged(driver, count, merges):
    """A block sorts 1,024 of them."""
    row = table.row("rmsprop")
    rows = np.random.default_rng(count).integers(0, 300, count)
    call = table.make(row, [(300, 1)])
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    driver.launches.clear()
    table.build(row).update([0], weights, [PTX.put(block(rows, (300, 1)))], states)
    assert [name for name in driver.launches if name in ("keys", "merge")] == ["keys"] + ["merge"] * merges


@pytest.mark.parametrize("rising", [True, False])
def test_how_often_columns_are_read(driver, rising):
    """Once to see whether they rise, and then for each element a few times; if they don't, all of them."""
    row, width, entries = table.row("nag-plain"), 192, 64
    matrix = some_csr([[*range(0, width, 3)][:: 1 if rising else -1]], (1, width))
    call = table.make(row, [(1, width)])
    weights, grad = arrays.on_gpu(call.weights), PTX.put(matrix)
    table.build(row).update([0], weights, [grad], [None])
    arrays.on_cpu(weights)
    first = grad.indices.address
    places = np.concatenate([entry[1] for entry in driver.last.log.entries])
    reads = places[(first <= places) & (places < first + 4 * entries)]
    if rising:
        assert len(reads) <= 2 * entries + width * (6 + 3)
    else:
        assert len(reads) >= entries * width


def test_catching_up(driver):
    """Two launches more than a lazy step has; nothing is copied or compiled from step to step."""
    (weight,) = arrays.on_gpu(table.make(table.row("nag"), [SHAPE]).weights)
    grad = PTX.sparse(block([3, 1]), distinct=True)
    optimizer = numba_opt.NAG(sparse_update="exact", **table.common(table.row("nag")))
    state = optimizer.create_state(0, weight)
    for _ in range(2):
        driver.launches.clear()
        optimizer.update([0], [weight], [grad], [state])
    assert driver.launches == ["catch_up", "rows", "record"]
    driver.launches.clear()
    optimizer.flush([0], [weight], [state])
    assert driver.launches == ["copy", "catch_up", "forget"]
    driver.launches.clear()
    optimizer.flush([0], [weight], [state])
    assert not driver.launches


def test_accumulating(driver):
    """Two kernels that differ in one addition; tables are written once, as the memory stays where it is."""
    twins = Twins(PTX, table.row("nag"), [(5, 7), (8, 16), 33])
    gpu, grads = twins.ours, twins.given(twins.grads)
    seen = []
    for _ in range(3):
        driver.launches.clear()
        for _ in range(3):
            gpu.accumulate(grads)
        gpu.step()
        seen.append([*driver.launches])
    # the first gradients, the others, and the step
    assert seen[0] == [
        *["copy", "set_coefficients", "dense"] * 2,
        "dense",
        "copy",
        "set_coefficients",
        "dense",
    ]
    assert seen[1] == seen[2] == ["dense"] * 4


def test_nobody_waits_for_sums(driver):
    """Once memory is there, the host reads nothing, and sparse sums are launches and nothing else."""
    gpu = Twins(PTX, table.row("nag")).ours
    grads = PTX.put([block(), csr(), dense(seed=7)])

    def round():
        for grad in grads[:2]:
            gpu.accumulate([grad])
        gpu.step()
        for grad in grads:
            gpu.accumulate([grad])
        gpu.step()

    round()
    driver.finish()
    before = driver.reads
    driver.launches.clear()
    round()
    assert driver.reads == before
    assert set(driver.launches) <= {"copy", "collect", "vacate", "spread", "keys", "merge", "rows", "dense"}


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])
def test_what_is_warmed_up(driver, name, mode):
    """Whatever a trainer launches is among what `warmup` compiles."""
    from numba_opt.cuda import kernels as loops
    from numba_opt.tools.wanted import cuda_kernels, variants

    row = table.row(name)
    call = table.make(row, [SHAPE] * 3)
    optimizer = table.build(row, sparse_update=mode)
    trainer = numba_opt.Trainer(arrays.on_gpu(call.weights), optimizer, clip_global_norm=1.0)
    for index in ("int32", "int64"):
        rows = block([1, 2] * 7)
        rows.rows = rows.rows.astype(index)
        distinct = PTX.sparse(block([1, 2]), distinct=True)
        trainer.step([*PTX.put([rows, csr(index=index)]), distinct])
    for _ in range(3):
        trainer.accumulate(arrays.on_gpu(call.grads))
    trainer.step()
    for grad in (block(), csr()):
        trainer.accumulate(PTX.put([grad] * 3))
    trainer.accumulate(arrays.on_gpu(call.grads))
    trainer.step(PTX.put([csr()] * 3))
    trainer.flush()
    driver.finish()
    used = {program.key for program in driver.covered}
    made = cuda_kernels(variants(optimizer), ["f32"], sparse=True)
    ready = {getattr(loops, kernel)(*args).key for kernel, *args in made}
    assert used <= ready
    exact = {"catch_up", "record", "forget"}
    assert {key[0] for key in used} & exact == (exact if mode == "exact" else set())


def test_many_steps(monkeypatch):
    """The history is of a fixed length: once it is full, all rows catch up. Nothing else can be told."""
    monkeypatch.setattr(numba_opt.cuda.deferred, "ROOM", 3)
    row = table.row("ftml")
    twins = Twins(PTX, row, sparse_update="exact")
    for n in range(8):
        twins.step(block([n % 2, 5], seed=n))
        assert twins.ours.optimizer._deferred[0].recorded == 1 + n % 3
        found, expected = arrays.on_cpu(twins.content(twins.ours)), twins.content(twins.theirs)
        both = [([a[[n % 2, 5]] for a in some if a.dtype != np.int64]) for some in (found, expected)]
        table.assert_bits(*both)
    twins.each(lambda trainer: trainer.flush())
    twins.agree()
