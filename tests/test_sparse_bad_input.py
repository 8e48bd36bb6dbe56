"""Bad sparse gradients are refused before the first write, and the error says what is wrong and where."""

from __future__ import annotations

import copy
import re

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as ss

import numba_opt
from numba_opt import RowSparse, Trainer

from . import table
from .scripts import printed

SHAPE = (4, 3)
NAMES = {0: "first", 1: "second"}

each_fused = pytest.mark.parametrize("fused", [True, False], ids=["fused", "arrays"])
each_mode = pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])


def histories(optimizer):
    """What rows have yet to take; a parameter that has nothing recorded is as good as none."""
    return {k: (h.recorded, h.rows().tolist()) for k, h in optimizer._deferred.items() if h.recorded}


def arrays_of(thing):
    """All arrays of a gradient, a trainer or a nest."""
    if isinstance(thing, (tuple, list)):
        return [array for part in thing for array in arrays_of(part)]
    if isinstance(thing, Trainer):
        return arrays_of([list(thing.params.values()), list(thing.states.values()), thing._totals])
    found = [getattr(thing, name, None) for name in ("rows", "values", "data", "indices", "indptr")]
    return [array for array in (thing, *found) if isinstance(array, np.ndarray) and array.dtype != object]


def snapshot(optimizer, things):
    counts = optimizer.num_update, dict(optimizer._index_update_count), optimizer.lr
    return table.content(arrays_of(things)), counts, histories(optimizer)


def refused(kind, words, optimizer, things, function):
    """A call raises an error with these words and leaves everything as it was."""
    before = snapshot(optimizer, things)
    with pytest.raises(kind) as info:
        function()
    assert info.type in (TypeError, ValueError)
    for word in words:
        assert word in str(info.value), str(info.value)
    assert snapshot(optimizer, things) == before


def prepared(mode="lazy", fused=True, name="nag", **options):
    """An optimizer that has made three steps on two weights, so that some rows are behind."""
    rng = np.random.default_rng(0)
    optimizer = table.build(
        table.row(name), param_idx2name=NAMES, sparse_update=mode, use_fused_step=fused, **options
    )
    weights = [rng.standard_normal(SHAPE) for _ in range(2)]
    states = [optimizer.create_state(t, weight) for t, weight in enumerate(weights)]
    for rows in ([0, 1], [1], [3]):
        grads = [RowSparse(rows, rng.standard_normal((len(rows), 3)), SHAPE) for _ in weights]
        optimizer.update([0, 1], weights, grads, states)
    return optimizer, weights, states


def good():
    return RowSparse([3, 1, 3], np.ones((3, 3)), SHAPE)


# ---------------------------------------------------------------- what may be wrong with a gradient


def rows(numbers, dtype="i8", values=None, shape=SHAPE):
    """A gradient whose rows were changed after it was made, for the constructor refuses them."""
    grad = RowSparse(np.zeros(len(numbers), "i8"), np.ones((len(numbers), 3)), SHAPE)
    grad.rows = np.array(numbers, dtype)
    grad.shape = shape
    if values is not None:
        grad.values = values
    return grad


def csr(shape=SHAPE, **changes):
    """A matrix with two entries in each row but for the third, whose arrays were changed afterwards."""
    matrix = ss.csr_array(np.array([[1.0, 0, 2], [3, 4, 0], [0, 0, 0], [0, 5, 6]]))
    assert matrix.indices.tolist() == [0, 2, 0, 1, 1, 2]
    assert matrix.indptr.tolist() == [0, 2, 4, 4, 6]
    for name, change in changes.items():
        if isinstance(change, list):
            change = np.array(change, "i4")
        setattr(matrix, name, change(getattr(matrix, name)) if callable(change) else change)
    if shape != SHAPE:
        matrix = ss.csr_array(shape)
    return matrix


def put(*changes):
    """An array with other numbers at some places."""

    def change(array):
        array = array.copy()
        for k, value in changes:
            array[k] = value
        return array

    return change


def full(**changes):
    matrix = ss.csr_array(np.ones(SHAPE))
    for name, change in changes.items():
        setattr(matrix, name, change(getattr(matrix, name)))
    return matrix


MASKED = np.ma.masked_array(np.ones((2, 3)), mask=True)
NESTED = np.empty(6, object)
NESTED[:] = 1.0

