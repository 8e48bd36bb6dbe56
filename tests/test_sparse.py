"""Sparse gradients: which rows move and by how much, whatever the gradient is made of.

Gradients are small multiples of 1/8 wherever parts are summed, so that every order of summation gives the
same bits and nothing but the rule's own arithmetic is compared.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as ss
from hypothesis import given
from hypothesis import strategies as st

import numba_opt
from numba_opt import RowSparse, Trainer, lr_scheduler
from numba_opt.cpu import threads

from . import table

GOLDEN = Path(__file__).parent / "golden"
HEIGHT, WIDTH = 12, 5
EPS = {"float32": 2**-23, "float64": 2**-52}

each_fused = pytest.mark.parametrize("fused", [True, False], ids=["fused", "arrays"])
each_mode = pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])


class Run:
    """A weight of its own, with its state and an optimizer."""

    def __init__(self, row, weight, fused=True, **options):
        self.row = row
        self.optimizer = table.build(row, use_fused_step=fused, **options)
        self.weight = weight.copy()
        self.state = self.optimizer.create_state_multi_precision(0, self.weight)

    def step(self, grad):
        self.optimizer.update_multi_precision([0], [self.weight], [grad], [self.state])
        return self

    def on_rows(self, touched, values):
        """A dense step of some rows only."""
        arrays = [self.weight, *table.leaves(self.state)]
        parts = [array[touched] for array in arrays]
        state = rebuilt(self.state, iter(parts[1:]))
        self.optimizer.update_multi_precision([0], [parts[0]], [values], [state])
        for array, part in zip(arrays, parts, strict=True):
            array[touched] = part

    def flush(self):
        self.optimizer.flush([0], [self.weight], [self.state])
        return self

    def arrays(self):
        """The weight and its states, without last_step."""
        return [a for a in (self.weight, *table.leaves(self.state)) if a.dtype != np.int64]


def rebuilt(state, parts):
    """A state of the same form with other arrays."""
    if isinstance(state, tuple):
        return tuple(rebuilt(part, parts) for part in state)
    return None if state is None else next(parts)


def eighths(rng, shape, dtype="float32"):
    """Multiples of 1/8, none of them zero."""
    return ((rng.integers(1, 24, shape) * rng.choice([-1, 1], shape)) / 8).astype(dtype)


def weight_of(rng, dtype="float32", shape=(HEIGHT, WIDTH)):
    return rng.standard_normal(shape).astype(dtype)


def block(rng, rows, dtype="float32", shape=(HEIGHT, WIDTH)):
    return RowSparse(np.asarray(rows, np.int64), eighths(rng, (len(rows), *shape[1:]), dtype), shape)


def raw_csr(data, indices, indptr, shape, index="i4", kind=ss.csr_array):
    """A CSR matrix with just these arrays; scipy's constructor would put some in order."""
    matrix = kind(shape, dtype=data.dtype)
    matrix.data = data
    matrix.indices, matrix.indptr = np.asarray(indices, index), np.asarray(indptr, index)
    return matrix


def csr_from(parts, width, dtype="float32", index="i4", kind=ss.csr_array, garbage=0):
    """A CSR matrix of rows, each a list of (column, number); `garbage` entries lie behind the last one."""
    flat = [entry for part in parts for entry in part]
    indptr = np.cumsum([0, *map(len, parts)])
    data = np.array([number for _, number in flat] + [1e6] * garbage, dtype)
    columns = [column for column, _ in flat] + [0] * garbage
    return raw_csr(data, columns, indptr, (len(parts), width), index, kind)


def plain_sum(parts, width, dtype):
    """The same in pure Python: the touched rows and the sums of their entries."""
    touched = [r for r, part in enumerate(parts) if part]
    dense = np.zeros((len(touched), width), dtype)
    for k, r in enumerate(touched):
        for column, number in parts[r]:
            dense[k, column] += dtype(number) if callable(dtype) else number
    return np.array(touched, np.int64), dense


