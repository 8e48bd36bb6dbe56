"""Gradients that add up before a step: the same sums on every backend, added in the same order."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

import numba_opt

from .. import table
from .gradients import SHAPE, block, csr, dense, each_form, made
from .pairs import Twins

pytestmark = pytest.mark.filterwarnings("ignore:states in float16")

SHAPES = [(5, 7), (8, 16), 33]
DENSE = dense(seed=7)


def add(twins, grad, distinct=False):
    twins.accumulate(grad, distinct=distinct)
    twins.agree_on_sums()


def step(twins, *grads):
    twins.step(*grads)
    twins.agree()
    assert twins.sums() == [{}, {}]


# ---------------------------------------------------------------- dense


@table.each
@table.each_dtype
def test_dense(backend, row, dtype):
    """With the last gradients handed to the step, and without."""
    twins = Twins(backend, row, SHAPES, dtype)
    for n in range(3):
        for part in range(3):
            grads = table.make(row, SHAPES, dtype, seed=9 * n + part).grads
            if part == 2 and n % 2:
                twins.step(*grads, batch_size=3)
            else:
                ours = twins.given(grads)
                twins.ours.accumulate(ours)
                twins.theirs.accumulate(grads)
                twins.agree_on_sums()
                table.assert_bits(backend.get(ours), grads)
        if not n % 2:
            twins.step(batch_size=3)
        assert twins.sums() == [{}, {}]
        twins.agree()
        assert twins.ours.optimizer.num_update == n + 1


@pytest.mark.parametrize("masters", [False, True])
def test_half_precision(backend, masters):
    """In float32 with master weights."""
    options = {"multi_precision": masters, "trainer": {"clip_global_norm": 1e9}}
    options |= {"wd": 0.0, "rescale_grad": 1.0, "clip_gradient": None, "learning_rate": 0.002}
    row, shapes = table.row("adamax"), [(5, 7), 33]
    twins = Twins(backend, row, shapes, "float16", **options)
    for n in range(2):
        for part in range(3):
            grads = table.make(row, shapes, "float16", seed=3 * n + part).grads
            grads[1] = grads[1].astype("float32") if masters and part == 1 else grads[1]
            twins.accumulate(*grads)
            twins.agree_on_sums()
            assert {total.dtype for total in twins.sums()[1].values()} == {
                np.dtype("f4" if masters else "f2")
            }
        twins.step()
        twins.agree_on_norms()
        twins.agree()


def test_gradients_that_are_missing(backend):
    twins = Twins(backend, table.row("rmsprop"), SHAPES, trainer={"freeze": "2"})
    for pattern in ([1, 0, 1], [1, 1, 0], [0, 0, 0]):
        twins.accumulate(*[g if there else None for g, there in zip(twins.grads, pattern, strict=True)])
    twins.each(lambda trainer: trainer.unfreeze())
    twins.step()
    counts = [entry["count"] for entry in twins.ours.state_dict()["parameters"].values()]
    assert counts == [1, 1, 0]
    twins.agree()


@pytest.mark.parametrize("first", [np.inf, -np.inf, 3e38, -0.0])
def test_sums_that_overflow(backend, first):
    """An infinite sum stays one, and the memory of one does no harm to the next."""
    weight = np.zeros(2, "f4")
    ours = numba_opt.Trainer([backend.put(weight)], "nag")
    theirs = numba_opt.Trainer([weight], numba_opt.NAG(**backend.reference))
    twins = Twins.__new__(Twins)
    twins.backend, twins.row, twins.where = backend, table.row("nag"), [0]
    twins.ours, twins.theirs = ours, theirs
    with np.errstate(all="ignore"):
        for numbers in ([first, first, 1], [-0.0, 2, 3]):
            for number in numbers:
                add(twins, np.array([number, 1], "f4"))
            twins.step()
        twins.agree()


def test_saved(backend, tmp_path):
    twins = Twins(backend, table.row("ftml"), SHAPES)
    others = Twins(backend, table.row("ftml"), SHAPES)
    for _ in range(2):
        twins.accumulate(twins.grads[0], None, twins.grads[2])
    twins.ours.save(tmp_path / "a.safetensors")
    others.ours.load(tmp_path / "a.safetensors")
    others.theirs = twins.theirs
    twins.ours.step(twins.given(twins.grads))
    others.step(*twins.grads)
    twins.agree()
    others.agree()


def test_a_refused_step_keeps_what_was_accumulated(backend):
    rates = {1: -1.0}
    weight = backend.put(np.zeros(3, "f4"))
    options = {"learning_rate": None, "lr_scheduler": lambda n: rates.get(n, 1.0)}
    trainer = numba_opt.Trainer([weight], "nag", momentum=0, **options)
    grad = backend.put(np.ones(3, "f4"))
    trainer.accumulate([grad])
    for batch_size in (-1, 1):
        with pytest.raises(ValueError, match="finite number"):
            trainer.step([grad], batch_size=batch_size)
    rates.clear()
    trainer.step([grad])
    assert backend.get(weight).tolist() == [-2, -2, -2]


def test_a_trainer_whose_first_step_was_refused_is_saved(backend):
    trainer = numba_opt.Trainer([backend.put(np.zeros(3, "f4"))], "nag")
    grad = backend.put(np.ones(3, "f4"))
    trainer.accumulate([grad])
    trainer.optimizer.lr_scheduler = lambda n: -1.0
    with pytest.raises(ValueError, match="finite number"):
        trainer.step([grad])
    assert trainer.skipped_steps == 0
    assert trainer.state_dict()["accumulated"]["0"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------- sparse


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
def test_sparse(backend, grads):
    """Taken by a step, and once more by a step with one more gradient; the next sums have the same memory."""
    twins = Twins(backend, table.row("nag"))
    for last in (None, block([0, 4, 4], seed=5), DENSE, csr()):
        for grad in grads:
            add(twins, grad)
        step(twins, *([] if last is None else [last]))


@pytest.mark.parametrize("distinct", [False, True])
def test_distinct_rows_of_either_width(backend, distinct):
    twins = Twins(backend, table.row("adamax"))
    for index in ("int32", "int64"):
        for rows in ([7, 0, 3], [3, 8]):
            grad = block(rows)
            grad.rows = grad.rows.astype(index)
            add(twins, grad, distinct)
        step(twins)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_other_meanings(backend, mode):
    twins = Twins(backend, table.row("adamax"), sparse_update=mode)
    for n in range(3):
        for grad in (block([n, n, 5], seed=n), csr(seed=n)):
            twins.accumulate(grad)
            if mode != "exact":  # to look would bring all rows up to date
                twins.agree_on_sums()
        twins.step()
    twins.each(lambda trainer: trainer.flush())
    twins.agree()


@pytest.mark.parametrize(("dtype", "masters"), [("float16", False), ("float16", True), ("float64", False)])
def test_other_precisions(backend, dtype, masters):
    twins = Twins(backend, table.row("nag"), dtype=dtype, multi_precision=masters)
    sparse = [block(dtype=dtype), csr(dtype=dtype)]
    for grads in (sparse, [DENSE.astype(dtype), *sparse]):
        for grad in grads:
            add(twins, grad)
        step(twins)


@each_form("dense", "block")
def test_values_of_other_dtypes(backend, form):
    """They are rounded to the weight's precision before they are added, a CSR matrix's entries after."""
    twins = Twins(backend, table.row("nag"))
    if form == "dense":
        add(twins, made(form))
    for dtype in ("float16", "float64"):
        add(twins, block(dtype=dtype))
        add(twins, csr(dtype=dtype if dtype == "float64" else "float32"))
    step(twins)


def test_other_dimensions(backend):
    for shape in ((5,), (4, 2, 3)):
        twins = Twins(backend, table.row("nag"), [shape])
        for seed in range(3):
            add(twins, block([0, 3, 3], shape, seed=seed))
        step(twins)
        add(twins, block([2, 3, 2], shape))
        step(twins, np.ones(shape, "float32"))


def test_blocks_that_grow(backend):
    """And row numbers that are merged."""
    shape = (300, 1)
    twins = Twins(backend, table.row("nag-plain"), [shape])
    for seed in range(4):
        rows = np.random.default_rng(seed).integers(0, 300, 700)
        add(twins, block(rows, shape, seed=seed))
    step(twins)
    add(twins, scipy.sparse.csr_array(dense(shape)))
    add(twins, np.ones(shape, "f4"))
    step(twins, block(rows, shape))


@pytest.mark.parametrize("last", [None, DENSE], ids=["sparse", "dense"])
def test_sparse_sums_are_saved(backend, last, tmp_path):
    """And taken over by whichever side, in the middle of a sum."""
    twins, others = (Twins(backend, table.row("nag"), [SHAPE]) for _ in range(2))
    for grad in [block(), csr(), *([] if last is None else [last])]:
        add(twins, grad)
    for trainer, other in ((twins.ours, others.theirs), (twins.theirs, others.ours)):
        trainer.save(tmp_path / "a.safetensors")
        other.load(tmp_path / "a.safetensors")
    others.theirs.optimizer.use_fused_step = twins.theirs.optimizer.use_fused_step
    others.agree_on_sums()
    for some in (twins, others):
        add(some, block([8, 2]))
        step(some, csr())


def test_a_refused_gradient_leaves_the_sum(device):
    twins = Twins(device, table.row("nag"))
    add(twins, block())
    for bad, message in (
        (device.sparse(block(shape=(9, 5))), r"has shape \(9, 5\); expected \(9, 6\)"),
        (block(), "RowSparse, which is not on a GPU"),
        (csr(), "which is not on a GPU"),
    ):
        for call in (twins.ours.accumulate, twins.ours.step):
            with pytest.raises((TypeError, ValueError), match=message):
                call([bad])
    step(twins)


# ---------------------------------------------------------------- at a GPU's size


@table.each
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_arrays(gpu, row, dtype):
    """Micro-batches add up on the GPU, in float32 for half precision with master weights."""
    shapes = [(5, 7), (8, 16), 3, 0, (1, 130), (300, 64), 100_003]
    twins = Twins(gpu, row, shapes, dtype, multi_precision=True, trainer={"clip_global_norm": 1.0})
    for n in range(3):
        for part in range(4):
            grads = table.make(row, shapes, dtype, seed=4 * n + part).grads
            if part == 3 and n == 1:
                twins.step(*grads, batch_size=4)
            else:
                twins.accumulate(*grads)
        if n != 1:
            twins.agree_on_sums()
            twins.step(batch_size=4)
        twins.agree_on_norms()
    twins.agree(1e-2 if dtype == "float16" else 1e-6)