# name: (what makes the gradient, error, words of its message)
ROWS = {
    "negative": (lambda: rows([1, 0, -1]), ValueError, ["rows", "-1 at position 2", "0 to 3"]),
    "negative first": (lambda: rows([-7, 0, -1]), ValueError, ["rows", "-7 at position 0"]),
    "past the end": (lambda: rows([1, 4, 9]), ValueError, ["rows", "4 at position 1", "0 to 3"]),
    "both": (lambda: rows([1, 3, 2, 8, -1, 7]), ValueError, ["rows", "8 at position 3"]),
    "far": (lambda: rows([0, 2**62]), ValueError, ["rows", f"{2**62} at position 1"]),
    "wraps to negative": (lambda: rows([0, 2**63 + 1], "u8"), ValueError, ["rows", "at position 1"]),
    "wraps to valid": (lambda: rows([2**32 + 1], "u8"), ValueError, ["rows", "at position 0"]),
    "of one byte": (lambda: rows([1, -1], "i1"), ValueError, ["rows", "-1 at position 1"]),
    "big-endian": (lambda: rows([1, 4], ">i4"), ValueError, ["rows", "4 at position 1"]),
    "float": (lambda: rows([0.0, 1.0], "f8"), TypeError, ["rows", "float64", "integers"]),
    "NaN": (lambda: rows([0.0, np.nan], "f8"), TypeError, ["rows", "float64", "integers"]),
    "infinite": (lambda: rows([np.inf, 1.0], "f4"), TypeError, ["rows", "float32", "integers"]),
    "bool": (lambda: rows([True, False], "?"), TypeError, ["rows", "bool", "integers"]),
    "complex": (lambda: rows([1, 2], "c16"), TypeError, ["rows", "complex128"]),
    "object": (lambda: rows([1, 2], object), TypeError, ["rows", "object"]),
    "text": (lambda: rows(["1"], "U1"), TypeError, ["rows"]),
    "dates": (lambda: rows([1, 2], "M8[s]"), TypeError, ["rows"]),
    "two-dimensional": (lambda: rows([[0], [1]]), ValueError, ["rows", "(2, 1)", "one dimension"]),
    "masked": (lambda: rows_set("rows", np.ma.masked_array([0, 1], mask=True)), TypeError, ["rows", "mask"]),
    "a list": (lambda: rows_set("rows", [0, 1]), (TypeError, ValueError), ["rows"]),
    "None": (lambda: rows_set("rows", None), TypeError, ["rows"]),
    "too few": (lambda: rows([0], values=np.ones((2, 3))), ValueError, ["values", "(2, 3)", "(1, 3)"]),
    "too many": (lambda: rows([0, 1], values=np.ones((1, 3))), ValueError, ["values", "(1, 3)", "(2, 3)"]),
    "none for values": (lambda: rows([], values=np.ones((1, 3))), ValueError, ["values", "(1, 3)"]),
}
VALUES = {
    "narrow": (lambda: rows([0, 1], values=np.ones((2, 2))), ValueError, ["values", "(2, 2)", "(2, 3)"]),
    "wide": (lambda: rows([0, 1], values=np.ones((2, 4))), ValueError, ["values", "(2, 4)", "(2, 3)"]),
    "flat": (lambda: rows([0, 1], values=np.ones(6)), ValueError, ["values", "(6,)", "(2, 3)"]),
    "transposed": (lambda: rows([0, 1], values=np.ones((3, 2))), ValueError, ["values", "(3, 2)"]),
    "deep": (lambda: rows([0, 1], values=np.ones((2, 3, 1))), ValueError, ["values", "(2, 3, 1)"]),
    "scalar": (lambda: rows([0, 1], values=np.array(1.0)), ValueError, ["values", "()"]),
    "int": (lambda: rows([0, 1], values=np.ones((2, 3), int)), TypeError, ["values", "int64", "floating"]),
    "bool": (lambda: rows([0, 1], values=np.ones((2, 3), bool)), TypeError, ["values", "bool"]),
    "complex": (lambda: rows([0, 1], values=np.ones((2, 3), "c8")), TypeError, ["values", "complex64"]),
    "object": (lambda: rows([0, 1], values=np.ones((2, 3), object)), TypeError, ["values", "object"]),
    "8 bits": (
        lambda: rows([0, 1], values=np.ones((2, 3), ml_dtypes.float8_e4m3fn)),
        TypeError,
        ["values", "float8"],
    ),
    "masked": (lambda: rows([0, 1], values=MASKED), TypeError, ["values", "mask"]),
    "a list": (lambda: rows([0, 1], values=[[1.0] * 3] * 2), (TypeError, ValueError), ["values"]),
}
SHAPES = {
    "taller": (lambda: rows([0], shape=(5, 3)), ValueError, ["(5, 3)", "(4, 3)"]),
    "shorter": (lambda: rows([0], shape=(3, 3)), ValueError, ["(3, 3)", "(4, 3)"]),
    "wider": (lambda: rows([0], shape=(4, 4)), ValueError, ["(4, 4)", "(4, 3)"]),
    "flat": (lambda: RowSparse([0], [1.0], (12,)), ValueError, ["(12,)", "(4, 3)"]),
    "deep": (lambda: RowSparse([0], [[[1.0]] * 3], (4, 3, 1)), ValueError, ["(4, 3, 1)", "(4, 3)"]),
    "csr taller": (lambda: csr(shape=(5, 3)), ValueError, ["(5, 3)", "(4, 3)"]),
    "csr wider": (lambda: csr(shape=(4, 4)), ValueError, ["(4, 4)", "(4, 3)"]),
    "csr transposed": (lambda: csr(shape=(3, 4)), ValueError, ["(3, 4)", "(4, 3)"]),
    "csr without rows": (lambda: csr(shape=(0, 3)), ValueError, ["(0, 3)", "(4, 3)"]),
    "csr flat": (lambda: ss.csr_array(np.ones(12)), ValueError, ["(12,)", "(4, 3)"]),
    "coo deep": (lambda: ss.coo_array(np.ones((4, 3, 1))), ValueError, ["(4, 3, 1)", "(4, 3)"]),
}
CSR = {
    "column past the end": (
        lambda: csr(indices=put((3, 3), (5, 9))),
        ValueError,
        ["indices", "3 at position 3", "0 to 2"],
    ),
    "column negative": (lambda: csr(indices=put((4, -1))), ValueError, ["indices", "-1 at position 4"]),
    "column far": (lambda: csr(indices=put((0, 2**31 - 1))), ValueError, ["indices", "at position 0"]),
    "column of 64 bits": (
        lambda: csr(indices=lambda a: put((1, 2**32))(a.astype("i8"))),
        ValueError,
        ["indices", f"{2**32} at position 1"],
    ),
    "column in full rows": (lambda: full(indices=put((7, 3))), ValueError, ["indices", "3 at position 7"]),
    "columns too few": (lambda: csr(indices=lambda a: a[:-1]), ValueError, ["indptr", "6", "indices 5"]),
    "data too short": (lambda: csr(data=lambda a: a[:-2]), ValueError, ["indptr", "6", "data holds 4"]),
    "data empty": (lambda: csr(data=lambda a: a[:0]), ValueError, ["indptr", "6", "data holds 0"]),
    "full data too short": (lambda: full(data=lambda a: a[:-1]), ValueError, ["12", "data holds 11"]),
    "indptr falls": (
        lambda: csr(indptr=[0, 2, 5, 4, 6]),
        ValueError,
        ["indptr", "falls from 5 to 4 at position 3"],
    ),
    "indptr falls twice": (lambda: csr(indptr=[0, 4, 2, 1, 6]), ValueError, ["4 to 2 at position 2"]),
    "indptr negative": (lambda: csr(indptr=[0, -1, 2, 4, 6]), ValueError, ["0 to -1 at position 1"]),
    "indptr ends early": (lambda: csr(indptr=[0, 2, 4, 6, 5]), ValueError, ["6 to 5 at position 4"]),
    "indptr ends below 0": (lambda: csr(indptr=[0, 0, 0, 0, -1]), ValueError, ["0 to -1 at position 4"]),
    "indptr begins late": (lambda: csr(indptr=[1, 2, 4, 4, 6]), ValueError, ["indptr", "begins with 1"]),
    "indptr begins early": (lambda: csr(indptr=[-2, 2, 4, 4, 6]), ValueError, ["indptr", "begins with -2"]),
    "indptr too long for data": (lambda: csr(indptr=[0, 2, 4, 4, 7]), ValueError, ["indptr", "7 entries"]),
    "indptr far": (lambda: csr(indptr=[0, 2, 4, 4, 2**31 - 1]), ValueError, ["indptr", "2147483647"]),
    "indptr farther": (lambda: csr(indptr=np.array([0, 2, 4, 4, 2**62])), ValueError, ["indptr", f"{2**62}"]),
    "indptr short": (lambda: csr(indptr=lambda a: a[:-1]), ValueError, ["indptr", "length 4", "5"]),
    "indptr long": (lambda: csr(indptr=lambda a: np.r_[a, 6]), ValueError, ["indptr", "length 6", "5"]),
    "indptr empty": (lambda: csr(indptr=lambda a: a[:0]), ValueError, ["indptr", "length 0", "5"]),
    "indptr float": (lambda: csr(indptr=lambda a: a.astype("f8")), TypeError, ["indptr", "float64", "int32"]),
    "indptr NaN": (lambda: csr(indptr=np.full(5, np.nan)), TypeError, ["indptr", "float64"]),
    "indptr unsigned": (lambda: csr(indptr=lambda a: a.astype("u4")), TypeError, ["indptr", "uint32"]),
    "indices float": (lambda: csr(indices=lambda a: a.astype("f4")), TypeError, ["indices", "float32"]),
    "indices infinite": (lambda: csr(indices=np.full(6, np.inf)), TypeError, ["indices", "float64"]),
    "indices short": (lambda: csr(indices=lambda a: a.astype("i2")), TypeError, ["indices", "int16"]),
    "indices bool": (lambda: csr(indices=lambda a: a.astype(bool)), TypeError, ["indices", "bool"]),
    "indices object": (lambda: csr(indices=lambda a: a.astype(object)), TypeError, ["indices", "object"]),
    "data int": (lambda: csr(data=lambda a: a.astype(int)), TypeError, ["data", "int64", "floating"]),
    "data bool": (lambda: csr(data=lambda a: a.astype(bool)), TypeError, ["data", "bool"]),
    "data complex": (lambda: csr(data=lambda a: a.astype("c16")), TypeError, ["data", "complex128"]),
    "data object": (lambda: csr(data=NESTED), TypeError, ["data", "object"]),
    "data masked": (lambda: csr(data=np.ma.masked_array(np.ones(6), True)), TypeError, ["data", "mask"]),
    "data of two dimensions": (lambda: csr(data=np.ones((6, 2))), ValueError, ["data", "(6, 2)"]),
    "data a number": (lambda: csr(data=np.array(1.0)), ValueError, ["data", "()"]),
    "data a list": (lambda: csr(data=lambda a: a.tolist()), (TypeError, ValueError), ["data"]),
    "indices of two dimensions": (
        lambda: csr(indices=np.zeros((6, 1), "i4")),
        ValueError,
        ["indices", "(6, 1)"],
    ),
    "indices a number": (lambda: csr(indices=np.array(0, "i4")), ValueError, ["indices", "()"]),
    "indptr of two dimensions": (
        lambda: csr(indptr=np.zeros((5, 1), "i4")),
        ValueError,
        ["indptr", "(5, 1)"],
    ),
}
# scipy's own matrices of integers, unchanged
PLAIN = {
    "int": (lambda: ss.csr_array(np.ones(SHAPE, int)), TypeError, ["data", "int64", "floating"]),
    "bool": (lambda: ss.csr_array(np.ones(SHAPE, bool)), TypeError, ["data", "bool", "floating"]),
    "complex": (lambda: ss.csr_matrix(np.ones(SHAPE, complex)), TypeError, ["data", "complex128"]),
}


