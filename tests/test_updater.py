"""`Updater`: states made when first needed, several parameters in one call, states as bytes."""

from __future__ import annotations

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

import numba_opt
from numba_opt import lr_scheduler
from numba_opt.checkpoint import CheckpointError

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