def assert_same(found, expected, per_row=False):
    """To the bit, or where a mean square was summed in another order within a few units in the last place."""
    if not per_row:
        return table.assert_bits(found, expected)
    for a, b in zip(table.leaves(found), table.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        eps = EPS.get(a.dtype.name, 2**-7)
        table.assert_near([a], [b], 8 * eps)
    return None


# ---------------------------------------------------------------- what MXNet does


GOLDEN_SPARSE = json.loads((GOLDEN / "cases.json").read_text())["sparse"]


@pytest.mark.parametrize("form", ["RowSparse", "reversed", "csr", "csr entries", "dense"])
@each_fused
@pytest.mark.parametrize("case", GOLDEN_SPARSE, ids=lambda case: case["id"])
def test_golden(case, fused, form):
    """MXNet's own gradients are sorted; so are ours, or backwards, or without their last column's zeros."""
    shape = tuple(case["shape"])
    optimizer = numba_opt.create(case["optimizer"], use_fused_step=fused, **case["kwargs"])
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as arrays:
        weight = arrays[f"{case['inputs']}/weight"].copy()
        state = optimizer.create_state(0, weight)
        for step in range(case["steps"]):
            rows, values = (arrays[f"{case['inputs']}/{part}{step}"] for part in ("rows", "values"))
            grad = RowSparse(rows, values, shape)
            indptr = np.zeros(shape[0] + 1, int)
            indptr[rows + 1] = shape[1]
            columns = np.tile(np.arange(shape[1]), len(rows))
            if form == "reversed":
                grad = RowSparse(rows[::-1], values[::-1], shape)
            elif form == "csr":
                grad = raw_csr(values.ravel(), columns, np.cumsum(indptr), shape)
            elif form == "csr entries":
                backwards = values[:, ::-1].ravel()
                grad = raw_csr(backwards, columns[::-1], np.cumsum(indptr), shape, "i8")
                grad.indices = np.tile(np.arange(shape[1])[::-1], len(rows))
            elif form == "dense":
                grad = grad.to_dense()
            optimizer.update([0], [weight], [grad], [state])
            for found, key in ((weight, "weight"), (state, "history")):
                golden = arrays[f"{case['id']}/{key}"]
                scale = np.abs(golden[: step + 1]).max()
                table.assert_near([found], [golden[step]], 1e-6, f"{key} step {step}", scale)
    assert optimizer.num_update == case["num_update"]


# ---------------------------------------------------------------- lazy rows

SCHEDULE = [[0, 3, 4, 11], [], [5, 2, 5, 5, 0, 2], [11], list(range(HEIGHT)), [7, 7], [3, 4]]


def check_lazy(row, weight, fused, rng, gradient="float32", **options):
    """Each step is the optimizer's own step on the touched rows, and no other row changes a bit."""
    options = table.common(row) | options
    found, expected = (Run(row, weight, fused, **options) for _ in range(2))
    for rows in SCHEDULE:
        grad = block(rng, rows, gradient, weight.shape)
        before = table.content(grad.rows, grad.values)
        untouched = np.setdiff1d(np.arange(len(weight)), rows)
        others = [array[untouched].copy() for array in found.arrays()]
        found.step(grad)
        summed = grad.coalesce()
        small = weight.dtype if options.get("multi_precision") else found.weight.dtype
        expected.on_rows(summed.rows, summed.values.astype(small))
        assert_same(found.arrays(), expected.arrays(), row.cls.per_row)
        table.assert_bits([array[untouched] for array in found.arrays()], others)
        assert table.content(grad.rows, grad.values) == before
    assert found.optimizer._index_update_count == expected.optimizer._index_update_count


LAZY = [
    *((row.id, dtype, False) for row in table.TABLE for dtype in ("float32", "float64")),
    *((name, dtype, True) for name in ("nag", "ftml", "groupadagrad") for dtype in ("float16", "bfloat16")),
    ("nag", "float16", False),
]


@each_fused
@pytest.mark.parametrize(("name", "dtype", "masters"), LAZY)
@pytest.mark.filterwarnings("ignore:states in float16")
def test_lazy_rows(name, dtype, masters, fused):
    rng = np.random.default_rng(1)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weight = weight_of(rng, dtype)
    check_lazy(table.row(name), weight, fused, rng, dtype, multi_precision=masters)


@each_fused
@table.each
def test_touched_rows_follow_the_formula(row, fused):
    """Weight decay, clipping and rescaling included, after the formulas of the docstrings."""
    rng = np.random.default_rng(4)
    weight = weight_of(rng, "float64")
    touched = np.array([1, 4, 8])
    options = table.common(row)
    run = Run(row, weight, fused, **options)
    grads = [block(rng, touched, "float64") for _ in range(5)]
    for grad in grads:
        run.step(grad)
    expected = table.reference(row, weight[touched], [grad.values for grad in grads], **options)
    table.assert_near([array[touched] for array in run.arrays()], expected, 1e-13)
    rest = np.setdiff1d(np.arange(HEIGHT), touched)
    table.assert_bits([run.weight[rest]], [weight[rest]])
    assert all((array[rest] == 0).all() for array in run.arrays()[1:])


@each_fused
def test_explicit_zeros_touch_a_row(fused):
    """It takes its step with weight decay; a row without an entry does not."""
    row = table.row("nag-plain")
    weight = np.ones((4, 3))
    for grad in (
        RowSparse([2], np.zeros((1, 3)), (4, 3)),
        csr_from([[], [], [(1, 0.0)], []], 3, "f8"),
        csr_from([[], [], [(0, 0.0), (1, 0.0), (2, 0.0)], []], 3, "f8"),
        csr_from([[], [], [(1, 2.0), (1, -2.0)], []], 3, "f8"),
    ):
        run = Run(row, weight, fused, wd=0.5, learning_rate=0.5).step(grad)
        np.testing.assert_array_equal(run.weight, [[1] * 3, [1] * 3, [0.75] * 3, [1] * 3])


@each_fused
@table.each_dtype
def test_groupadagrad_sparse_equals_dense(dtype, fused):
    """Rows without a gradient stay in the dense meaning too: their mean square is 0."""
    rng = np.random.default_rng(5)
    row, weight = table.row("groupadagrad"), weight_of(rng, dtype, (40, 33))
    sparse, csr, dense = (Run(row, weight, fused, clip_gradient=1.5) for _ in range(3))
    for n in (3, 40, 0, 17, 60, 1):
        grad = block(rng, rng.integers(0, 40, n), dtype, weight.shape)
        sparse.step(grad)
        csr.step(ss.csr_array(grad.to_dense()))
        dense.step(grad.to_dense())
        for run in (sparse, csr):
            for a, b in zip(run.arrays(), dense.arrays(), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=4 * EPS[dtype] * np.abs(b).max())


@each_fused
def test_mean_square_divides_by_the_full_width(fused):
    run = Run(table.row("groupadagrad"), np.zeros((3, 8)), fused, epsilon=0.0, learning_rate=1.0)
    run.step(csr_from([[], [(5, 4.0)], []], 8, "f8"))
    np.testing.assert_array_equal(run.state, [[0], [2], [0]])  # 16 / 8
    assert run.weight[1, 5] == -4 / np.sqrt(2)
    assert np.count_nonzero(run.weight) == 1


@each_fused
@pytest.mark.parametrize("name", ["groupadagrad", "ftml"])
def test_duplicates_are_summed_before_squaring(name, fused):
    rng = np.random.default_rng(6)
    weight = weight_of(rng, "float64", (4, 2))
    whole = [[], [(0, 3.0), (1, -1.5)], [], [(1, 0.5)]]
    split = [[], [(0, 4.0), (1, -1.0), (0, -1.0), (1, -0.5)], [], [(1, 0.25), (1, 0.25)]]
    runs = [
        Run(table.row(name), weight, fused).step(grad)
        for grad in (
            csr_from(whole, 2, "f8"),
            csr_from(split, 2, "f8"),
            RowSparse([1, 3, 1, 3], [[4, -1], [0, 0.25], [-1.0, -0.5], [0, 0.25]], (4, 2)),
        )
    ]
    for run in runs[1:]:
        assert_same(run.arrays(), runs[0].arrays(), per_row=True)


# ---------------------------------------------------------------- every form of a gradient


def random_parts(rng, height, width, most=6, unique=False):
    parts = []
    for _ in range(height):
        n = int(rng.integers(0, min(most, width) + 1))
        columns = rng.permutation(width)[:n] if unique else rng.integers(0, width, n if width else 0)
        parts.append([(int(c), float(x)) for c, x in zip(columns, eighths(rng, len(columns)), strict=True)])
    return parts


def full(rng, columns, rows=(0, 1, 5)):
    """Some rows with an entry at each of some columns."""
    return [
        [(int(c), float(x)) for c, x in zip(columns, eighths(rng, len(columns)), strict=True)]
        if r in rows
        else []
        for r in range(HEIGHT)
    ]


def uneven(rng):
    """As many entries as if the touched rows were full, columns as if sorted, but rows of other lengths."""
    longer = full(rng, [*range(WIDTH), 0, 1], rows=[2])
    shorter = full(rng, range(2, WIDTH), rows=[3])
    return [a or b for a, b in zip(longer, shorter, strict=True)]


FORMS = {
    "sorted": lambda rng: [sorted(part) for part in random_parts(rng, HEIGHT, WIDTH, unique=True)],
    "unsorted": lambda rng: random_parts(rng, HEIGHT, WIDTH, unique=True),
    "duplicates": lambda rng: random_parts(rng, HEIGHT, WIDTH, most=WIDTH),
    "many duplicates": lambda rng: full(rng, list(range(WIDTH)) * 7),
    "explicit zeros": lambda rng: [[(c, 0.0) for c, _ in part] for part in random_parts(rng, HEIGHT, WIDTH)],
    "no entries": lambda rng: [[] for _ in range(HEIGHT)],
    "full rows": lambda rng: full(rng, range(WIDTH)),
    "all full": lambda rng: full(rng, range(WIDTH), range(HEIGHT)),
    "full rows backwards": lambda rng: full(rng, range(WIDTH)[::-1]),
    "full but for a duplicate": lambda rng: full(rng, [0, 1, 2, 3, 3]),
    "uneven": uneven,
    "one entry": lambda rng: [[(WIDTH - 1, 0.5)] if r == HEIGHT - 1 else [] for r in range(HEIGHT)],
    "0 rows": lambda rng: [],
}


@pytest.mark.parametrize("kind", [ss.csr_array, ss.csr_matrix], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("index", ["i4", "i8"])
@pytest.mark.parametrize("garbage", [0, 7], ids=["", "garbage"])
@each_fused
@pytest.mark.parametrize("name", FORMS)
def test_csr(name, fused, garbage, index, kind):
    """CSR is RowSparse is the dense step of the gathered rows, to the bit."""
    rng = np.random.default_rng(7)
    parts = FORMS[name](rng)
    shape = (len(parts), WIDTH)
    touched, dense = plain_sum(parts, WIDTH, np.float32)
    matrix = csr_from(parts, WIDTH, "f4", index, kind, garbage)
    before = table.content(matrix.data, matrix.indices, matrix.indptr)
    if not garbage and len(parts):
        np.testing.assert_array_equal(matrix.toarray()[touched], dense)
    for row in (table.row("ftml"), table.row("groupadagrad")):
        weight = weight_of(rng, shape=shape)
        found, rows, gathered = (Run(row, weight, fused, **table.common(row)) for _ in range(3))
        for _ in range(2):
            found.step(matrix)
            rows.step(RowSparse(touched, dense, shape))
            gathered.on_rows(touched, dense)
        assert_same(found.arrays(), rows.arrays(), row.cls.per_row)
        assert_same(found.arrays(), gathered.arrays(), row.cls.per_row)
    assert table.content(matrix.data, matrix.indices, matrix.indptr) == before


@each_fused
@table.each
def test_csr_for_every_rule(row, fused):
    rng = np.random.default_rng(8)
    weight = weight_of(rng)
    found, expected = (Run(row, weight, fused, **table.common(row)) for _ in range(2))
    for name in ("unsorted", "duplicates", "full rows", "sorted"):
        parts = FORMS[name](rng)
        found.step(csr_from(parts, WIDTH))
        expected.on_rows(*plain_sum(parts, WIDTH, np.float32))
    assert_same(found.arrays(), expected.arrays(), row.cls.per_row)


@each_fused
@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@each_mode
def test_0_rows_and_0_columns(mode, name, fused):
    for shape in ((0, 3), (3, 0), (0, 0)):
        run = Run(table.row(name), np.zeros(shape, "f4"), fused, sparse_update=mode)
        rows = range(shape[0])[1:]
        for _ in range(3):
            run.step(block(np.random.default_rng(0), rows, shape=shape))
            run.step(ss.csr_array(shape, dtype="f4"))
            run.step(np.zeros(shape, "f4"))
        run.flush()
        assert run.optimizer.num_update == 9


@each_fused
def test_a_parameter_without_elements_among_others(fused):
    optimizer = numba_opt.NAG(momentum=0, learning_rate=0.5, use_fused_step=fused)
    weights = [np.ones(shape) for shape in ((2, 2), (2, 0), (3, 2), (2, 1))]
    grads = [RowSparse([1], np.ones((1, w.shape[1])), w.shape) for w in weights]
    grads[2] = RowSparse([], np.zeros((0, 2)), (3, 2))
    optimizer.update([0, 1, 2, 3], weights, grads, [None] * 4)
    np.testing.assert_array_equal(weights[0], [[1, 1], [0.5, 0.5]])
    np.testing.assert_array_equal(weights[2], np.ones((3, 2)))
    np.testing.assert_array_equal(weights[3], [[1], [0.5]])


@given(data=st.data(), fused=st.booleans())
@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
def test_any_csr(name, fused, data):
    """Random structure against sums in pure Python."""
    height, width = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 6))
    entry = st.tuples(st.integers(0, width - 1), st.integers(-20, 20).map(lambda n: n / 8))
    rows = st.one_of(
        st.just([]),
        st.lists(entry, max_size=2 * width),
        st.lists(entry, max_size=2 * width).map(sorted),
        st.integers(1, 30).map(lambda n: [(c, n / 8 + c) for c in range(width)]),
        st.integers(1, 2 * width).map(lambda n: [(c % width, 0.5 + c) for c in range(n)]),
    )
    parts = data.draw(st.lists(rows, min_size=height, max_size=height))
    garbage, index = data.draw(st.sampled_from([0, 3])), data.draw(st.sampled_from(["i4", "i8"]))
    matrix = csr_from(parts, width, "f4", index, garbage=garbage)
    touched, dense = plain_sum(parts, width, np.float32)
    weight = weight_of(np.random.default_rng(height), shape=(height, width))
    row = table.row(name)
    found, expected = (Run(row, weight, fused, rescale_grad=0.5) for _ in range(2))
    found.step(matrix)
    expected.on_rows(touched, dense)
    assert_same(found.arrays(), expected.arrays(), row.cls.per_row)
    taken = RowSparse.from_csr(matrix)
    np.testing.assert_array_equal(taken.rows, touched)
    np.testing.assert_array_equal(taken.values, dense)