def rows_set(name, value):
    grad = good()
    setattr(grad, name, value)
    if name == "rows":
        grad.values = np.ones((2, 3))
    return grad


KINDS = {"rows": ROWS, "values": VALUES, "shape": SHAPES, "csr": CSR, "csr of": PLAIN}
EVERYTHING = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}
each_case = pytest.mark.parametrize("name", EVERYTHING)


@each_fused
@each_mode
@each_case
@pytest.mark.filterwarnings("ignore:gradient of parameter:UserWarning")
def test_update(name, mode, fused):
    """The second gradient is bad, the first one is not; neither weight changes."""
    make, error, words = EVERYTHING[name]
    optimizer, weights, states = prepared(mode, fused)
    grads = [good(), make()]
    things = [weights, states, grads]
    refused(
        error,
        ["gradient of parameter 1 ('second')", *words],
        optimizer,
        things,
        lambda: optimizer.update([0, 1], weights, grads, states),
    )
    optimizer.update([0, 1], weights, [good(), good()], states)  # and it goes on


@each_case
@pytest.mark.filterwarnings("ignore:gradient of parameter:UserWarning")
def test_trainer(name):
    make, error, words = EVERYTHING[name]
    for mode in ("lazy", "exact"):
        rng = np.random.default_rng(0)
        params = {key: rng.standard_normal(SHAPE) for key in NAMES.values()}
        optimizer = numba_opt.NAG(wd=0.1, sparse_update=mode)
        trainer = Trainer(params, optimizer, clip_global_norm=1.0)
        trainer.step({"first": good(), "second": good()})
        grads = {"first": good(), "second": make()}
        words = ["'second'", *words]
        things = [trainer, list(grads.values())]
        refused(error, words, optimizer, things, lambda: trainer.step(grads))  # noqa: B023
        refused(error, words, optimizer, things, lambda: trainer.accumulate(grads))  # noqa: B023
        trainer.accumulate({"first": good(), "second": np.ones(SHAPE)})
        refused(error, words, optimizer, things, lambda: trainer.accumulate(grads))  # noqa: B023
        trainer.step()


