"""Sparse gradients of every form: which rows are updated, and with which results."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from numba_opt import RowSparse

from .. import table
from .gradients import ROWS, SHAPE, block, csr, dense, each_form, made, numbers, some_csr
from .pairs import Pair, Twins, conform

pytestmark = pytest.mark.filterwarnings("ignore:states in float16", "ignore:states in bfloat16")

some = pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
each_half = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
each_masters = pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])


@table.each
def test_every_form(backend, row):
    """Both kinds of blocks and a CSR matrix, in one call."""
    pair = Pair(backend, row, [SHAPE] * 6)
    grads = [block(), csr(), block([7, 0, 3])] * 2
    ours = [backend.sparse(grad, distinct=k % 3 == 2) for k, grad in enumerate(grads)]
    for _ in range(2):
        pair.ours.update(pair.indices, pair.weights, ours, pair.states[0])
        pair.theirs.update(pair.indices, pair.expected, grads, pair.states[1])
    pair.check()


@some
@each_form("distinct", "block", "csr-int32", "csr-int64")
def test_one_form(backend, name, form):
    conform(backend, table.row(name), [made(form)], distinct=form == "distinct")


@some
@each_form("distinct", "block", "csr-int32")
def test_double_precision(backend, name, form):
    conform(
        backend, table.row(name), [made(form, dtype="float64")], None, "float64", distinct=form == "distinct"
    )


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@each_half
@each_masters
def test_half_precision(backend, name, dtype, masters):
    conform(backend, table.row(name), [block(dtype=dtype)], dtype=dtype, multi_precision=masters)


@some
@pytest.mark.parametrize("mode", ["lazy", "dense"])
def test_wide_rows(backend, name, mode):
    """Several accesses of 16 bytes for each thread of a warp, and what is left."""
    row, shapes = table.row(name), [(3, 1100), (3, 1024), (3, 1100)]
    full = scipy.sparse.csr_array(np.random.default_rng(0).standard_normal(shapes[1]).astype("f4"))
    grads = [block([2, 0], shapes[0]), full, block([1, 1, 0], shapes[2])]
    conform(backend, row, grads[:1], shapes[:1], steps=1, distinct=True, sparse_update=mode)
    conform(backend, row, grads[1:], shapes[1:], steps=1, sparse_update=mode)


@pytest.mark.parametrize("name", ["adamax", "groupadagrad", "nag-plain"])
@each_form("block", "distinct", "csr-int32")
def test_rounding_by_chance(backend, name, form):
    """The CPU's bits; squares of whole numbers are added exactly, in any order."""
    row = table.row(name)
    options = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3, "clip_gradient": None}
    grad = made(form)
    numbers(grad)[...] = np.round(4 * numbers(grad))
    other = np.round(4 * dense((5, 3), seed=2))
    conform(
        backend, row, [other, grad], [(5, 3), SHAPE], distinct=form == "distinct", tolerance=0.0, **options
    )


def test_every_kind_in_one_call(backend):
    grads = [block(), dense((5, 3)), csr(), block([1, 1], (4, 3)), block([0, 4, 4, 1], (5,)), csr((6, 4))]
    conform(backend, table.row("adamax"), grads, [SHAPE, (5, 3), SHAPE, (4, 3), (5,), (6, 4)])