@given(
    rows=st.lists(st.integers(0, 9), max_size=30),
    dtype=st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u8"]),
    fused=st.booleans(),
)
def test_any_rows(rows, dtype, fused):
    """Random rows of any integer dtype, duplicates added up in pure Python."""
    rng = np.random.default_rng(len(rows))
    values, weight = eighths(rng, (len(rows), 3)), weight_of(rng, shape=(10, 3))
    sums = {}
    for r, value in zip(rows, values, strict=True):
        sums[r] = sums.get(r, 0) + value
    touched = np.array(sorted(sums), np.int64)
    dense = np.array([sums[r] for r in touched], np.float32).reshape(-1, 3)
    found, expected = (Run(table.row("nag"), weight, fused) for _ in range(2))
    grad = RowSparse(np.array(rows, dtype), values, (10, 3))
    found.step(grad)
    expected.on_rows(touched, dense)
    assert_same(found.arrays(), expected.arrays())
    np.testing.assert_array_equal(grad.to_dense()[touched], dense)
    np.testing.assert_array_equal(grad.coalesce().rows, touched)
    np.testing.assert_array_equal(grad.coalesce().values, dense)


@each_fused
@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
        lambda a: np.lib.stride_tricks.as_strided(a, writeable=False),
        lambda a: a.astype(a.dtype.newbyteorder(">")),
    ],
    ids=["strided", "backwards", "misaligned", "read-only", "big-endian"],
)
def test_parts_may_lie_anyhow(change, fused):
    rng = np.random.default_rng(9)
    weight = weight_of(rng)
    for rows in ([1, 4, 5], [5, 1, 1]):
        grad = block(rng, rows)
        odd = RowSparse(change(grad.rows), change(grad.values), grad.shape)
        csr = ss.csr_array(grad.to_dense())
        other = csr.copy()
        other.data = change(other.data)
        if not other.data.dtype.isnative:
            indices, indptr = other.indices, other.indptr
        else:
            indices, indptr = change(other.indices), change(other.indptr)
        other.indices, other.indptr = indices, indptr
        expected = Run(table.row("nag"), weight, fused).step(grad)
        for found in (odd, other):
            table.assert_bits(Run(table.row("nag"), weight, fused).step(found).arrays(), expected.arrays())