@pytest.mark.parametrize("name", list(EVERYTHING)[::5])
def test_updater(name):
    """Without a state that stays behind."""
    make, error, words = EVERYTHING[name]
    weight = np.ones(SHAPE)
    updater = numba_opt.Updater(numba_opt.NAG())
    grad = make()
    refused(error, words, updater.optimizer, [weight, grad], lambda: updater(0, grad, weight))
    assert not updater.states


@pytest.mark.parametrize("name", [*CSR, *[f"of {name}" for name in PLAIN]])
def test_from_csr(name):
    make, error, words = (CSR | {f"of {name}": case for name, case in PLAIN.items()})[name]
    with pytest.raises(error) as info:
        RowSparse.from_csr(make())
    assert info.type in (TypeError, ValueError)
    for word in ["matrix", *words]:
        assert word in str(info.value)


# ---------------------------------------------------------------- making a RowSparse


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (([0, -1], np.ones((2, 3)), SHAPE), ValueError, ["rows", "-1 at position 1", "0 to 3"]),
        (([4, 0], np.ones((2, 3)), SHAPE), ValueError, ["rows", "4 at position 0", "0 to 3"]),
        (([0.0, 1.0], np.ones((2, 3)), SHAPE), TypeError, ["rows", "float64"]),
        (([0, 1.5], np.ones((2, 3)), SHAPE), TypeError, ["rows", "float64"]),
        (([0, np.nan], np.ones((2, 3)), SHAPE), TypeError, ["rows", "float64"]),
        ((["0"], np.ones((1, 3)), SHAPE), TypeError, ["rows"]),
        (([True, False], np.ones((2, 3)), SHAPE), TypeError, ["rows", "bool"]),
        (([None], np.ones((1, 3)), SHAPE), TypeError, ["rows", "object"]),
        ((None, np.ones((1, 3)), SHAPE), TypeError, ["rows"]),
        (([2**70], np.ones((1, 3)), SHAPE), TypeError, ["rows", "object"]),
        ((np.zeros(0), np.ones((0, 3)), SHAPE), TypeError, ["rows", "float64"]),
        (([[0]], np.ones((1, 3)), SHAPE), ValueError, ["rows", "(1, 1)"]),
        ((0, np.ones((1, 3)), SHAPE), ValueError, ["rows", "()"]),
        ((np.ma.masked_array([0], mask=True), np.ones((1, 3)), SHAPE), TypeError, ["rows", "mask"]),
        (([0, 1], np.ones((1, 3)), SHAPE), ValueError, ["values", "(1, 3)", "(2, 3)"]),
        (([0], np.ones(3), SHAPE), ValueError, ["values", "(3,)", "(1, 3)"]),
        (([0], np.ones((1, 3), int), SHAPE), TypeError, ["values", "int64"]),
        (([0], np.ones((1, 3), "c8"), SHAPE), TypeError, ["values", "complex64"]),
        (([0], [["a", "b", "c"]], SHAPE), TypeError, ["values"]),
        (([0], None, SHAPE), TypeError, ["values"]),
        (([0], MASKED[:1], SHAPE), TypeError, ["values", "mask"]),
        (([0], np.ones((1, 3)), (-4, 3)), ValueError, ["shape"]),
        (([], np.ones((0, 3)), ()), ValueError, ["shape"]),
        (([0], np.ones((1, 3)), 4), TypeError, ["shape"]),
        (([0], np.ones((1, 3)), None), TypeError, ["shape"]),
        (([0], np.ones((1, 3)), (4.5, 3)), TypeError, ["shape"]),
        (([0], np.ones((1, 3)), ("4", 3)), TypeError, ["shape"]),
        (([0], np.ones((1, 3)), (np.nan, 3)), (TypeError, ValueError), ["shape"]),
        (([0], np.zeros((1, 3)), (0, 3)), ValueError, ["rows", "0 at position 0"]),
    ],
)
def test_row_sparse(args, error, words):
    with pytest.raises(error) as info:
        RowSparse(*args)
    for word in words:
        assert word in str(info.value)


