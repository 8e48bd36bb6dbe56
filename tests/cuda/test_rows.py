"""Sparse gradients on a GPU: the rows that the CPU's kernels update, with the same results."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

import numba_opt
from numba_opt import RowSparse

from .. import table
from ..ptx import arrays

SHAPE = (9, 6)
ROWS = [7, 2, 7, 0, 2, *[7] * 9, *[5] * 4]  # some so often that compilers take them four at a time


def block(rows=ROWS, shape=SHAPE, dtype="float32", seed=1):
    rows = np.array(rows, np.int64)
    values = np.random.default_rng(seed).standard_normal((len(rows), *shape[1:])).astype(dtype)
    return RowSparse(rows, values, shape)


def csr(shape=SHAPE, dtype="float32", index="int32", seed=1):
    """With empty rows, a full one, and an entry that comes twice."""
    rng = np.random.default_rng(seed)
    columns = np.array([3, 0, 3, *range(shape[1]), 2], index)
    starts = np.array([0, 0, 3, 3, 3 + shape[1], *[4 + shape[1]] * (shape[0] - 4)], index)
    return scipy.sparse.csr_array((rng.standard_normal(len(columns)).astype(dtype), columns, starts), shape)


def on_gpu(grad, distinct=False, strays=""):
    """A sparse gradient with arrays on the GPU; CuPy's CSR matrices have the same names.

    With `strays`, the meaning that it has for an optimizer, rows that the parameter has not come in addition.
    A CSR matrix has columns that it has not, and, unless "dense" updates every row, an empty one that begins
    before its entries.
    """
    array = arrays.on_gpu
    height, width = grad.shape[0], grad.shape[-1]
    if isinstance(grad, RowSparse):
        rows, values = grad.rows, grad.values
        if strays:
            rows = np.concatenate([rows, np.array([height + 3, -2], rows.dtype)])
            values = np.concatenate([values, np.ones_like(values, shape=(2, *values.shape[1:]))])
        return RowSparse(array(rows), array(values), grad.shape, distinct)
    data, indices, indptr = grad.data, grad.indices, grad.indptr.copy()
    if strays:
        data = np.concatenate([data, np.ones_like(data, shape=2)])
        indices = np.concatenate([indices, np.array([width + 1, -1], indices.dtype)])
        indptr[indptr == grad.nnz] += 2  # in the last row that has entries
        if strays != "dense" and indptr[1] == 0:
            indptr[0] = -1
    parts = {"data": array(data), "indices": array(indices), "indptr": array(indptr)}
    return SimpleNamespace(format="csr", shape=grad.shape, tocsr=None, **parts)


def both(row, grads, shapes=None, dtype="float32", steps=2, distinct=False, times=2, alone=False, **options):
    """Weights and states after some steps, of so many parameters each: on the GPU, and on the CPU.

    Unless they are to be `alone`, another one with wider rows has a gradient like the first one's, and there
    are rows that lead outside.
    """
    shapes = [*(shapes or [SHAPE] * len(grads))]
    if not alone:
        shapes.append((9, 300))
        grads = [*grads, _widened(grads[0], shapes[-1])]
    grads, shapes = grads * times, shapes * times
    options = table.common(row) | options
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    call = table.make(row, shapes, dtype)
    if options.get("multi_precision") or options.get("state_dtype"):
        states = [cpu.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
        call = call._replace(states=states)
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    strays = "" if alone else cpu.sparse_update
    theirs = [arrays.on_gpu(g) if isinstance(g, np.ndarray) else on_gpu(g, distinct, strays) for g in grads]
    for _ in range(steps):
        cpu.update_multi_precision(call.indices, call.weights, grads, call.states)
        gpu.update_multi_precision(call.indices, weights, theirs, states)
    if not alone:  # kernels go another way where there is one tensor
        cpu.update_multi_precision([0], call.weights[:1], grads[:1], call.states[:1])
        gpu.update_multi_precision([0], weights[:1], theirs[:1], states[:1])
    return arrays.on_cpu([weights, states]), table.outputs(call)


def _widened(grad, shape):
    """A gradient of the same form and dtype."""
    if isinstance(grad, RowSparse):
        distinct = len(set(grad.rows)) == len(grad.rows)
        return block(np.unique(grad.rows % shape[0]) if distinct else ROWS, shape, grad.values.dtype)
    if isinstance(grad, np.ndarray):
        return np.ones(shape, grad.dtype)
    return csr(shape, grad.dtype, grad.indices.dtype)


some = pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])


@table.each
def test_every_form(row):
    """Both kinds of blocks and a CSR matrix, in one call."""
    gpu, cpu = table.build(row, **table.common(row)), table.build(row, **table.common(row))
    call = table.make(row, [SHAPE] * 6)
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    grads = [block(), csr(), block([7, 0, 3])] * 2
    ours = [on_gpu(grad, distinct=k % 3 == 2) for k, grad in enumerate(grads)]
    for _ in range(2):
        cpu.update(call.indices, call.weights, grads, call.states)
        gpu.update(call.indices, weights, ours, states)
    table.assert_alike(row, arrays.on_cpu([weights, states]), table.outputs(call))


@some
@pytest.mark.parametrize("mode", ["lazy", "dense"])
def test_wide_rows(name, mode):
    """Several accesses of 16 bytes for each thread of a warp, and what is left."""
    row, shapes = table.row(name), [(3, 1100), (3, 1024), (3, 1100)]
    full = scipy.sparse.csr_array(np.random.default_rng(0).standard_normal(shapes[1]).astype("f4"))
    grads = [block([2, 0], shapes[0]), full, block([1, 1, 0], shapes[2])]
    table.assert_alike(row, *both(row, grads[:1], shapes[:1], steps=1, distinct=True, sparse_update=mode))
    table.assert_alike(row, *both(row, grads[1:], shapes[1:], steps=1, sparse_update=mode))


@some
@pytest.mark.parametrize("distinct", [False, True])
def test_double_precision(name, distinct):
    row = table.row(name)
    grad = block([7, 0, 3] if distinct else ROWS, dtype="float64")
    table.assert_alike(row, *both(row, [grad, csr(dtype="float64")], dtype="float64", distinct=distinct))


@some
def test_csr_with_64_bit_indices(name):
    row = table.row(name)
    table.assert_alike(row, *both(row, [csr(index="int64")]))


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("masters", [False, True])
def test_half_precision(name, dtype, masters):
    import ml_dtypes  # noqa: F401  bfloat16 needs it

    row = table.row(name)
    found = both(row, [block(dtype=dtype)], dtype=dtype, multi_precision=masters)
    table.assert_alike(row, *found, tolerance=1e-6 if masters else 1e-2)


@pytest.mark.parametrize("name", ["adamax", "groupadagrad", "nag-plain"])
@pytest.mark.parametrize("form", ["keys", "distinct", "csr"])
def test_rounding_by_chance(name, form):
    """The CPU's bits; squares of whole numbers are added exactly, in any order."""
    row = table.row(name)
    options = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3}
    grad = csr() if form == "csr" else block([7, 0, 3] if form == "distinct" else ROWS)
    values = grad.data if form == "csr" else grad.values
    values[...] = np.round(4 * values)
    other = np.round(4 * np.random.default_rng(2).standard_normal((5, 3))).astype("float32")
    shapes = [(5, 3), SHAPE]
    found = both(row, [other, grad], shapes, distinct=form == "distinct", clip_gradient=None, **options)
    table.assert_bits(*found)