@each_fused
@each_mode
def test_weights_and_states_may_lie_anyhow(mode, fused):
    """Strided ones are worked on in copies."""
    rng = np.random.default_rng(10)
    plain = Run(table.row("ftml"), weight_of(rng), fused, sparse_update=mode)
    odd = Run(table.row("ftml"), plain.weight, fused, sparse_update=mode)
    state = odd.state[0] if mode == "exact" else odd.state
    strided = tuple(np.repeat(a, 2, axis=1)[:, ::2] for a in (odd.weight, *state))
    odd.weight, state = strided[0], strided[1:]
    odd.state = (state, odd.state[1]) if mode == "exact" else state
    for rows in SCHEDULE:
        grad = block(rng, rows)
        plain.step(grad)
        odd.step(grad)
    table.assert_bits(odd.flush().arrays(), plain.flush().arrays())


@each_fused
@pytest.mark.parametrize("form", ["rows", "duplicates", "csr", "full csr"])
@pytest.mark.parametrize(
    ("weight", "grad"),
    [("f4", "f8"), ("f8", "f4"), ("f4", "f2"), ("f8", "f2"), ("f4", "bfloat16"), ("f4", "longdouble")],
)
def test_gradients_of_another_dtype(weight, grad, form, fused):
    """They are converted; the numbers here have a place in all of them."""
    rng = np.random.default_rng(11)
    dtype = np.dtype(getattr(ml_dtypes, grad, grad))
    start = weight_of(rng, weight)
    rows = {"duplicates": [3, 1, 3]}.get(form, [1, 3, 8])
    sparse = block(rng, rows, weight)
    expected = Run(table.row("nag"), start, fused, rescale_grad=0.5).step(sparse)
    if form in ("rows", "duplicates"):
        other = RowSparse(sparse.rows, sparse.values.astype(dtype), sparse.shape)
    else:
        other = ss.csr_array(sparse.to_dense())
        if form == "csr":
            other.indices = other.indices.reshape(3, -1)[:, ::-1].ravel()
            other.data = other.data.reshape(3, -1)[:, ::-1].ravel()
        other.data = other.data.astype(dtype)
    found = Run(table.row("nag"), start, fused, rescale_grad=0.5).step(other)
    table.assert_bits(found.arrays(), expected.arrays())


@each_fused
@each_mode
@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_master_weights_take_any_gradient(dtype, mode, fused):
    rng = np.random.default_rng(12)
    weight = weight_of(rng, "f2")
    runs = [Run(table.row("nag"), weight, fused, multi_precision=True, sparse_update=mode) for _ in range(2)]
    for rows in SCHEDULE:
        grad = block(rng, rows, "f4")
        runs[0].step(RowSparse(grad.rows, grad.values.astype(dtype), grad.shape))
        runs[1].step(grad)
    table.assert_bits(runs[0].flush().arrays(), runs[1].flush().arrays())
    np.testing.assert_array_equal(runs[0].weight, table.leaves(runs[0].state)[0].astype("f2"))


@pytest.mark.parametrize("how", ["fused", "arrays", "dense"])
def test_numbers_too_large_for_the_weight(how):
    """A float64 gradient beyond float32 is infinite there, in silence, as in dense updates."""
    mode = "dense" if how == "dense" else "lazy"
    weight = np.zeros((2, 1), "f4")
    run = Run(table.row("nag-plain"), weight, how != "arrays", sparse_update=mode)
    run.step(RowSparse([1], [[1e300]], (2, 1)))
    np.testing.assert_array_equal(run.weight, [[0], [-np.inf]])


@each_fused
@pytest.mark.parametrize("shape", [(HEIGHT,), (HEIGHT, 2, 3), (HEIGHT, 1, 1, 2)])
@table.each_elementwise
def test_weights_of_other_dimensions(row, shape, fused):
    rng = np.random.default_rng(13)
    check_lazy(row, weight_of(rng, shape=shape), fused, rng)


@each_fused
def test_several_parameters_in_one_call(fused):
    """Dense and sparse of several forms, dtypes and widths; as if each had come alone."""
    rng = np.random.default_rng(14)
    shapes = [(6, 3), (9, 1), (4, 8), (6, 3), (5, 4), (7, 2)]
    dtypes = ["f4", "f4", "f8", "f4", "f4", "f8"]
    weights = [weight_of(rng, d, s) for s, d in zip(shapes, dtypes, strict=True)]
    row = table.row("ftml")
    together = table.build(row, use_fused_step=fused)
    arrays = [weight.copy() for weight in weights]
    states = [together.create_state(t, weight) for t, weight in enumerate(arrays)]
    alone = [Run(row, weight, fused) for weight in weights]
    for _ in range(4):
        grads = []
        for t, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            grad = block(rng, rng.integers(0, shape[0], 4), dtype, shape)
            forms = [grad, grad.coalesce(), ss.csr_array(grad.to_dense()), grad.to_dense()]
            grads.append(forms[(t + together.num_update) % 4])
        together.update(list(range(6)), arrays, grads, states)
        for run, grad in zip(alone, grads, strict=True):
            run.step(grad)
        for run, weight, state in zip(alone, arrays, states, strict=True):
            table.assert_bits(run.arrays(), [weight, state])


@each_fused
@pytest.mark.parametrize("form", ["coo", "csc", "lil", "dok", "bsr", "dia"])
def test_other_formats_are_converted_with_the_reason(form, fused):
    rng = np.random.default_rng(15)
    dense = block(rng, [1, 4, 4, 9]).to_dense()
    weight = weight_of(rng)
    expected = Run(table.row("nag"), weight, fused).step(ss.csr_array(dense))
    for kind in ("array", "matrix"):
        matrix = getattr(ss, f"{form}_{kind}")(dense)
        found = Run(table.row("nag"), weight, fused)
        with pytest.warns(UserWarning, match=f"parameter 0 .* format '{form}', converted to CSR .* because"):
            found.step(matrix)
        assert matrix.format == form
        if form not in ("bsr", "dia"):  # their blocks and diagonals hold zeros, which count as entries
            table.assert_bits(found.arrays(), expected.arrays())


def test_coo_with_duplicates():
    weight = np.zeros((3, 2))
    grad = ss.coo_array(([1.0, 2.0, 4.0], ([2, 0, 2], [1, 0, 1])), shape=(3, 2))
    with pytest.warns(UserWarning, match="'coo'"):
        Run(table.row("nag-plain"), weight, learning_rate=1.0).step(grad)
    run = Run(table.row("nag-plain"), weight, learning_rate=1.0)
    with pytest.warns(UserWarning, match="'coo'"):
        run.step(grad)
    np.testing.assert_array_equal(run.weight, [[-2, 0], [0, 0], [0, -5]])


def test_the_reason_is_said_once():
    """By Python's usual filter, for each parameter."""
    run, grad = Run(table.row("nag"), np.zeros((3, 2))), ss.coo_array(np.eye(3, 2))
    run.step(grad.tocsr())  # compiling makes Python forget which warnings it has given
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            run.step(grad)
    assert len(said) == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = Trainer([np.zeros((3, 2))], "nag")
        trainer.accumulate([grad])
    assert len(said) == 1


def test_csr_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(table.row("nag"), np.zeros((3, 2))).step(ss.csr_array(np.eye(3, 2)))
        Run(table.row("nag"), np.zeros((3, 2))).step(ss.csr_matrix(np.eye(3, 2)))


