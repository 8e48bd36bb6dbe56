"""`Updater`: states made when first needed, several parameters in one call, states as bytes."""

from __future__ import annotations

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

import numba_opt
from numba_opt import lr_scheduler
from numba_opt.io import checkpoint, description
from numba_opt.io.checkpoint import CheckpointError

from . import table


@table.each
def test_states_are_made_when_first_seen(row):
    call = table.make(row, [(4, 3), (2, 2)])
    updater = numba_opt.get_updater(table.build(row))
    assert isinstance(updater, numba_opt.Updater)
    assert updater.states == {}
    updater(1, call.grads[1], call.weights[1])
    assert list(updater.states) == [1]
    state = updater.states[1]
    updater(0, call.grads[0], call.weights[0])
    updater(1, call.grads[1], call.weights[1])
    assert list(updater.states) == [1, 0]
    assert updater.states[1] is state
    assert updater.optimizer._index_update_count == {1: 2, 0: 1}


@table.each
@pytest.mark.parametrize("fused", [True, False])
def test_equals_update(row, fused):
    call = table.make(row, [(4, 3), (2, 2), (5, 1)])
    optimizer = table.build(row, use_fused_step=fused)
    expected = call.copy()
    states = list(map(optimizer.create_state, expected.indices, expected.weights))
    updater = numba_opt.get_updater(table.build(row, use_fused_step=fused))
    for _ in range(2):
        optimizer.update(expected.indices, expected.weights, expected.grads, states)
        updater(call.indices, call.grads, call.weights)
    table.assert_bits(call.weights, expected.weights)
    table.assert_bits(list(updater.states.values()), states)


@pytest.mark.parametrize(
    ("aggregate", "sizes"), [(None, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5]), (np.inf, [5])]
)
def test_aggregate_num(aggregate, sizes, monkeypatch):
    optimizer = numba_opt.NAG(aggregate_num=aggregate)
    called = []
    plain = optimizer.update_multi_precision

    def update(indices, *rest):
        called.append(list(indices))
        plain(indices, *rest)

    monkeypatch.setattr(optimizer, "update_multi_precision", update)
    weights = [np.ones(3) for _ in range(5)]
    numba_opt.Updater(optimizer)(list("abcde"), [np.ones(3)] * 5, weights)
    assert list(map(len, called)) == sizes
    assert [index for part in called for index in part] == list("abcde")
    table.assert_bits(weights, [weights[0]] * 5)
    assert optimizer.num_update == 1


def test_empty_call():
    for aggregate in (1, 4, np.inf):
        updater = numba_opt.Updater(numba_opt.NAG(aggregate_num=aggregate))
        updater([], [], [])
        assert updater.states == {}
        assert updater.optimizer.num_update == 0


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_master_copies(half):
    updater = numba_opt.get_updater(numba_opt.NAG(multi_precision=True))
    weight = np.ones(3, half)
    updater(0, np.ones(3, half), weight)
    master, mom = updater.states[0]
    assert master.dtype == mom.dtype == np.float32
    table.assert_bits(weight.astype("f4"), master.astype(half).astype("f4"))


# ---------------------------------------------------------------- states as bytes


def trained(row, steps=2, **kwargs):
    """An updater after some steps, and the call that made them."""
    call = table.make(row, [(4, 3), (2, 2)])
    call = call._replace(indices=[0, "encoder.weight"])
    updater = numba_opt.get_updater(table.build(row, **kwargs))
    for _ in range(steps):
        updater(call.indices, call.grads, call.weights)
    return updater, call


@table.each
@pytest.mark.parametrize("dump_optimizer", [True, False])
def test_round_trip(row, dump_optimizer):
    updater, call = trained(row)
    content = updater.get_states(dump_optimizer)
    assert type(content) is bytes
    fresh = numba_opt.get_updater(table.build(row))
    fresh.set_states(content)
    table.assert_bits(list(fresh.states.values()), list(updater.states.values()))
    assert list(fresh.states) == list(updater.states) == call.indices
    assert fresh.optimizer.num_update == (2 if dump_optimizer else 0)
    if not dump_optimizer:  # the counts are the caller's business then
        fresh.optimizer.num_update = 2
        fresh.optimizer._index_update_count = dict.fromkeys(call.indices, 2)
    other = call.copy()
    for _ in range(2):
        updater(call.indices, call.grads, call.weights)
        fresh(other.indices, other.grads, other.weights)
    table.assert_bits(call.weights, other.weights)
    table.assert_bits(list(fresh.states.values()), list(updater.states.values()))