def test_every_kind_in_one_call():
    row = table.row("adamax")
    dense = np.random.default_rng(2).standard_normal((5, 3)).astype("float32")
    grads = [block(), dense, csr(), block([1, 1], (4, 3)), block([0, 4, 4, 1], (5,)), csr((6, 4))]
    shapes = [SHAPE, (5, 3), SHAPE, (4, 3), (5,), (6, 4)]
    table.assert_alike(row, *both(row, grads, shapes))


@pytest.mark.parametrize(
    ("count", "merges"), [(0, 0), (1, 0), (3, 0), (70, 0), (1024, 0), (1025, 1), (2048, 1), (2500, 2)]
)
def test_many_parts(driver, count, merges):
    """Any number of keys: a block sorts 1,024 of them, and runs of these are merged."""
    row = table.row("rmsprop")
    rows = np.random.default_rng(count).integers(0, 300, count).tolist()
    driver.launches.clear()
    table.assert_alike(row, *both(row, [block(rows, (300, 1))], [(300, 1)], steps=1, times=1, alone=True))
    assert [name for name in driver.launches if name in ("keys", "merge")] == ["keys"] + ["merge"] * merges


def some_csr(columns, shape=SHAPE, index="int32"):
    """A CSR matrix with these columns in each row."""
    starts = np.cumsum([0, *map(len, columns)]).astype(index)
    data = np.random.default_rng(3).standard_normal(starts[-1]).astype("float32")
    flat = np.array([column for row in columns for column in row], index)
    matrix = scipy.sparse.csr_array(shape, dtype="float32")
    matrix.data, matrix.indices, matrix.indptr = data, flat, starts
    return matrix