@each_fused
def test_one_dimensional_scipy_arrays(fused):
    """Either they work as gradients of vectors, or they are refused in words."""
    weight = np.zeros(3)
    run = Run(table.row("nag-plain"), weight, fused, learning_rate=1.0)
    try:
        run.step(ss.csr_array(np.array([1.0, 0, 2])))
    except ValueError as error:
        assert "gradient of parameter 0" in str(error)  # noqa: PT017
        np.testing.assert_array_equal(run.weight, weight)
    else:
        np.testing.assert_array_equal(run.weight, [-1, 0, -2])


# ---------------------------------------------------------------- RowSparse itself


def test_row_sparse_from_lists():
    grad = RowSparse([2, 0, 2], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [4, 2])
    assert grad.rows.dtype.kind == "i"
    assert (grad.dtype, grad.shape) == (np.float64, (4, 2))
    assert repr(grad) == "RowSparse of shape (4, 2): 3 rows, float64"
    np.testing.assert_array_equal(grad.to_dense(), [[3, 4], [0, 0], [6, 8], [0, 0]])
    merged = grad.coalesce()
    assert merged.rows.tolist() == [0, 2]
    assert merged.values.tolist() == [[3, 4], [6, 8]]
    assert (merged.dtype, merged.shape) == (grad.dtype, grad.shape)
    assert grad.rows.tolist() == [2, 0, 2]


def test_row_sparse_without_rows():
    for rows in ([], (), np.zeros(0, np.int32)):
        grad = RowSparse(rows, np.zeros((0, 2), "f4"), (4, 2))
        assert grad.rows.dtype.kind == "i"
        assert grad.to_dense().tolist() == [[0, 0]] * 4
        assert grad.coalesce().rows.size == 0
    assert repr(grad) == "RowSparse of shape (4, 2): 0 rows, float32"


def test_row_sparse_of_many_rows():
    grad = RowSparse(np.arange(12345), np.zeros((12345, 1)), (20000, 1))
    assert repr(grad) == "RowSparse of shape (20000, 1): 12,345 rows, float64"


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3), (5, 0)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
def test_row_sparse_to_dense(dtype, shape):
    rng = np.random.default_rng(16)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    grad = RowSparse(np.array([4, 0, 4], "u1"), eighths(rng, (3, *shape[1:]), dtype), shape)
    expected = np.zeros(shape, "f8")
    np.add.at(expected, [4, 0, 4], grad.values.astype("f8"))
    for found in (grad, grad.coalesce()):
        assert found.to_dense().dtype == dtype
        np.testing.assert_array_equal(found.to_dense().astype("f8"), expected)


@pytest.mark.parametrize("kind", [ss.csr_array, ss.csr_matrix])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", FORMS)
def test_from_csr(name, dtype, kind):
    parts = FORMS[name](np.random.default_rng(17))
    matrix = csr_from(parts, WIDTH, dtype, kind=kind)
    grad = RowSparse.from_csr(matrix)
    touched, dense = plain_sum(parts, WIDTH, np.dtype(dtype).type)
    assert grad.shape == matrix.shape
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad.rows, touched)
    np.testing.assert_array_equal(grad.values, dense)
    assert not np.shares_memory(grad.values, matrix.data)


def test_from_csr_keeps_precision():
    """A dtype that no kernel knows is not squeezed through float32."""
    matrix = ss.csr_array(np.full((1, 1), 1 / 3, np.longdouble))
    assert RowSparse.from_csr(matrix).values[0, 0] == 1 / 3


def test_from_csr_of_something_else():
    for other in (ss.coo_array(np.eye(2)), np.eye(2), None):
        with pytest.raises(TypeError, match="matrix"):
            RowSparse.from_csr(other)


# ---------------------------------------------------------------- the dense meaning


@each_fused
@table.each_dtype
@pytest.mark.parametrize("options", [{"lazy_update": False}, {"sparse_update": "dense"}], ids=str)
@table.each
def test_dense_meaning(row, options, dtype, fused):
    rng = np.random.default_rng(18)
    weight = weight_of(rng, dtype)
    common = table.common(row)
    found, csr = (Run(row, weight, fused, **common, **options) for _ in range(2))
    expected = Run(row, weight, fused, **common)
    for rows in SCHEDULE:
        grad = block(rng, rows, dtype)
        expected.step(grad.to_dense())
        found.step(grad)
        csr.step(ss.csr_array(grad.to_dense()))
        table.assert_bits(found.arrays(), expected.arrays())
        table.assert_bits(csr.arrays(), expected.arrays())
    assert found.optimizer.sparse_update == "dense"


def test_lazy_update_and_sparse_update():
    for given_, expected in (
        ({}, "lazy"),
        ({"lazy_update": True}, "lazy"),
        ({"lazy_update": False}, "dense"),
        ({"lazy_update": False, "sparse_update": "exact"}, "exact"),
        ({"sparse_update": "exact"}, "exact"),
    ):
        assert numba_opt.NAG(**given_).sparse_update == expected
    with pytest.raises(
        ValueError, match="sparse_update must be one of 'lazy', 'dense', 'exact', got 'eager'"
    ):
        numba_opt.NAG(sparse_update="eager")


# ---------------------------------------------------------------- exact


def schedulers():
    return [
        lambda: None,
        lambda: lr_scheduler.FactorScheduler(3, 0.7, base_lr=0.3),
        lambda: lr_scheduler.MultiFactorScheduler([2, 5, 9], 0.5, base_lr=0.2),
        lambda: lr_scheduler.PolyScheduler(12, base_lr=0.3, warmup_steps=4),
        lambda: lr_scheduler.CosineScheduler(9, base_lr=0.3, final_lr=0.01),
    ]


def pair(row, weight, fused, scheduler=None, dense_fused=None, **options):
    """A run that catches up exactly, and a dense one."""
    if scheduler is not None and scheduler() is not None:
        options |= {"learning_rate": None}
    return [
        Run(row, weight, way, lr_scheduler=scheduler and scheduler(), sparse_update=mode, **options)
        for mode, way in (("exact", fused), ("lazy", fused if dense_fused is None else dense_fused))
    ]


def check_exact(exact, dense):
    assert_same(exact.flush().arrays(), dense.arrays(), exact.row.cls.per_row)
    assert not exact.state[1].any()
    assert exact.optimizer._deferred[0].recorded == 0


EXACT_DTYPES = {name: ["f4", "f8"] for name in ("nag", "ftml", "groupadagrad")}