@pytest.mark.parametrize("name", ["adamax", "groupadagrad"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_columns_in_any_order(backend, name, index):
    """Rising ones, which are bisected, with some that come twice; others, which are looked through."""
    full = list(range(6))
    columns = [
        [0], [5], [0, 0, 0], [5, 5, 2], [1, 3, 3, 3, 4], full, [*full, *full], full[::-1],
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 0],
    ]  # fmt: skip
    conform(backend, table.row(name), [some_csr(columns, index=index)])


def test_int32_rows(backend):
    grad = block()
    conform(backend, table.row("nag"), [RowSparse(grad.rows.astype("int32"), grad.values, SHAPE)])


@pytest.mark.parametrize("count", [0, 1, 3, 70, 1024, 1025, 2048, 2500])
def test_many_rows(backend, count):
    """Any number of keys: a block sorts 1,024 of them, and runs of these are merged."""
    rows = np.random.default_rng(count).integers(0, 300, count)
    conform(backend, table.row("rmsprop"), [block(rows, (300, 1))], [(300, 1)], steps=1, times=1, alone=True)


def test_new_rows_at_each_step(backend):
    twins = Twins(backend, table.row("rmsprop"))
    for seed, rows in enumerate(([1], ROWS, [3, 3, 3], [], ROWS * 3, [5])):
        twins.step(block(rows, seed=seed))
        twins.agree()


def test_rows_that_change_in_place(backend):
    """Row numbers are read at each step, though the arrays are known."""
    twins = Twins(backend, table.row("nag"))
    theirs = block([1, 4])
    (ours,) = twins.given([theirs])
    for rows in ([1, 4], [4, 4], [8, 0]):
        theirs.rows[:] = rows
        backend.write(ours.rows, theirs.rows)
        twins.ours.step([ours])
        twins.theirs.step([theirs])
    twins.agree()


@each_form("block", "csr-int32")
def test_norms(backend, form):
    twins = Twins(backend, table.row("nag"), [SHAPE, (4, 3)], trainer={"clip_global_norm": 0.5})
    twins.step(made(form), twins.grads[1])
    twins.agree_on_norms()
    twins.agree(1e-6)


def test_a_block_is_read_back(backend):
    theirs = block()
    ours = backend.sparse(theirs)
    assert repr(ours) == repr(theirs)
    np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense())
    np.testing.assert_array_equal(ours.coalesce().rows, theirs.coalesce().rows)


def test_another_mode_from_now_on(backend):
    pair = Pair(backend, table.row("adamax"), wd=0.1)
    for mode in ("lazy", "dense", "lazy"):
        pair.each(lambda optimizer, mode=mode: setattr(optimizer, "sparse_update", mode))
        pair.step(block(), strays=False)
        pair.check()


# ---------------------------------------------------------------- every row


@table.each
@pytest.mark.parametrize("distinct", [False, True])
def test_every_row(backend, row, distinct):
    """Rows without a gradient take a step with zero: weight decay, and states that fade."""
    pair = Pair(backend, row, [SHAPE] * 5, sparse_update="dense")
    grads = [block([7, 0, 3]), csr(), block([7, 0, 3] if distinct else ROWS), block([]), csr(seed=2)]
    pair.step(*grads, times=2, distinct=distinct, strays=False)
    pair.step(block([7, 0, 3] if distinct else ROWS), distinct=distinct, strays=False)  # alone
    pair.check()


@some
def test_every_row_of_other_dtypes_and_dimensions(backend, name):
    row = table.row(name)
    grads = [block(dtype="float64"), csr(dtype="float64", index="int64"), block([1, 1], (4, 3), "float64")]
    conform(backend, row, grads, [SHAPE, SHAPE, (4, 3)], "float64", sparse_update="dense")
    if not row.cls.per_row:
        conform(backend, row, [block([0, 4, 4], (5,))], [(5,)], lazy_update=False)


@pytest.mark.parametrize("name", ["nag", "adamax"])
@each_half
@each_masters
def test_every_row_in_half_precision(backend, name, dtype, masters):
    """Sums are rounded as a dense gradient's elements are."""
    grads = [block(dtype=dtype), csr(dtype=dtype)] if dtype == "float16" else [block(dtype=dtype)]
    conform(backend, table.row(name), grads, dtype=dtype, sparse_update="dense", multi_precision=masters)


# ---------------------------------------------------------------- what leads outside


@pytest.mark.parametrize("rising", [True, False])
def test_columns_that_lead_outside(device, rising):
    pair = Pair(device, table.row("nag"))
    bad = some_csr([[-7, 1, 3, 6, 10**6], *[[]] * 8])
    good = some_csr([[1, 3], *[[]] * 8])
    good.data[...] = bad.data[1:3]
    if not rising:
        bad.indices[[0, 4]] = bad.indices[[4, 0]]
    pair.ours.update([0], pair.weights, [device.sparse(bad)], pair.states[0])
    pair.theirs.update([0], pair.expected, [good], pair.states[1])
    pair.check()