@each_fused
@each_mode
def test_arrays_changed_after_the_gradient_was_made(mode, fused):
    """A `RowSparse` keeps the caller's arrays, and each update looks at them anew."""
    optimizer, weights, states = prepared(mode, fused)
    numbers, values = np.array([0, 2]), np.ones((2, 3))
    grad = RowSparse(numbers, values, SHAPE)

    def update():
        optimizer.update([1], weights[1:], [grad], states[1:])

    update()
    for k, value in ((1, 4), (0, -1), (1, 2**40)):
        numbers[...] = 0, 2
        numbers[k] = value
        words = ["parameter 1 ('second')", f"rows of gradient of parameter 1 ('second') hold {value}"]
        words.append(f"position {k}")
        refused(ValueError, words, optimizer, [weights, states, grad], update)
    numbers[...] = 2, 0
    update()


# ---------------------------------------------------------------- memory that is shared


@each_fused
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("what", ["weight", "state", "another weight", "another state"])
@pytest.mark.parametrize("part", ["values", "values twice", "rows", "data", "full data", "columns"])
def test_parts_that_share_memory_with_what_is_written(part, what, mode, fused):
    optimizer, weights, states = prepared(mode, fused)
    state = [s[0] if mode == "exact" else s for s in states]
    array = {"weight": weights[1], "state": state[1], "another weight": weights[0]}.get(what, state[0])
    numbers = array.view(np.int64).ravel()
    if part in ("rows", "columns"):
        numbers[:6] = [0, 1, 2, 2, 1, 0]
    grad = {
        "values": lambda: RowSparse([1, 2], array[:2], SHAPE),
        "values twice": lambda: RowSparse([1, 1], array[1:3], SHAPE),
        "rows": lambda: RowSparse(numbers[:3], np.ones((3, 3)), SHAPE),
        "data": lambda: csr(data=array.ravel()[:6]),
        "full data": lambda: full(data=lambda _: array.ravel()),
        "columns": lambda: csr(indices=numbers[:6], indptr=np.array([0, 2, 4, 4, 6])),
    }[part]()
    words = ["shares memory", "parameter 1 ('second')"]
    grads = [good(), grad]
    refused(
        ValueError,
        words,
        optimizer,
        [weights, states],
        lambda: optimizer.update([0, 1], weights, grads, states),
    )


