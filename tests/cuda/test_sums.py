"""Sparse gradients that add up on a GPU: the CPU's sums, in the CPU's order, without the host waiting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

import numba_opt
from numba_opt import RowSparse

from .. import table
from ..ptx import arrays
from .test_rows import SHAPE, block, csr, on_gpu

DENSE = np.random.default_rng(7).standard_normal(SHAPE).astype("float32")


def twins(name="nag", shape=SHAPE, dtype="float32", **options):
    row = table.row(name)
    call = table.make(row, [shape], dtype)
    make = table.build
    options = table.common(row) | options
    return (
        numba_opt.Trainer(arrays.on_gpu(call.weights), make(row, **options)),
        numba_opt.Trainer(call.weights, make(row, **options)),
    )


def given(grad, distinct=False):
    return arrays.on_gpu(grad) if isinstance(grad, np.ndarray) else on_gpu(grad, distinct)


def held(total):
    """What a sum consists of."""
    return [total.rows, total.values] if isinstance(total, RowSparse) else [total]


def add(trainers, grad, distinct=False):
    gpu, cpu = trainers
    gpu.accumulate([given(grad, distinct)])
    cpu.accumulate([grad])
    ours, theirs = gpu._totals[0], cpu._totals[0]
    assert isinstance(ours, RowSparse) == isinstance(theirs, RowSparse)
    ours = ours.to_host() if isinstance(ours, RowSparse) else ours.array
    table.assert_bits(held(ours), held(theirs))


def step(trainers, *grads):
    gpu, cpu = trainers
    gpu.step(*[[given(grad)] for grad in grads])
    cpu.step(*[[grad] for grad in grads])
    agree(trainers)


def agree(trainers):
    found, expected = (
        [*trainer.params.values(), *table.leaves(list(trainer.states.values()))] for trainer in trainers
    )
    table.assert_bits(arrays.on_cpu(found), expected)
    assert trainers[0].optimizer.num_update == trainers[1].optimizer.num_update
    assert not trainers[0].stray_rows


@pytest.mark.parametrize(
    "grads",
    [
        [block(), csr(), block([3, 1], seed=3)],
        [csr(index="int64"), csr(seed=2), block([])],
        [block(), DENSE, block(seed=2), csr()],
        [DENSE, csr(), block()],
        [block([1, 1, 1]), block([1, 8, 1]), csr(), DENSE],
    ],
    ids=["sparse", "csr", "then dense", "dense", "dense last"],
)
def test_sums(grads):
    """Taken by a step, and once more by a step with one more gradient; the next sums have the same memory."""
    trainers = twins()
    for last in (None, block([0, 4, 4], seed=5), DENSE, csr()):
        for grad in grads:
            add(trainers, grad)
        step(trainers, *([] if last is None else [last]))


@pytest.mark.parametrize("distinct", [False, True])
def test_distinct_rows_of_either_width(distinct):
    trainers = twins("adamax")
    for index in ("int32", "int64"):
        for rows in ([7, 0, 3], [3, 8]):
            grad = block(rows)
            grad.rows = grad.rows.astype(index)
            add(trainers, grad, distinct)
        step(trainers)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_sums_in_other_meanings(mode):
    trainers = twins("adamax", sparse_update=mode)
    for n in range(3):
        add(trainers, block([n, n, 5], seed=n))
        add(trainers, csr(seed=n))
        for trainer in trainers:
            trainer.step()
    for trainer in trainers:
        trainer.flush()
    agree(trainers)


@pytest.mark.filterwarnings("ignore:states in float16")
@pytest.mark.parametrize(("dtype", "masters"), [("float16", False), ("float16", True), ("float64", False)])
def test_sums_in_other_precisions(dtype, masters):
    trainers = twins(dtype=dtype, multi_precision=masters)
    dense = DENSE.astype(dtype)
    for grads in ([block(dtype=dtype), csr(dtype=dtype)], [dense, block(dtype=dtype), csr(dtype=dtype)]):
        for grad in grads:
            add(trainers, grad)
        step(trainers)


@pytest.mark.parametrize("onto", [None, DENSE], ids=["sparse", "dense"])
def test_values_of_other_dtypes(onto):
    """They are rounded to the weight's precision before they are added, a CSR matrix's entries after."""
    trainers = twins()
    if onto is not None:
        add(trainers, onto)
    for dtype in ("float16", "float64"):
        add(trainers, block(dtype=dtype))
        add(trainers, csr(dtype=dtype if dtype == "float64" else "float32"))
    step(trainers)


def test_sums_of_other_dimensions():
    for shape in ((5,), (4, 2, 3)):
        trainers = twins(shape=shape)
        for seed in range(3):
            add(trainers, block([0, 3, 3], shape, seed=seed))
        step(trainers)
        add(trainers, block([2, 3, 2], shape))
        step(trainers, np.ones(shape, "float32"))


def test_blocks_that_grow_and_keys_that_are_merged():
    trainers = twins("nag-plain", (300, 1))
    for seed in range(4):
        rows = np.random.default_rng(seed).integers(0, 300, 700)
        add(trainers, block(rows, (300, 1), seed=seed))
    step(trainers)
    full = scipy.sparse.csr_array(np.random.default_rng(0).standard_normal((300, 1)).astype("f4"))
    add(trainers, full)
    add(trainers, np.ones((300, 1), "f4"))
    step(trainers, block(rows, (300, 1)))


def test_nobody_waits(driver):
    """Once memory is there, the host reads nothing, and sparse sums are launches and nothing else."""
    trainers = twins()
    gpu, grads = trainers[0], [given(block()), given(csr()), given(DENSE)]

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


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("form", ["block", "csr"])
def test_sums_of_what_leads_outside(form, dense):
    """The rest is added, nothing is touched outside, and the trainer says so in the end."""
    gpu, cpu = twins()
    ours, good = given(block([2, 1, 5, 3])), block([2, 5])
    good.values[...] = block([2, 1, 5, 3]).values[[0, 2]]
    ours.rows.array[:] = [2, 40, 5, -3]
    if form == "csr":
        matrix = csr()
        starts = np.array([0, 0, 3, *[3] * 7], "int32")
        good = scipy.sparse.csr_array((matrix.data[:3], matrix.indices[:3], starts), SHAPE)
        ours = given(matrix)
        ours.indptr.array[4:] = 10**6
    if dense:
        gpu.accumulate([given(DENSE)])
        cpu.accumulate([DENSE])
    assert not gpu.stray_rows
    gpu.accumulate([ours])
    cpu.accumulate([good])
    gpu.step()
    cpu.step()
    assert gpu.stray_rows
    table.assert_bits(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()))


@pytest.mark.parametrize("dense", [False, True])
def test_sparse_sums_are_saved(dense, tmp_path):
    """And taken over by whichever side, in the middle of a sum."""
    trainers, others = twins(), twins()
    for grad in [block(), csr(), *([DENSE] if dense else [])]:
        add(trainers, grad)
    for trainer, other in zip(trainers, reversed(others), strict=True):
        trainer.save(tmp_path / "a.safetensors")
        other.load(tmp_path / "a.safetensors")
    table.assert_bits(held(trainers[1]._totals[0]), held(others[1]._totals[0]))
    for pair in (trainers, others):
        add(pair, block([8, 2]))
        step(pair, csr())


def test_a_refused_gradient_leaves_the_sum():
    trainers = twins()
    add(trainers, block())
    gpu = trainers[0]
    for bad, message in (
        (on_gpu(block(shape=(9, 5))), r"has shape \(9, 5\); expected \(9, 6\)"),
        (block(), "RowSparse, which is not on a GPU"),
        (csr(), "which is not on a GPU"),
    ):
        for call in (gpu.accumulate, gpu.step):
            with pytest.raises((TypeError, ValueError), match=message):
                call([bad])
    step(trainers)