@pytest.mark.parametrize("name", ["adamax", "groupadagrad"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_columns_in_any_order(name, index):
    """Rising ones, which are bisected, with some that come twice; others, which are looked through."""
    full = list(range(6))
    columns = [
        [0], [5], [0, 0, 0], [5, 5, 2], [1, 3, 3, 3, 4], full, [*full, *full], full[::-1],
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 0],
    ]  # fmt: skip
    row = table.row(name)
    table.assert_alike(row, *both(row, [some_csr(columns, index=index)]))


@pytest.mark.parametrize("rising", [True, False])
def test_columns_that_lead_outside(rising):
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    bad = some_csr([[-7, 1, 3, 6, 10**6], *[[]] * 8])
    good = some_csr([[1, 3], *[[]] * 8])
    good.data[...] = bad.data[1:3]
    if not rising:
        bad.indices[[0, 4]] = bad.indices[[4, 0]]
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    table.build(row).update([0], weights, [on_gpu(bad)], states)
    table.build(row).update([0], call.weights, [good], call.states)
    table.assert_bits(arrays.on_cpu([weights, states]), table.outputs(call))


@pytest.mark.parametrize("rising", [True, False])
def test_how_often_columns_are_read(driver, rising):
    """Once to see whether they rise, and then for each element a few times; if they don't, all of them."""
    row, width, entries = table.row("nag-plain"), 192, 64
    matrix = some_csr([[*range(0, width, 3)][:: 1 if rising else -1]], (1, width))
    call = table.make(row, [(1, width)])
    weights, grad = arrays.on_gpu(call.weights), on_gpu(matrix)
    table.build(row).update([0], weights, [grad], [None])
    arrays.on_cpu(weights)
    first = grad.indices.address
    places = np.concatenate([entry[1] for entry in driver.last.log.entries])
    reads = places[(first <= places) & (places < first + 4 * entries)]
    if rising:
        assert len(reads) <= 2 * entries + width * (6 + 3)
    else:
        assert len(reads) >= entries * width


def test_int32_rows():
    row = table.row("nag")
    grad = block()
    table.assert_alike(row, *both(row, [RowSparse(grad.rows.astype("int32"), grad.values, SHAPE)]))


@pytest.mark.parametrize("form", ["keys", "distinct", "csr"])
def test_numbers_that_lead_outside(form):
    """The rest is updated, nothing is touched outside, and the trainer says so."""
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    given, good = block([2, 1, 5, 3]), block([2, 5])
    good.values[...] = given.values[[0, 2]]
    ours = on_gpu(given, form == "distinct")
    ours.rows.array[:] = [2, 40, 5, -3]
    if form == "csr":
        matrix = csr()
        good = scipy.sparse.csr_array(
            (matrix.data[:3], matrix.indices[:3], np.array([0, 0, 3, *[3] * 7], "int32")), SHAPE
        )
        ours = on_gpu(matrix)
        ours.indptr.array[4:] = 10**6
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row))
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    assert not gpu.stray_rows
    gpu.step([ours])
    cpu.step([good])
    assert gpu.stray_rows
    assert not cpu.stray_rows
    table.assert_bits(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()))


@pytest.mark.parametrize("make", [block, csr], ids=["block", "csr"])
def test_norms(make):
    row = table.row("nag")
    call = table.make(row, [SHAPE, (4, 3)])
    options = {"clip_global_norm": 0.5}
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row), **options)
    cpu = numba_opt.Trainer(call.weights, table.build(row), **options)
    gpu.step([on_gpu(make()), arrays.on_gpu(call.grads[1])])
    cpu.step([make(), call.grads[1]])
    assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-12)
    table.assert_near(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()), 1e-6)


def test_new_rows_at_each_step():
    row = table.row("rmsprop")
    call = table.make(row, [SHAPE])
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row))
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    for seed, rows in enumerate(([1], ROWS, [3, 3, 3], [], ROWS * 3, [5])):
        gpu.step([on_gpu(block(rows, seed=seed))])
        cpu.step([block(rows, seed=seed)])
        table.assert_bits(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()))


def test_rows_that_change_in_place():
    """Row numbers are read at each step, though the arrays are known."""
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row))
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    ours, theirs = on_gpu(block([1, 4])), block([1, 4])
    for numbers in ([1, 4], [4, 4], [8, 0]):
        ours.rows.array[:] = theirs.rows[:] = numbers
        gpu.step([ours])
        cpu.step([theirs])
    table.assert_bits(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()))


def test_a_block_is_read_back():
    theirs = block()
    ours = on_gpu(theirs)
    assert repr(ours) == repr(theirs)
    np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense())
    np.testing.assert_array_equal(ours.coalesce().rows, theirs.coalesce().rows)


# ---------------------------------------------------------------- dense


@table.each
@pytest.mark.parametrize("distinct", [False, True])
def test_every_row(row, distinct):
    """Rows without a gradient take a step with zero: weight decay, and states that fade."""
    options = table.common(row) | {"sparse_update": "dense"}
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    call = table.make(row, [SHAPE] * 5)
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    grads = [block([7, 0, 3]), csr(), block([7, 0, 3] if distinct else ROWS), block([]), csr(seed=2)]
    ours = [on_gpu(grad, distinct) for grad in grads]
    for _ in range(2):
        cpu.update(call.indices, call.weights, grads, call.states)
        gpu.update(call.indices, weights, ours, states)
    table.assert_alike(row, arrays.on_cpu([weights, states]), table.outputs(call))