@each_fused
def test_parts_may_share_memory_with_one_another(fused):
    optimizer, weights, states = prepared("lazy", fused)
    grad = good()
    optimizer.update([0, 1], weights, [grad, grad], states)
    optimizer.update([0, 1], weights, [grad, RowSparse(grad.rows, grad.values[::-1], SHAPE)], states)


def check_shared_last_step(what, fused):
    """An update whose second last_step share memory with something is refused."""
    optimizer, weights, states = prepared("exact", fused)
    last_step = np.zeros(4, np.int64)
    grads = [good(), good()]
    if what == "weight":
        weights[1] = np.zeros(SHAPE)
        last_step = weights[1].view(np.int64).ravel()[:4]
    elif what == "state":
        states[1] = (np.zeros(SHAPE), None)
        last_step = states[1][0].view(np.int64).ravel()[:4]
    elif what == "another's":
        last_step = states[0][1]
    elif what == "rows":
        last_step[:] = 0, 1, 2, 3
        grads[1] = RowSparse(last_step[:3], np.ones((3, 3)), SHAPE)
    elif what == "values":
        grads[1] = RowSparse([1], last_step.view(np.float64)[None, :3], SHAPE)
    states[1] = (states[1][0], last_step)
    refused(
        ValueError,
        ["last_step", "shares memory"],
        optimizer,
        [weights, states, grads],
        lambda: optimizer.update([0, 1], weights, grads, states),
    )


def test_last_step_that_share_memory():
    """They are written too: numbers that change under a kernel lead anywhere, so a process is set apart."""
    script = """
from tests.test_sparse_bad_input import check_shared_last_step
failed = []
for what in ["another's", "rows", "values", "state", "weight"]:
    for fused in (False, True):
        print(what, fused, flush=True)
        try:
            check_shared_last_step(what, fused)
        except BaseException as error:
            failed.append((what, fused, str(error)[:80]))
            print("failed:", what, fused, error, flush=True)
assert not failed, failed
"""
    printed(script)