@table.each
@given(data=st.data())
def test_exact_equals_dense(row, data):
    """Random rows come at random, with dense gradients and flushes in between."""
    dtype = data.draw(st.sampled_from(EXACT_DTYPES.get(row.id, ["f4"])))
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    options = {
        "rescale_grad": data.draw(st.sampled_from([1.0, 0.25, -1.0])),
        "clip_gradient": data.draw(st.sampled_from([None, 0.5])),
    }
    if not row.cls.per_row:
        options["wd"] = data.draw(st.sampled_from([0.0, 0.1]))
    scheduler = data.draw(st.sampled_from(schedulers()))
    exact, dense = pair(
        row, weight_of(rng, dtype, (height, width)), data.draw(st.booleans()), scheduler, **options
    )
    kinds = st.sampled_from(["rows", "rows", "rows", "csr", "csr", "dense", "nothing", "flush"])
    for kind in data.draw(st.lists(kinds, min_size=1, max_size=25)):
        rows = data.draw(st.lists(st.integers(0, height - 1), max_size=4))
        grad = block(rng, rows, dtype, (height, width))
        if kind == "flush":
            exact.flush()
            continue
        if kind == "nothing":
            grad = block(rng, [], dtype, (height, width))
        dense.step(grad.to_dense())
        if kind == "csr":
            grad = raw_csr(
                np.ascontiguousarray(grad.coalesce().values.ravel()),
                np.tile(np.arange(width), len(set(rows))),
                np.searchsorted(sorted(set(rows)), np.arange(height + 1)) * width,
                (height, width),
            )
        exact.step(grad.to_dense() if kind == "dense" else grad)
        touched = np.arange(height) if kind == "dense" else np.unique(rows).astype(int)
        if kind != "nothing":  # what was touched is up to date at once
            found = [array[touched] for array in exact.arrays()]
            assert_same(found, [array[touched] for array in dense.arrays()], row.cls.per_row)
    check_exact(exact, dense)
    assert exact.optimizer.num_update == dense.optimizer.num_update


@each_fused
def test_exact_with_entries_of_a_csr(fused):
    rng = np.random.default_rng(19)
    exact, dense = pair(table.row("nag"), weight_of(rng), fused, wd=0.1)
    for name in ("unsorted", "duplicates", "one entry", "no entries", "sorted"):
        parts = FORMS[name](rng)
        touched, sums = plain_sum(parts, WIDTH, np.float32)
        exact.step(csr_from(parts, WIDTH))
        dense.step(RowSparse(touched, sums, (HEIGHT, WIDTH)).to_dense())
    check_exact(exact, dense)


@each_fused
def test_exact_uses_the_hyper_parameters_of_each_step(fused):
    """Whatever is changed by hand between steps counts from then on, for rows that are behind too."""
    rng = np.random.default_rng(20)
    exact, dense = pair(table.row("nag"), weight_of(rng), fused)
    for k in range(24):
        grad = block(rng, [k % 2])
        for run, own in ((exact, grad), (dense, grad.to_dense())):
            run.optimizer.set_learning_rate(0.1 / (1 + k))
            run.optimizer.wd = 0.01 * k
            run.optimizer.momentum = 0.9 - 0.02 * k
            run.optimizer.rescale_grad = 1 + k
            run.optimizer.set_wd_mult({0: k % 3})
            run.step(own)
    check_exact(exact, dense)


@each_fused
def test_exact_with_other_dimensions_and_half_precision(fused):
    rng = np.random.default_rng(21)
    for shape, dtype in (((HEIGHT,), "f4"), ((HEIGHT, 2, 3), "f4"), ((HEIGHT, 3), "f2")):
        exact, dense = pair(
            table.row("nag"), weight_of(rng, dtype, shape), fused, wd=0.1, multi_precision=True
        )
        for rows in SCHEDULE:
            grad = block(rng, rows, dtype, shape)
            exact.step(grad)
            dense.step(grad.to_dense())
        assert_same(exact.flush().arrays(), dense.arrays())


@each_fused
def test_exact_with_several_parameters(fused):
    """Each has a history of its own; some have dense gradients, some none at times."""
    rng = np.random.default_rng(22)
    shapes = [(6, 3), (9, 1), (4, 8)]
    row = table.row("ftml")
    weights = [[weight_of(rng, shape=shape) for shape in shapes]]
    weights.append([weight.copy() for weight in weights[0]])
    optimizers = [
        table.build(row, use_fused_step=fused, wd=0.05, sparse_update=mode, learning_rate=None,
                    lr_scheduler=lr_scheduler.FactorScheduler(2, 0.8, base_lr=0.1))
        for mode in ("exact", "lazy")
    ]  # fmt: skip
    states = [
        [o.create_state(t, w) for t, w in enumerate(column)]
        for o, column in zip(optimizers, weights, strict=True)
    ]
    for step in range(30):
        present = [t for t in range(3) if (step + t) % 4]
        grads = [block(rng, rng.integers(0, shapes[t][0], 2), shape=shapes[t]) for t in present]
        dense = [grad.to_dense() for grad in grads]
        if step % 7 == 0:
            grads[0] = dense[0]
        for k, given_ in enumerate((grads, dense)):
            columns = ([column[t] for t in present] for column in (weights[k], states[k]))
            w, s = columns
            optimizers[k].update(present, w, given_, s)
        if step == 12:
            optimizers[0].flush([1], weights[0][1:2], states[0][1:2])
            table.assert_bits([weights[0][1], states[0][1][0]], [weights[1][1], states[1][1]])
    optimizers[0].flush([0, 1, 2], weights[0], states[0])
    table.assert_bits([weights[0], [state[0] for state in states[0]]], [weights[1], states[1]])


def test_exact_states_and_stamps():
    rng = np.random.default_rng(23)
    weight = weight_of(rng)
    for name, n in (("nag-plain", 0), ("nag", 1), ("ftml", 3), ("groupadagrad", 1)):
        run = Run(table.row(name), weight, sparse_update="exact")
        state, last_step = run.state
        assert len(table.leaves([state])) == n
        assert (last_step.dtype, last_step.shape) == (np.int64, (HEIGHT,))
        run.step(block(rng, [1, 3])).step(block(rng, [3]))
        assert last_step[[0, 1, 3]].tolist() == [0, 1, 2]
        run.flush()
        assert not last_step.any()
    assert numba_opt.NAG(sparse_update="exact").create_state(0, np.zeros(()))[1].shape == (1,)


@each_fused
def test_flush_does_nothing_where_nothing_is_behind(fused):
    rng = np.random.default_rng(24)
    for mode in ("lazy", "dense", "exact"):
        run = Run(table.row("nag"), weight_of(rng), fused, sparse_update=mode, wd=0.1)
        run.flush().step(block(rng, range(HEIGHT)))
        before, count = table.content(run.arrays()), run.optimizer.num_update
        run.flush().flush()
        assert table.content(run.arrays()) == before
        assert run.optimizer.num_update == count
        run.optimizer.flush([], [], [])


def test_paths_can_be_mixed():
    """Rows left behind by one path are brought up to date by the other."""
    rng = np.random.default_rng(25)
    exact, dense = pair(table.row("ftml"), weight_of(rng), True, wd=0.1)
    for k in range(30):
        exact.optimizer.use_fused_step = bool(k % 3)
        grad = block(rng, rng.integers(0, HEIGHT, 2))
        exact.step(grad)
        dense.step(grad.to_dense())
    check_exact(exact, dense)


@pytest.mark.parametrize("name", ["nag", "ftml"])
def test_history_is_trimmed(name):
    """What every row has taken is forgotten, and room is not taken for more than twice what is needed."""
    rng = np.random.default_rng(26)
    exact, dense = pair(table.row(name), weight_of(rng, "f8", (8, 2)), True, wd=0.01, learning_rate=0.05)
    longest = 0
    for k in range(3000):
        grad = block(rng, [k % 8], "f8", (8, 2))
        exact.step(grad)
        dense.step(grad.to_dense())
        history = exact.optimizer._deferred[0]
        longest = max(longest, history.recorded)
        assert exact.state[1].max() <= history.recorded
        assert exact.state[1].min() >= 0
    assert longest <= 256
    assert len(history._rows) <= 512
    assert_same(exact.flush().arrays(), dense.arrays())