@table.each
def test_what_comes_back_is_its_own(row):
    updater, call = trained(row)
    before = table.content(list(updater.states.values()))
    fresh = numba_opt.get_updater(table.build(row))
    fresh.set_states(updater.get_states())
    fresh(call.indices, call.grads, [weight.copy() for weight in call.weights])
    assert table.content(list(updater.states.values())) == before


@table.each
def test_dump_optimizer_brings_the_optimizer(row):
    scheduler = lr_scheduler.CosineScheduler(20, 0.5, 0.1, warmup_steps=3)
    options = table.common(row) | {"learning_rate": None, "begin_num_update": 5}
    updater, _ = trained(row, **options, lr_scheduler=scheduler)
    updater.optimizer.set_lr_mult({0: 0.5, "a": 0.25})
    updater.optimizer.set_wd_mult({"b": 2.0})
    other = lr_scheduler.CosineScheduler(7, 0.3)
    fresh = numba_opt.get_updater(table.build(row, learning_rate=None, lr_scheduler=other))
    fresh.set_states(updater.get_states(dump_optimizer=True))
    a, b = updater.optimizer, fresh.optimizer
    for name in ("rescale_grad", "clip_gradient", "wd", "begin_num_update", "num_update", "learning_rate"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("lr_mult", "wd_mult", "_index_update_count"):
        assert getattr(a, name) == getattr(b, name), name
    assert b.lr_scheduler is other
    assert vars(other) == vars(scheduler)


def test_the_set_learning_rate_comes_back():
    updater, _ = trained(table.row("ftml"))
    updater.optimizer.set_learning_rate(0.0625)
    fresh = numba_opt.get_updater(numba_opt.FTML(0.5))
    fresh.set_states(updater.get_states(dump_optimizer=True))
    assert fresh.optimizer.learning_rate == 0.0625


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("multi_precision", [True, False])
def test_round_trip_of_half_precision(half, multi_precision, recwarn):
    updater = numba_opt.get_updater(numba_opt.Adamax(multi_precision=multi_precision))
    weight = np.ones((2, 3), half)
    updater(0, np.full((2, 3), 0.3, half), weight)
    fresh = numba_opt.get_updater(numba_opt.Adamax(multi_precision=multi_precision))
    fresh.set_states(updater.get_states())
    found, expected = table.leaves(fresh.states[0]), table.leaves(updater.states[0])
    assert [a.dtype for a in found] == [a.dtype for a in expected]
    table.assert_bits([a.astype("f4") for a in found], [a.astype("f4") for a in expected])


def test_shapes_come_back():
    updater = numba_opt.get_updater(numba_opt.NAG())
    shapes = [(), (0,), (0, 3), (1,), (2, 3, 4)]
    for k, shape in enumerate(shapes):
        updater(k, np.ones(shape), np.ones(shape))
    updater.states[9] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    fresh = numba_opt.get_updater(numba_opt.NAG())
    fresh.set_states(updater.get_states())
    assert [fresh.states[k].shape for k in range(5)] == shapes
    table.assert_bits(fresh.states[9], updater.states[9])


def test_no_states_yet():
    updater = numba_opt.get_updater(numba_opt.NAG())
    fresh = numba_opt.get_updater(numba_opt.NAG())
    fresh.states[0] = np.ones(3)
    fresh.set_states(updater.get_states())
    assert fresh.states == {}


# ---------------------------------------------------------------- bytes that are refused


def assert_refused(updater, content, match=None):
    updater.optimizer.checked_rule()  # is looked at once
    states, optimizer = dict(updater.states), dict(vars(updater.optimizer))
    before = table.content(list(states.values()))
    with pytest.raises(CheckpointError, match=match):
        updater.set_states(content)
    assert list(updater.states) == list(states)
    assert all(updater.states[k] is states[k] for k in states)
    assert table.content(list(states.values())) == before
    assert vars(updater.optimizer) == optimizer


@pytest.mark.parametrize("dump_optimizer", [True, False])
def test_damaged_bytes(dump_optimizer):
    updater, _ = trained(table.row("ftml"))
    target, _ = trained(table.row("ftml"))
    content = updater.get_states(dump_optimizer)
    for end in [0, 1, 7, 8, 9, len(content) // 2, len(content) - 1]:
        assert_refused(target, content[:end])
    assert_refused(target, content + b"\0")
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        assert_refused(target, bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not a checkpoint", pickle.dumps({0: None})])
def test_bytes_of_something_else(content):
    updater, _ = trained(table.row("nag"))
    assert_refused(updater, content)


def test_other_safetensors():
    import safetensors.numpy

    updater, _ = trained(table.row("nag"))
    assert_refused(updater, safetensors.numpy.save({"a": np.ones(2, np.float32)}), "not a checkpoint")


def test_a_pickle_is_never_executed():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("executed",)

    updater, _ = trained(table.row("nag"))
    assert_refused(updater, pickle.dumps(Bomb()))


def test_states_of_another_optimizer():
    updater, _ = trained(table.row("adamax"))
    target, _ = trained(table.row("ftml"))
    assert_refused(target, updater.get_states(dump_optimizer=True), "Adamax.*FTML")
    centered, _ = trained(table.row("rmsprop-centered"))
    plain, _ = trained(table.row("rmsprop"))
    assert_refused(plain, centered.get_states(dump_optimizer=True), "states")
    scheduled, _ = trained(table.row("nag"), learning_rate=None, lr_scheduler=lr_scheduler.FactorScheduler(3))
    target, _ = trained(table.row("nag"))
    assert_refused(target, scheduled.get_states(dump_optimizer=True), "lr_scheduler")


def test_content_is_plain():
    """Arrays and JSON: whoever reads the file needs neither this package nor any trust."""
    updater, _ = trained(table.row("ftml"))
    content = updater.get_states(dump_optimizer=True)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}
    assert json.loads(header["__metadata__"]["numba_opt"])["values"]["optimizer"]["name"] == "FTML"


# ---------------------------------------------------------------- as in MXNet


def test_training_as_in_mxnet():
    """A loop over parameters, states saved in the middle and taken up by another process's updater."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((64, 3)), rng.standard_normal(64)

    def grads(params):
        residual = x @ params[0] + params[1] - y
        return [x.T @ residual, residual.sum(keepdims=True)]

    def train(updater, params, steps):
        for _ in range(steps):
            for index, (grad, param) in enumerate(zip(grads(params), params, strict=True)):
                updater(index, grad, param)

    def updater():
        optimizer = numba_opt.create("rmsprop", learning_rate=0.05, centered=True, rescale_grad=1 / 64)
        return numba_opt.get_updater(optimizer)

    one = [np.zeros(3), np.zeros(1)]
    train(updater(), one, 20)
    two, first, second = [np.zeros(3), np.zeros(1)], updater(), updater()
    train(first, two, 10)
    second.set_states(first.get_states(dump_optimizer=True))
    train(second, two, 10)
    table.assert_bits(two, one)
    assert np.abs(grads(one)[0]).max() < np.abs(grads([np.zeros(3), np.zeros(1)])[0]).max() / 2


# ---------------------------------------------------------------- states that are not the optimizer's


def content_of(states, optimizer=None, histories=()):
    """What `get_states` of an updater with these states gives."""
    arrays = {}
    values = {"states": list(map(list, states.items())), "optimizer": optimizer, "histories": list(histories)}
    return checkpoint.to_bytes(arrays, checkpoint.take_apart(values, arrays))


A, F8, F2 = np.ones((3, 2), "f4"), np.ones((3, 2)), np.ones((3, 2), "f2")
MARKS, ROWS = np.zeros(3, "i8"), np.ones((2, 5), "f4")


@pytest.mark.parametrize(
    ("optimizer", "state", "match"),
    [
        (numba_opt.NAG(), None, "states.0. is None; expected mom$"),
        (numba_opt.NAG(), (A, A), r"is \(array, array\); expected mom$"),
        (numba_opt.NAG(), (A, MARKS), r"is \(array, array\); expected mom$"),
        (numba_opt.NAG(momentum=0), A, "is array; expected None"),
        (numba_opt.Adamax(), A, r"is array; expected \(mean, var\)"),
        (numba_opt.Adamax(), (A, A, A), r"expected \(mean, var\)"),
        (numba_opt.Adamax(), (A, None), r"is \(array, None\); expected \(mean, var\)"),
        (numba_opt.Adamax(), (A, A[:2]), r"float32, shape \(2, 2\); expected one of float32, shape \(3, 2\)"),
        (numba_opt.Adamax(), (A, F8), "float64, shape .*; expected one of float32"),
        (numba_opt.FTML(), (A, A), r"expected \(d, v, z\)"),
        (numba_opt.NAG(), np.ones(3, "i8"), "is int64; expected float32, float64, float16 or bfloat16"),
        (numba_opt.NAG(), "text", "has 'text'; expected arrays"),
        (numba_opt.NAG(), {"a": A}, "has a dict; expected arrays"),
        (numba_opt.NAG(multi_precision=True), (A, (A, A)), r"expected mom or \(float32 weight, mom\)"),
        (
            numba_opt.NAG(multi_precision=True),
            (F2, F2),
            "float32 weight of .* float16, .*; expected one of",
        ),
        (numba_opt.NAG(multi_precision=True), (A, F2), "float16, .*; expected one of float32"),
        (
            numba_opt.NAG(multi_precision=True),
            (A, A[:1]),
            r"\(1, 2\); expected one of float32, shape \(3, 2\)",
        ),
        (numba_opt.NAG(state_dtype="float16"), A, "float32, .*; expected one of float16"),
        (numba_opt.NAG(state_dtype="bfloat16", multi_precision=True), (A, A), "expected one of bfloat16"),
        (numba_opt.GroupAdaGrad(multi_precision=True), (A, A), r"expected one of float32, shape \(3, 1\)"),
        (numba_opt.NAG(sparse_update="exact"), A, r"is array; expected \(mom, last_step\)"),
        (numba_opt.NAG(sparse_update="exact"), (A, None), r"is \(array, None\); expected \(mom, last_step\)"),
        (
            numba_opt.NAG(sparse_update="exact"),
            (A, MARKS[:2]),
            r"last_step .*\(2,\); expected .*\(3,\)",
        ),
        (
            numba_opt.NAG(sparse_update="exact"),
            (A, A[:, 0]),
            "last_step of .* float32.*; expected one of int64",
        ),
        (
            numba_opt.NAG(sparse_update="exact"),
            (A, MARKS + 1),
            "states.0. go from 1 to 1; expected 0 to 0,",
        ),
        (
            numba_opt.NAG(sparse_update="exact"),
            (A, MARKS - 1),
            "go from -1 to -1; expected 0 to 0",
        ),
    ],
)
def test_states_of_another_form(optimizer, state, match):
    updater = numba_opt.get_updater(optimizer)
    updater.states[5] = np.ones(3)
    assert_refused(updater, content_of({0: state}), match)


@pytest.mark.parametrize(
    ("state", "rows", "match"),
    [
        ((A, MARKS + 3), ROWS, "go from 3 to 3; expected 0 to 2, the steps recorded"),
        (
            (A, MARKS),
            ROWS[:, :4],
            r"histories\[0\] is .*\(2, 4\); expected .* 5 in each row",
        ),
        ((A, MARKS), np.ones((2, 7), "f4"), "5 in each row"),  # as with stochastic rounding
        ((A, MARKS), ROWS[0], "5 in each row"),
        ((A, MARKS), ROWS.astype("i4"), "int32"),
        ((A, MARKS), ROWS.astype("f8"), "are float64; expected float32, as the state"),
        ((F8, MARKS), ROWS, "are float32; expected float64, as the state"),
        ((A, MARKS), ROWS * np.nan, "expected numbers"),
        ((A, MARKS), None, "is None; expected numbers"),
    ],
)
def test_histories_of_another_form(state, rows, match):
    updater = numba_opt.get_updater(numba_opt.NAG(sparse_update="exact"))
    weight = np.ones((3, 2), "f4")
    updater(0, numba_opt.RowSparse([1], np.ones((1, 2), "f4"), (3, 2)), weight)
    before = updater.optimizer._deferred[0].rows().copy()
    assert_refused(updater, content_of({0: state}, histories=[[0, rows]]), match)
    table.assert_bits([updater.optimizer._deferred[0].rows()], [before])


def test_a_history_that_the_optimizer_has_no_use_for():
    updater = numba_opt.get_updater(numba_opt.NAG())
    match = "histories.0., of an optimizer with sparse_update='exact'; this one has 'lazy'"
    assert_refused(updater, content_of({0: A}, histories=[[0, ROWS]]), match)


@table.each
def test_bytes_of_each_other_optimizer(row):
    """They are refused, or look like states of this one; then a step works, or sees that shapes differ."""
    for other in table.TABLE:
        for mode in ("lazy", "exact"):
            updater, call = trained(other, sparse_update=mode)
            target = numba_opt.get_updater(table.build(row))
            content = updater.get_states()
            if mode == "exact" or row.states != other.states or row.cls.per_row > other.cls.per_row:
                assert_refused(target, content, "expected")
                continue
            target.set_states(content)
            if row.cls.per_row == other.cls.per_row or not row.states:
                target(call.indices, call.grads, call.weights)
            else:
                with pytest.raises(ValueError, match="shape"):
                    target(call.indices, call.grads, call.weights)


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ([[0, A], [0, A]], "have the index 0 twice"),
        ([[[0], A]], "have the index a list of 1; expected a number, text or tuple"),
        ([[A, A]], "have the index an array of float32"),
        ([[{"a": 1}, A]], "have the index a dict"),
        ([[0]], "states are a list of 1; expected a list of pairs"),
        ([0], "expected a list of pairs"),
        (5, "'states' of the checkpoint is 5; expected a list"),
        ({"a": A}, "'states' of the checkpoint is a dict; expected a list"),
    ],
)
def test_indices_of_another_form(pairs, match):
    arrays = {}
    values = checkpoint.take_apart({"states": pairs, "optimizer": None, "histories": []}, arrays)
    updater, _ = trained(table.row("nag"))
    assert_refused(updater, checkpoint.to_bytes(arrays, values), match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("name", "FTML", "of FTML; this optimizer is NAG"),
        ("name", None, "'name' of the checkpoint's optimizer is None; expected a text"),
        ("states", [], "has the states none; this one has mom"),
        ("states", "mom", "'states' of .* is 'mom'; expected a list"),
        ("hyper", [], "'hyper' of .* is a list of 0; expected a dict"),
        ("hyper", {"momentum": "much"}, "hyper-parameters are not NAG's: momentum must be a finite number"),
        ("num_update", -1, "num_update must be an integer >= 0, got -1"),
        ("num_update", 1.5, "'num_update' of .* is 1.5; expected a whole number"),
        ("num_update", True, "is True; expected a whole number"),
        ("num_update", 10**400, "num_update is a number of 1329 bits; expected less than"),
        ("counts", [[0, -1]], r"counts\[0\] must be an integer >= 0, got -1"),
        ("counts", [[0, 1], [0, 2]], "counts have the index 0 twice"),
        ("counts", [[[], 1]], "counts have the index a list of 0"),
        ("counts", {"0": 1}, "'counts' of .* is a dict; expected a list"),
        ("lr_mult", [["a", None]], r"lr_mult\['a'\] must be a finite number >= 0, got None"),
        ("wd_mult", [["a", -1]], r"wd_mult\['a'\] must be a finite number >= 0, got -1"),
        ("scheduler", ["FactorScheduler", {}], "lr_scheduler is FactorScheduler; this optimizer's is None"),
        ("scheduler", 5, "'scheduler' of .* is 5; expected"),
    ],
)
def test_descriptions_of_another_form(name, value, match):
    updater, _ = trained(table.row("nag"))
    described = description.describe(updater.optimizer) | {name: value}
    assert_refused(updater, content_of({0: A}, described), match)
    del described[name]
    assert_refused(updater, content_of({0: A}, described), f"lacks '{name}'")


@pytest.mark.parametrize(
    ("position", "match"),
    [
        ({"step": [0]}, r"step\[0\] must be an integer >= 1, got 0"),
        ({"step": 3}, "has 'step': 3; this one has a list of 2"),
        ({"factor": "x"}, "has 'factor': 'x'; this one has 1"),
        ({"base_lr": None, "decayed": 5}, "has 'decayed': 5; this one has no such attribute"),
        ({"base_lr": -1.0}, "base_lr must be a finite number"),
        ([], "is at a list of 0; expected a dict"),
    ],
)
def test_schedules_of_another_form(position, match):
    scheduler = lr_scheduler.MultiFactorScheduler([3, 5])
    updater, _ = trained(table.row("nag"), learning_rate=None, lr_scheduler=scheduler)
    described = description.describe(updater.optimizer) | {"scheduler": ["MultiFactorScheduler", position]}
    before = dict(vars(scheduler))
    assert_refused(updater, content_of({0: A}, described), match)
    assert vars(scheduler) == before


def test_coefficients_that_the_rule_does_not_take():
    """Of the centered RMSProp there is one more than the plain one's rule has."""
    updater, _ = trained(table.row("rmsprop"))
    described = description.describe(updater.optimizer)
    described["hyper"]["centered"] = True
    assert_refused(updater, content_of({0: A}, described), r"takes 5 coefficients .* hyper returned 6")


def test_states_of_one_s_own_making():
    """An optimizer that makes its states itself may have others than its rule's, and gets them back."""

    class Mine(numba_opt.NAG):
        def create_state(self, index, weight):
            return super().create_state(index, weight), None

    updater = numba_opt.get_updater(Mine())
    updater.states[0] = (A, (None, np.ones(7, "i8")))
    fresh = numba_opt.get_updater(Mine())
    fresh.set_states(updater.get_states(dump_optimizer=True))
    found, (nothing, numbers) = fresh.states[0]
    assert nothing is None
    table.assert_bits([found, numbers], [A, np.ones(7, "i8")])