# ---------------------------------------------------------------- states of exact updates


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAST_STEPS = {
    "missing": (lambda state, last: state, TypeError, ["ndarray", "(state, last_step)"]),
    "None": (lambda state, last: None, TypeError, ["NoneType", "(state, last_step)"]),
    "too long": (lambda state, last: (state, last, last), TypeError, ["(state, last_step)"]),
    "swapped": (lambda state, last: (last, state), (TypeError, ValueError), []),
    "None for last_step": (lambda state, last: (state, None), TypeError, ["last_step", "None"]),
    "list": (lambda state, last: (state, last.tolist()), TypeError, ["last_step", "list"]),
    "int32": (lambda state, last: (state, last.astype("i4")), TypeError, ["last_step", "int64"]),
    "uint64": (lambda state, last: (state, last.astype("u8")), TypeError, ["last_step", "int64"]),
    "big-endian": (lambda state, last: (state, last.astype(">i8")), TypeError, ["last_step", "int64"]),
    "float": (lambda state, last: (state, last.astype("f8")), TypeError, ["last_step", "int64"]),
    "short": (lambda state, last: (state, last[:-1].copy()), ValueError, ["last_step", "(3,)", "(4,)"]),
    "long": (lambda state, last: (state, np.zeros(5, int)), ValueError, ["last_step", "(5,)", "(4,)"]),
    "column": (lambda state, last: (state, last[:, None].copy()), ValueError, ["last_step", "(4, 1)"]),
    "scalar": (lambda state, last: (state, np.array(0)), ValueError, ["last_step", "()", "(4,)"]),
    "read-only": (lambda state, last: (state, read_only(last)), ValueError, ["last_step", "writable"]),
    "strided": (lambda state, last: (state, np.zeros(8, int)[::2]), ValueError, ["last_step", "contiguous"]),
    "masked": (lambda state, last: (state, np.ma.masked_array(last)), TypeError, ["last_step", "mask"]),
    "state None": (lambda state, last: (None, last), TypeError, ["state 'mom'", "None"]),
    "state short": (lambda state, last: (state[:2].copy(), last), ValueError, ["state 'mom'", "(2, 3)"]),
}


@each_fused
@pytest.mark.parametrize("call", ["sparse", "dense", "flush"])
@pytest.mark.parametrize("name", LAST_STEPS)
def test_wrong_last_step(name, call, fused):
    change, error, words = LAST_STEPS[name]
    optimizer, weights, states = prepared("exact", fused)
    states[1] = change(*states[1])
    grads = [good(), good() if call == "sparse" else np.ones(SHAPE)]

    def function():
        if call == "flush":
            optimizer.flush([0, 1], weights, states)
        else:
            optimizer.update([0, 1], weights, grads, states)

    refused(error, ["parameter 1 ('second')", *words], optimizer, [weights, states], function)


def test_states_of_another_mode():
    """States with last_step do not fit a lazy optimizer, nor the reverse."""
    lazy, weights, states = prepared("lazy")
    exact, others, stamped = prepared("exact")
    words = ["parameter 0 ('first')", "state"]
    for optimizer, arrays, wrong in ((lazy, weights, stamped), (exact, others, states)):
        for grad in (good(), np.ones(SHAPE)):
            refused(
                TypeError,
                words,
                optimizer,
                [arrays, wrong],
                lambda: optimizer.update([0], arrays[:1], [grad], wrong[:1]),  # noqa: B023
            )


@each_fused
def test_flush_with_bad_arguments(fused):
    optimizer, weights, states = prepared("exact", fused)
    things = [weights, states]
    for args, error, word in [
        (([0], weights, states), ValueError, "weights"),
        (([0, 1], weights[:1], states), ValueError, "weights"),
        (([0, 1], weights, states[:1]), ValueError, "states"),
        (([0, 0], weights, states), ValueError, "indices"),
        ((0, weights[0], states[0]), TypeError, "indices"),
        (([0, 1], [weights[0], None], states), TypeError, "parameter 1 ('second')"),
        (([0, 1], [weights[0], weights[1][:2].copy()], states), ValueError, "parameter 1 ('second')"),
        (([0, 1], [weights[0], read_only(weights[1])], states), ValueError, "read-only"),
        (([0, 1], [weights[0], weights[0]], states), ValueError, "shares memory"),
        (([0, 1], [weights[0], good()], states), TypeError, "parameter 1 ('second')"),
    ]:
        refused(error, [word], optimizer, things, lambda: optimizer.flush(*args))  # noqa: B023
    optimizer.flush([0, 1], weights, states)


# ---------------------------------------------------------------- the rest of a call