@each_fused
@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
def test_long_histories(name, fused):
    """A row that was last seen more than a thousand steps ago, and one that never was."""
    rng = np.random.default_rng(27)
    steps = 1300 if fused else 300
    options = {} if name == "groupadagrad" else {"wd": 0.01}
    scheduler = schedulers()[1]
    exact, dense = pair(table.row(name), weight_of(rng, "f8", (4, 3)), fused, scheduler, **options)
    for k in range(steps):
        rows = [1] if k in (0, steps - 2) else [2, 3][: 1 + k % 2]
        grad = block(rng, rows, "f8", (4, 3))
        exact.step(grad)
        dense.step(grad.to_dense())
        if k == steps - 2:
            at = exact.optimizer._deferred[0].recorded
            assert exact.state[1].tolist()[:2] == [0, at]
            row = slice(1, 2)
            found, expected = ([array[row] for array in run.arrays()] for run in (exact, dense))
            assert_same(found, expected, name == "groupadagrad")
    assert exact.optimizer._deferred[0].recorded == steps  # row 0 needs all of it
    check_exact(exact, dense)


@pytest.mark.parametrize("pending", [40, 255, 256, 257, 511, 512, 513])
def test_around_the_lengths_at_which_history_is_trimmed(pending):
    rng = np.random.default_rng(28)
    exact, dense = pair(table.row("nag"), weight_of(rng, "f8", (3, 2)), True, wd=0.01)
    for k in range(pending):
        grad = block(rng, [0] if k != 100 else [0, 1], "f8", (3, 2))
        exact.step(grad)
        dense.step(grad.to_dense())
    for _ in range(300):
        grad = block(rng, [0, 1, 2], "f8", (3, 2))
        exact.step(grad)
        dense.step(grad.to_dense())
        assert_same(exact.arrays(), dense.arrays())
    assert exact.optimizer._deferred[0].recorded <= 2 * 513
    check_exact(exact, dense)


@each_fused
@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_in_the_middle(how, fused):
    """A copy of optimizer, weight and state goes on as the original does; they share nothing."""
    rng = np.random.default_rng(29)
    exact, dense = pair(table.row("ftml"), weight_of(rng), fused, wd=0.1)
    grads = [block(rng, rng.integers(0, HEIGHT, 2)) for _ in range(20)]
    for grad in grads[:10]:
        exact.step(grad)
        dense.step(grad.to_dense())
    other = Run(table.row("ftml"), exact.weight, fused)
    other.optimizer, other.weight, other.state = how((exact.optimizer, exact.weight, exact.state))
    assert other.optimizer._deferred[0].recorded == 10
    for grad in grads[10:]:
        dense.step(grad.to_dense())
        exact.step(grad)
    check_exact(exact, dense)
    for grad in grads[10:]:
        other.step(grad)
    check_exact(other, dense)


@each_fused
def test_a_new_state_owes_nothing(fused):
    """An index that is used again for a new weight begins anew, whatever rows of the old one were behind."""
    row = table.row("nag-plain")
    run = Run(row, np.ones((2, 1)), fused, wd=0.1, learning_rate=0.5, sparse_update="exact")
    for _ in range(3):
        run.step(RowSparse([0], [[0.0]], (2, 1)))
    run.weight = np.ones((2, 1))
    run.state = run.optimizer.create_state(0, run.weight)
    run.step(RowSparse([0], [[0.0]], (2, 1))).flush()
    np.testing.assert_array_equal(run.weight, [[0.95], [0.95]])


# ---------------------------------------------------------------- saving


def twins(fused=True, **options):
    """Two trainers, one that catches up exactly and one whose gradients are dense, of equal parameters."""
    rng = np.random.default_rng(30)
    shapes = {"table": (HEIGHT, 4), "other": (6, 2), "bias": (5,)}
    params = {name: weight_of(rng, shape=shape) for name, shape in shapes.items()}
    made = []
    for mode in ("exact", "lazy"):
        optimizer = numba_opt.FTML(0.1, wd=0.05, use_fused_step=fused, sparse_update=mode, **options)
        made.append(Trainer({k: v.copy() for k, v in params.items()}, optimizer))
    return rng, made


def steps(rng, made, n):
    for _ in range(n):
        grads = {
            "table": block(rng, rng.integers(0, HEIGHT, 3), shape=(HEIGHT, 4)),
            "other": block(rng, [int(rng.integers(0, 6))], shape=(6, 2)),
            "bias": eighths(rng, 5),
        }
        dense = {k: g.to_dense() if isinstance(g, RowSparse) else g for k, g in grads.items()}
        for trainer in made:
            trainer.step(grads if trainer.optimizer.sparse_update == "exact" else dense)


def content(trainer, weights=True):
    """A trainer's parameters and states, without last_step, for comparing."""
    arrays = table.leaves([list(trainer.params.values()), list(trainer.states.values())])
    return table.content([a for a in arrays if a.dtype != np.int64])


@each_fused
def test_trainer_flush(fused):
    rng, (exact, dense) = twins(fused)
    steps(rng, (exact, dense), 12)
    assert content(exact) != content(dense)
    exact.flush()
    assert content(exact) == content(dense)
    steps(rng, (exact, dense), 5)
    exact.flush()
    assert content(exact) == content(dense)


@each_fused
def test_saving_brings_rows_up_to_date(fused, tmp_path):
    rng, (exact, dense) = twins(fused)
    steps(rng, (exact, dense), 8)
    exact.save(tmp_path / "exact")
    assert content(exact) == content(dense)
    steps(rng, (exact, dense), 7)
    found = exact.state_dict()
    for name, entry in found["parameters"].items():
        np.testing.assert_array_equal(entry["weight"], dense.params[name])
    steps(rng, (exact, dense), 3)
    exact.flush()
    assert content(exact) == content(dense)


@each_fused
@pytest.mark.parametrize("way", ["file", "dict", "no params"])
def test_resuming_in_the_middle(way, fused, tmp_path):
    """A trainer that takes over goes on as the first does, whatever it had behind itself."""
    rng, (exact, dense) = twins(fused)
    _, (other, _) = twins(fused)
    steps(np.random.default_rng(1), [other], 9)  # has a history of its own, which is void
    steps(rng, (exact, dense), 8)
    if way == "dict":
        other.load_state_dict(exact.state_dict())
    else:
        exact.save(tmp_path / "saved", params=way == "file")
        other.load(tmp_path / "saved")
        if way == "no params":
            for name, weight in exact.params.items():
                other.params[name][...] = weight
    steps(rng, (exact, other, dense), 11)
    for trainer in (exact, other):
        trainer.flush()
        assert content(trainer) == content(dense)
    assert other.optimizer.num_update == dense.optimizer.num_update