def leading_outside(device, form):
    """A gradient that leads outside, on a device, and what there is of it."""
    if form.startswith("csr"):
        matrix = csr()
        starts = np.array([0, 0, 3, *[3] * 7], "int32")
        ours = device.sparse(matrix)
        device.write(ours.indptr, np.array([*matrix.indptr[:4], *[10**6] * 6], "int32"))
        return ours, scipy.sparse.csr_array((matrix.data[:3], matrix.indices[:3], starts), SHAPE)
    given, good = block([2, 1, 5, 3]), block([2, 5])
    good.values[...] = given.values[[0, 2]]
    ours = device.sparse(given, form == "distinct")
    device.write(ours.rows, np.array([2, 2**40, 5, -3]))
    return ours, good


@each_form("block", "distinct", "csr-int32")
def test_numbers_that_lead_outside(device, form):
    """The rest is updated, nothing is touched outside, and the trainer says so."""
    twins = Twins(device, table.row("nag"))
    ours, good = leading_outside(device, form)
    assert not twins.ours.stray_rows
    twins.ours.step([ours])
    twins.theirs.step([good])
    assert twins.ours.stray_rows
    assert not twins.theirs.stray_rows
    table.assert_bits(device.get(twins.content(twins.ours)), twins.content(twins.theirs))


def test_every_row_but_strays(device):
    twins = Twins(device, table.row("nag"), sparse_update="dense", wd=0.1, trainer={"clip_global_norm": 1})
    ours, good = leading_outside(device, "block")
    twins.step(good)
    assert not twins.ours.stray_rows
    twins.ours.step([ours])
    assert twins.ours.stray_rows
    twins.theirs.step([good])
    table.assert_near(device.get(twins.content(twins.ours)), twins.content(twins.theirs), 1e-6)


@pytest.mark.parametrize("dense_first", [False, True])
@each_form("block", "csr-int32")
def test_sums_of_what_leads_outside(device, form, dense_first):
    """The rest is added, nothing is touched outside, and the trainer says so in the end."""
    twins = Twins(device, table.row("nag"))
    ours, good = leading_outside(device, form)
    if dense_first:
        twins.accumulate(dense(seed=7))
    assert not twins.ours.stray_rows
    twins.ours.accumulate([ours])
    twins.theirs.accumulate([good])
    twins.step()
    assert twins.ours.stray_rows
    table.assert_bits(device.get(twins.content(twins.ours)), twins.content(twins.theirs))


# ---------------------------------------------------------------- at a GPU's size


@table.each
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), [("lazy", "float32"), ("dense", "float32"), ("dense", "float16")])
def test_large_blocks(gpu, row, distinct, mode, dtype):
    rng = np.random.default_rng(1)
    rows = rng.permutation(500)[:200] if distinct else rng.integers(0, 500, 3000)
    pair = Pair(gpu, row, [(500, 33)], dtype, sparse_update=mode)
    pair.step(block(rows, (500, 33), dtype), times=3, distinct=distinct, strays=False)
    pair.check(1e-5)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2048, 100_000])
def test_keys_are_sorted(gpu, count):
    """Runs that blocks sort, and merges of these."""
    rows = np.random.default_rng(count).integers(0, 5000, count)
    conform(gpu, table.row("nag"), [block(rows, (5000, 3))], [(5000, 3)], steps=1, times=1, alone=True)


@pytest.mark.parametrize("rising", [True, False])
def test_wide_rows_with_many_entries(gpu, rising):
    """Columns in order or not, some of which come twice."""
    columns = np.random.default_rng(3).integers(0, 3000, (60, 500))
    columns = np.sort(columns, axis=1) if rising else columns
    grad = some_csr(columns.tolist(), (60, 3000))
    conform(gpu, table.row("nag"), [grad], [(60, 3000)], steps=1, times=1, alone=True)


@table.each
@pytest.mark.parametrize("mode", ["lazy", "dense"])
def test_large_matrices(gpu, row, mode):
    matrix = scipy.sparse.random(400, 50, 0.05, "csr", "float32", rng=np.random.default_rng(2))
    pair = Pair(gpu, row, [(400, 50)], sparse_update=mode)
    pair.step(matrix, times=3, strays=False)
    pair.check(1e-5)