@each_fused
@each_mode
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w, s: (good(), s), TypeError, ["weight of parameter 1", "RowSparse"]),
        (lambda w, s: (csr(), s), TypeError, ["weight of parameter 1", "csr"]),
        (lambda w, s: (None, s), TypeError, ["weight of parameter 1", "None"]),
        (lambda w, s: (read_only(w), s), ValueError, ["weight of parameter 1", "read-only"]),
        (lambda w, s: (w.astype(int), s), TypeError, ["weight of parameter 1", "int64"]),
        (lambda w, s: (w.astype("c16"), s), TypeError, ["weight of parameter 1", "complex128"]),
        (lambda w, s: (np.ma.masked_array(w), s), TypeError, ["weight of parameter 1", "mask"]),
        (lambda w, s: (w[:3].copy(), s), ValueError, ["(4, 3)", "(3, 3)"]),
        (lambda w, s: (np.array(w[0, 0]), s), ValueError, ["(4, 3)", "()"]),
        (lambda w, s: (w.ravel().copy(), s), ValueError, ["(4, 3)", "(12,)"]),
        (lambda w, s: (w, s.astype("f4")), TypeError, ["state 'mom'", "float32"]),
        (lambda w, s: (w, good()), TypeError, ["state 'mom'", "RowSparse"]),
        (lambda w, s: (w, w), ValueError, ["state 'mom'", "shares memory"]),
        (lambda w, s: (w, s[:3].copy()), ValueError, ["state 'mom'", "(3, 3)"]),
    ],
)
def test_weights_and_states_beside_sparse_gradients(change, error, words, mode, fused):
    optimizer, weights, states = prepared(mode, fused)
    if mode == "exact":
        weights[1], state = change(weights[1], states[1][0])
        states[1] = (state, states[1][1])
    else:
        weights[1], states[1] = change(weights[1], states[1])
    grads = [good(), good()]
    refused(
        error,
        ["parameter 1 ('second')", *words],
        optimizer,
        [weights, states, grads],
        lambda: optimizer.update([0, 1], weights, grads, states),
    )


@each_fused
@each_mode
@pytest.mark.parametrize(
    ("first", "second", "error", "words"),
    [
        (good, lambda: np.ones((2, 3)), ValueError, ["second", "(2, 3)"]),
        (good, lambda: None, TypeError, ["second", "None"]),
        (good, lambda: np.ones(SHAPE, int), TypeError, ["second", "int64"]),
        (lambda: np.ones(SHAPE), lambda: rows([9]), ValueError, ["second", "9 at position 0"]),
        (lambda: rows([9]), lambda: rows([8]), ValueError, ["first", "9 at position 0"]),
        (csr, lambda: csr(indices=put((0, 3))), ValueError, ["second", "3 at position 0"]),
        (good, lambda: [[1.0] * 3] * 4, TypeError, ["second", "list"]),
    ],
)
def test_one_bad_gradient_among_good_ones(first, second, error, words, mode, fused):
    optimizer, weights, states = prepared(mode, fused)
    grads = [first(), second()]
    refused(
        error,
        words,
        optimizer,
        [weights, states, grads],
        lambda: optimizer.update([0, 1], weights, grads, states),
    )


@each_fused
@each_mode
def test_hyper_parameters_that_are_not_finite(mode, fused):
    """What was behind stays behind."""
    optimizer, weights, states = prepared(mode, fused)
    good_rate = optimizer.lr
    for name, value in (("rescale_grad", np.nan), ("rescale_grad", np.inf), ("lr", np.nan), ("wd", np.nan)):
        changed = copy.deepcopy(optimizer)
        setattr(changed, name, value)
        before = table.content(weights, states), histories(changed), changed.num_update
        for grad in (good(), csr(), np.ones(SHAPE)):
            with pytest.raises(ValueError, match="finite"):
                changed.update([0], weights[:1], [grad], states[:1])
            assert (table.content(weights, states), histories(changed), changed.num_update) == before
    assert optimizer.lr == good_rate


@each_fused
@each_mode
def test_groupadagrad_wants_matrices(mode, fused):
    """A sparse gradient of a vector fits the vector, but the optimizer does not."""
    optimizer = numba_opt.GroupAdaGrad(sparse_update=mode, use_fused_step=fused)
    for shape in ((4,), (4, 3, 2)):
        weight, history = np.ones(shape), np.zeros((4, 1))
        state = (history, np.zeros(4, np.int64)) if mode == "exact" else history
        grad = RowSparse([1], np.ones((1, *shape[1:])), shape)
        refused(
            ValueError,
            ["weight of parameter 0", str(shape), "2 dimensions"],
            optimizer,
            [weight, state],
            lambda: optimizer.update([0], [weight], [grad], [state]),  # noqa: B023
        )


@each_fused
@each_mode
def test_weights_without_dimensions(mode, fused):
    optimizer = numba_opt.NAG(sparse_update=mode, use_fused_step=fused)
    weight = np.array(1.0)
    state = optimizer.create_state(0, weight)
    grad = RowSparse([0], [1.0], (1,))
    refused(
        ValueError,
        ["gradient of parameter 0", "(1,)", "()"],
        optimizer,
        [weight, state],
        lambda: optimizer.update([0], [weight], [grad], [state]),
    )
    for _ in range(2):
        optimizer.update([0], [weight], [np.array(0.5)], [state])
    optimizer.flush([0], [weight], [state])
    assert weight < 1


@pytest.mark.parametrize("value", ["eager", "", None, True, 1, "LAZY"])
def test_sparse_update(value):
    with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
        numba_opt.NAG(sparse_update=value)