@each_fused
def test_updater_in_the_middle(fused):
    """`get_states` cannot bring weights up to date that it does not have: what is behind must be saved."""
    rng = np.random.default_rng(31)

    def updater(mode):
        return numba_opt.Updater(numba_opt.NAG(0.1, wd=0.1, use_fused_step=fused, sparse_update=mode))

    weight = weight_of(rng)
    exact, dense = updater("exact"), updater("lazy")
    weights = [weight.copy(), weight.copy()]

    def step(n):
        for _ in range(n):
            grad = block(rng, rng.integers(0, HEIGHT, 2))
            exact(0, grad, weights[0])
            dense(0, grad.to_dense(), weights[1])

    step(6)
    saved = exact.get_states(dump_optimizer=True)
    exact = updater("exact")
    exact.set_states(saved)
    step(6)
    exact.optimizer.flush([0], weights[:1], [exact.states[0]])
    table.assert_bits([weights[0], exact.states[0][0]], [weights[1], dense.states[0]])


@each_fused
def test_updater_that_goes_back(fused):
    """States that were flushed before saving, set again after other steps have been made."""
    rng = np.random.default_rng(32)
    weight = weight_of(rng)
    updater = numba_opt.Updater(numba_opt.NAG(0.1, wd=0.1, use_fused_step=fused, sparse_update="exact"))
    updater(0, block(rng, [1, 2]), weight)
    updater.optimizer.flush([0], [weight], [updater.states[0]])
    saved, before = updater.get_states(dump_optimizer=True), weight.copy()
    for _ in range(5):
        updater(0, block(rng, [3]), weight)
    updater.set_states(saved)
    weight[...] = before
    updater.optimizer.flush([0], [weight], [updater.states[0]])
    np.testing.assert_array_equal(weight, before)


def test_pickled_updater():
    rng = np.random.default_rng(33)
    weight = weight_of(rng)
    updater = numba_opt.Updater(numba_opt.NAG(0.1, wd=0.1, sparse_update="exact"))
    for _ in range(4):
        updater(0, block(rng, [3]), weight)
    other, copied = pickle.loads(pickle.dumps((updater, weight)))
    for it, w in ((updater, weight), (other, copied)):
        it.optimizer.flush([0], [w], [it.states[0]])
    table.assert_bits([copied, other.states[0]], [weight, updater.states[0]])


# ---------------------------------------------------------------- threads


def zipf(rng, height, n):
    """Row numbers as in real text: a few come again and again."""
    shares = 1 / np.arange(1, height + 1)
    return rng.permutation(height)[rng.choice(height, n, p=shares / shares.sum())]


@pytest.mark.parametrize("form", ["rows", "csr"])
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
def test_same_bits_for_any_number_of_threads(name, mode, form, monkeypatch):
    """Random float32, so that another order of summation would show; sums are those in order."""
    rng = np.random.default_rng(34)
    height, width = 15_000, 64
    rows = zipf(rng, height, 30_000)
    values = rng.standard_normal((len(rows), width)).astype("f4")
    weight = weight_of(rng, shape=(height, width))
    if form == "rows":
        grad = RowSparse(rows, values, weight.shape)
    else:
        order = np.argsort(rows, kind="stable")
        indptr = np.searchsorted(rows[order], np.arange(height + 1)) * width
        grad = raw_csr(values[order].ravel(), np.tile(np.arange(width), len(rows)), indptr, weight.shape)
    summed = np.zeros_like(weight)
    np.add.at(summed, rows, values)
    touched = np.unique(rows)
    assert len(touched) * width > 16 * threads.CHUNK
    row = table.row(name)
    expected = Run(row, weight)
    for _ in range(2):
        expected.on_rows(touched, summed[touched])
    monkeypatch.setattr(threads, "SHARED", 1)
    first = None
    for number in (1, 2, 5, 16):
        monkeypatch.setattr(threads, "count", lambda number=number: number)
        run = Run(row, weight, sparse_update=mode).step(grad).step(grad)
        first = first or table.content(run.arrays())
        assert table.content(run.arrays()) == first
        run.flush()
    if mode == "lazy" or name == "groupadagrad":
        assert_same(run.arrays(), expected.arrays(), row.cls.per_row)


# ---------------------------------------------------------------- fronts


def test_accumulated_gradients_of_other_dtypes():
    """Row numbers and values of one call need not have the dtypes of another's."""
    for first, second in (("u8", "i8"), ("i4", "i8"), ("i1", "u8")):
        trainer = Trainer([np.zeros((3, 2), "f4")], "nag", momentum=0, learning_rate=1.0)
        for rows, dtype in ((first, "f2"), (second, "f8")):
            trainer.accumulate([RowSparse(np.array([1], rows), np.ones((1, 2), dtype), (3, 2))])
        trainer.step()
        np.testing.assert_array_equal(trainer.params["0"][1], [-2, -2])


@pytest.mark.parametrize("sparse", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", [1, -1], ids=["sparse first", "dense first"])
def test_accumulated_sparse_and_dense_of_other_dtypes(order, sparse):
    trainer = Trainer([np.zeros((3, 2), "f4")], "nag", momentum=0, learning_rate=1.0)
    values = np.full((1, 2), 2048, sparse)
    grads = [RowSparse([1], values, (3, 2)), np.ones((3, 2), "f4")]
    for grad in grads[::order]:
        trainer.accumulate([grad])
    trainer.step()
    np.testing.assert_array_equal(trainer.params["0"], [[-1, -1], [-2049, -2049], [-1, -1]])


@each_mode
@pytest.mark.parametrize("way", ["file", "dict"])
def test_saving_accumulated_sparse_gradients(way, mode, tmp_path):
    def made():
        return Trainer([np.ones((4, 2))], numba_opt.NAG(0.5, wd=0.1, sparse_update=mode))

    first, other = made(), made()
    first.step([RowSparse([0], np.ones((1, 2)), (4, 2))])
    first.accumulate([RowSparse([2, 1, 2], np.ones((3, 2)), (4, 2))])
    if way == "dict":
        other.load_state_dict(first.state_dict())
    else:
        first.save(tmp_path / "saved")
        other.load(tmp_path / "saved")
    for trainer in (first, other):
        trainer.step()
        trainer.flush()
    table.assert_bits([other.params["0"], other.states["0"]], [first.params["0"], first.states["0"]])


@each_fused
def test_updater(fused):
    """Sparse gradients come through `Updater` too, one by one and all at once."""
    rng = np.random.default_rng(40)
    for number in (1, np.inf):
        weights = [weight_of(rng), weight_of(rng, "f8", (5, 2))]
        updater = numba_opt.Updater(numba_opt.NAG(use_fused_step=fused, aggregate_num=number))
        runs = [Run(table.row("nag"), weight, fused) for weight in weights]
        for _ in range(3):
            grads = [block(rng, [3, 1, 3]), ss.csr_array(np.eye(5, 2))]
            updater([0, 1], grads, weights)
            for run, grad in zip(runs, grads, strict=True):
                run.step(grad)
        for t, run in enumerate(runs):
            table.assert_bits([weights[t], updater.states[t]], run.arrays())


def test_torch_weights():
    torch = pytest.importorskip("torch")
    weight = torch.zeros(4, 2)
    optimizer = numba_opt.NAG(1.0, momentum=0)
    optimizer.update([0], [weight], [RowSparse([2], [[1.0, 2.0]], (4, 2))], [None])
    assert weight[2].tolist() == [-1, -2]