@some
def test_every_row_of_other_dtypes_and_dimensions(name):
    row = table.row(name)
    options = {"sparse_update": "dense"}
    grads = [block(dtype="float64"), csr(dtype="float64", index="int64"), block([1, 1], (4, 3), "float64")]
    table.assert_alike(row, *both(row, grads, [SHAPE, SHAPE, (4, 3)], "float64", **options))
    if not row.cls.per_row:
        table.assert_alike(row, *both(row, [block([0, 4, 4], (5,))], [(5,)], lazy_update=False))


@pytest.mark.parametrize("name", ["nag", "adamax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("masters", [False, True])
def test_every_row_in_half_precision(name, dtype, masters):
    """Sums are rounded as a dense gradient's elements are."""
    row = table.row(name)
    grads = [block(dtype=dtype), csr(dtype=dtype)] if dtype == "float16" else [block(dtype=dtype)]
    options = {"sparse_update": "dense", "multi_precision": masters}
    table.assert_alike(row, *both(row, grads, dtype=dtype, **options))


def test_every_row_but_strays():
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    options = {"sparse_update": "dense", "wd": 0.1}
    given, good = block([2, 1, 5, 3]), block([2, 5])
    good.values[...] = given.values[[0, 2]]
    ours = on_gpu(given)
    gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), table.build(row, **options), clip_global_norm=1)
    cpu = numba_opt.Trainer(call.weights, table.build(row, **options), clip_global_norm=1)
    gpu.step([on_gpu(good)])
    cpu.step([good])
    assert not gpu.stray_rows
    ours.rows.array[:] = [2, 40, 5, -3]
    gpu.step([ours])
    assert gpu.stray_rows
    cpu.step([good])
    table.assert_near(arrays.on_cpu(list(gpu.params.values())), list(cpu.params.values()), 1e-6)


def test_another_mode_from_now_on():
    row = table.row("adamax")
    call = table.make(row, [SHAPE])
    gpu, cpu = table.build(row, wd=0.1), table.build(row, wd=0.1)
    weights, states, grad = arrays.on_gpu(call.weights), arrays.on_gpu(call.states), on_gpu(block())
    for mode in ("lazy", "dense", "lazy"):
        gpu.sparse_update = cpu.sparse_update = mode
        gpu.update([0], weights, [grad], states)
        cpu.update([0], call.weights, [block()], call.states)
        table.assert_bits(arrays.on_cpu([weights, states]), table.outputs(call))


# ---------------------------------------------------------------- errors


def changed(**others):
    grad = on_gpu(csr())
    for name, array in others.items():
        setattr(grad, name, arrays.on_gpu(array))
    return grad


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (lambda: on_gpu(block(shape=(9, 5))), ValueError, r"has shape \(9, 5\); expected \(9, 6\)"),
        (lambda: block(), TypeError,
         "gradient of parameter 0 is a numba_opt.cpu.row_sparse.RowSparse.*not on a GPU"),
        (lambda: csr(), TypeError, "gradient of parameter 0 is a scipy.sparse.*not on a GPU"),
        (lambda: on_gpu(block(dtype="int32")), TypeError, "values of RowSparse are int32"),
        (lambda: RowSparse(arrays.on_gpu(np.zeros(2, "u4")), arrays.on_gpu(np.zeros((2, 6))), SHAPE),
         TypeError, "rows of gradient of parameter 0 are uint32; expected int32 or int64"),
        (lambda: changed(indptr=np.zeros(3, "i4")), ValueError,
         "indptr of gradient .* has length 3; expected 10"),
        (lambda: changed(indices=np.zeros(9, "i8")), TypeError, "int64 and int32; expected the same"),
        (lambda: changed(data=np.zeros(9, "i4")), TypeError, "data of gradient of parameter 0 are int32"),
        (lambda: SimpleNamespace(format="coo", shape=SHAPE, tocsr=None), TypeError,
         "expected RowSparse or a CSR matrix"),
    ],
)  # fmt: skip
def test_bad_gradients(driver, grad, error, message):
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    optimizer = table.build(row)
    driver.launches.clear()
    with pytest.raises(error, match=message):
        optimizer.update([0], weights, [grad()], states)
    assert not driver.launches
    assert optimizer.num_update == 0


def test_gradients_that_share_memory_with_weights():
    row = table.row("nag")
    call = table.make(row, [(2, 6)])
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    grad = RowSparse(arrays.on_gpu(np.array([0, 1])), weights[0], (2, 6))
    with pytest.raises(ValueError, match="shares memory with gradient of parameter 0"):
        table.build(row).update([0], weights, [grad], states)
