"""`Optimizer`: the registry, multipliers, learning rates, counts; optimizers as values."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt import lr_scheduler

from . import table


@pytest.fixture
def registry(monkeypatch):
    """The registry, for a test to change."""
    mine = dict(numba_opt.Optimizer.opt_registry)
    monkeypatch.setattr(numba_opt.Optimizer, "opt_registry", mine)
    return mine


# ---------------------------------------------------------------- the registry


@table.each
def test_create_by_name_in_any_case(row):
    name = row.cls.__name__
    for spelling in (name, name.lower(), name.upper()):
        optimizer = numba_opt.create(spelling, **row.kwargs, learning_rate=0.25)
        assert type(optimizer) is row.cls
        assert optimizer.learning_rate == 0.25
    assert numba_opt.Optimizer.opt_registry[name.lower()] is row.cls
    assert getattr(numba_opt, name) is row.cls


def test_names_for_mxnet_users():
    assert numba_opt.contrib.GroupAdaGrad is numba_opt.GroupAdaGrad
    assert numba_opt.create is numba_opt.Optimizer.create_optimizer
    assert numba_opt.register is numba_opt.Optimizer.register


def test_register(registry):
    @numba_opt.register
    class MyOwn(numba_opt.NAG):
        pass

    assert registry["myown"] is MyOwn
    assert isinstance(numba_opt.create("MYOWN", momentum=0.5), MyOwn)


def test_register_warns_when_a_name_is_taken(registry):
    class NAG(numba_opt.Optimizer):
        pass

    with pytest.warns(UserWarning, match=r"NAG replaces numba_opt\.optimizers\.nag\.NAG"):
        numba_opt.register(NAG)
    assert registry["nag"] is NAG


def test_register_again_is_quiet(registry):
    """A notebook's cell that runs again."""
    for _ in range(2):

        @numba_opt.register
        class MyOwn(numba_opt.NAG):
            pass

    assert registry["myown"] is MyOwn


@table.each
def test_constructor_arguments_are_mxnets(row):
    """Names and defaults, MXNet's own order; Adamax's use_fused_step is the documented exception."""
    expected = {
        "NAG": {"learning_rate": 0.1, "momentum": 0.9, "multi_precision": False},
        "RMSProp": {
            "learning_rate": 0.001,
            "rho": 0.9,
            "momentum": 0.9,
            "epsilon": 1e-8,
            "centered": False,
            "clip_weights": None,
        },
        "Adamax": {"learning_rate": 0.002, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
        "FTML": {"learning_rate": 0.0025, "beta1": 0.6, "beta2": 0.999, "epsilon": 1e-8},
        "GroupAdaGrad": {"learning_rate": 0.01, "epsilon": 1e-6},
    }
    if row.cls.__name__ not in expected:
        pytest.skip("not one of MXNet's five")
    parameters = inspect.signature(row.cls).parameters.values()
    found = {p.name: p.default for p in parameters if p.name != "kwargs"}
    ours = {"reduced": False} if row.cls is numba_opt.FTML else {}
    assert found == {**expected[row.cls.__name__], "use_fused_step": True, **ours}
    assert list(found) == [*expected[row.cls.__name__], "use_fused_step", *ours]


# ---------------------------------------------------------------- learning rates


def test_learning_rate_without_a_scheduler():
    assert numba_opt.Optimizer().learning_rate == 0.01
    assert numba_opt.NAG(None).learning_rate == 0.01
    optimizer = numba_opt.NAG(0.5)
    optimizer.set_learning_rate(0.25)
    assert optimizer.learning_rate == optimizer.lr == 0.25


def test_scheduler_sees_num_update():
    optimizer = numba_opt.NAG(None, lr_scheduler=lambda n: n / 8, momentum=0)
    weight, rates = np.zeros(1), []
    for _ in range(3):
        before = weight[0]
        optimizer.update([0], [weight], [np.ones(1)], [None])
        rates.append(before - weight[0])
        assert optimizer.learning_rate == optimizer.num_update / 8
    assert rates == [1 / 8, 2 / 8, 3 / 8]


def test_learning_rate_overrides_base_lr_with_a_warning():
    scheduler = lr_scheduler.FactorScheduler(5, base_lr=0.2)
    with pytest.warns(UserWarning, match=r"learning_rate=0.5 replaces the scheduler's base_lr=0.2") as record:
        optimizer = numba_opt.RMSProp(0.5, lr_scheduler=scheduler)
    assert record[0].filename == __file__
    assert scheduler.base_lr == optimizer.learning_rate == 0.5


def test_scheduler_alone_keeps_its_base_lr():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for learning_rate in (None, 0.2):
            scheduler = lr_scheduler.PolyScheduler(9, base_lr=0.2)
            assert numba_opt.NAG(learning_rate, lr_scheduler=scheduler).learning_rate == 0.2


def test_set_learning_rate_with_a_scheduler_is_an_error():
    optimizer = numba_opt.NAG(None, lr_scheduler=lr_scheduler.FactorScheduler(5))
    with pytest.raises(UserWarning, match="lr_scheduler"):
        optimizer.set_learning_rate(0.1)


# ---------------------------------------------------------------- multipliers


def moved(optimizer, indices, wd=False):
    """How far a step takes weights of 1 with a gradient of 1, or with weight decay alone."""
    weights = [np.ones(2) for _ in indices]
    grads = [np.full(2, 0.0 if wd else 1.0) for _ in indices]
    states = list(map(optimizer.create_state, indices, weights))
    optimizer.update(indices, weights, grads, states)
    return [1 - weight[0] for weight in weights]


@pytest.mark.parametrize("fused", [True, False])
def test_multipliers_by_index_and_by_name(fused):
    names = {0: "a", 1: "b", 2: "c"}
    optimizer = numba_opt.NAG(0.5, momentum=0, param_idx2name=names, use_fused_step=fused)
    optimizer.set_lr_mult({"b": 0.5, 2: 0.25, "unknown": 7.0})
    assert moved(optimizer, [0, 1, 2, 3]) == [0.5, 0.25, 0.125, 0.5]
    assert [optimizer._get_lr(i) for i in range(4)] == [0.5, 0.25, 0.125, 0.5]
    optimizer.set_lr_mult({0: 0.0})
    assert moved(optimizer, [0, 1, 2, 3]) == [0, 0.5, 0.5, 0.5]  # the earlier ones are gone


@pytest.mark.parametrize("fused", [True, False])
def test_weight_decay_multipliers(fused):
    optimizer = numba_opt.NAG(0.5, momentum=0, wd=0.5, param_idx2name={0: "a"}, use_fused_step=fused)
    optimizer.set_wd_mult({"a": 0.5, 1: 0.0})
    assert moved(optimizer, [0, 1, 2], wd=True) == [0.125, 0, 0.25]
    assert [optimizer._get_wd(i) for i in range(3)] == [0.25, 0, 0.5]


def test_an_index_comes_before_its_name():
    optimizer = numba_opt.NAG(1.0, param_idx2name={0: "a"})
    optimizer.set_lr_mult({"a": 0.5, 0: 0.25})
    assert optimizer._get_lr(0) == 0.25


def test_param_dict_comes_before_all():
    params = {0: SimpleNamespace(lr_mult=0.5, wd_mult=2.0)}
    optimizer = numba_opt.NAG(1.0, momentum=0, wd=0.25, param_dict=params, param_idx2name={0: "a", 1: "b"})
    optimizer.set_lr_mult({0: 0.1, "a": 0.2, "b": 0.25})
    optimizer.set_wd_mult({0: 0.1, 1: 0.5})
    assert [optimizer._get_lr(i) for i in range(3)] == [0.5, 0.25, 1.0]
    assert [optimizer._get_wd(i) for i in range(3)] == [0.5, 0.125, 0.25]
    params[0].lr_mult = 0.125  # the program's own objects: looked at anew in each step
    assert optimizer._get_lr(0) == 0.125


@table.each
@table.each_path
def test_multipliers_in_the_formula(row, path):
    call = table.make(row, [(5, 3), (4, 2)], "float64")
    options = table.common(row)
    optimizer = table.build(row, **options)
    optimizer.set_lr_mult({1: 0.5})
    optimizer.set_wd_mult({0: 3.0})
    expected = []
    for t, factors in enumerate([(1, 3), (0.5, 1)]):
        own = options | {"learning_rate": factors[0] * options["learning_rate"]}
        own |= {"wd": factors[1] * options["wd"]} if "wd" in options else {}
        expected.append(table.reference(row, call.weights[t], [call.grads[t]], call.states[t], **own))
    getattr(optimizer, path)(*call)
    for t in range(2):
        table.assert_near([call.weights[t], call.states[t]], expected[t], 1e-14)


# ---------------------------------------------------------------- counts


@table.each_path
def test_counts_are_each_parameters_own(path):
    row = table.row("adamax")
    call = table.make(row, [(3, 2), (2, 2)], "float64")
    optimizer = table.build(row, begin_num_update=4)
    assert optimizer.num_update == optimizer.begin_num_update == 4
    update = getattr(optimizer, path)
    first, second = ([[column[t]] for column in call] for t in range(2))
    expected = [
        table.reference(row, call.weights[t], [call.grads[t]] * n, call.states[t], t=4)
        for t, n in enumerate((3, 1))
    ]
    update(*first)
    update(*first)
    assert (optimizer.num_update, optimizer._index_update_count) == (6, {0: 6})
    update(*second)
    assert (optimizer.num_update, optimizer._index_update_count) == (6, {0: 6, 1: 5})
    update(*first)
    assert (optimizer.num_update, optimizer._index_update_count) == (7, {0: 7, 1: 5})
    for t in range(2):
        table.assert_near([call.weights[t], call.states[t]], expected[t], 1e-14)


def test_use_fused_step_chooses_the_path(monkeypatch):
    for fused, name in ((True, "fused_step"), (False, "step")):
        called = []
        optimizer = numba_opt.NAG(use_fused_step=fused)
        for path in ("step", "fused_step"):
            monkeypatch.setattr(optimizer, path, lambda *args, path=path, called=called: called.append(path))
        optimizer.update([], [], [], [])
        assert called == [name]


@table.each
def test_both_paths_may_alternate(row):
    call = table.make(row, [(6, 5)])
    expected = call.copy()
    mixed, plain = table.build(row), table.build(row)
    for k in range(4):
        getattr(mixed, ("step", "fused_step")[k % 2])(*call)
        plain.step(*expected)
    table.assert_near(table.outputs(call), table.outputs(expected), 1e-6)
    assert mixed.num_update == 4


def test_rescale_grad_may_change_at_any_time():
    optimizer = numba_opt.NAG(1.0, momentum=0)
    weight = np.zeros(1)
    for rescale in (1.0, 0.5, -0.25):
        optimizer.rescale_grad = rescale
        optimizer.update([0], [weight], [np.ones(1)], [None])
    assert weight[0] == -1.25


# ---------------------------------------------------------------- as a value


def used(row, **kwargs):
    """An optimizer with something in every corner."""
    options = table.common(row) | {"learning_rate": None}
    optimizer = table.build(
        row,
        **options,
        lr_scheduler=lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.25),
        param_idx2name={0: "a", 1: "b"},
        begin_num_update=3,
        **kwargs,
    )
    optimizer.set_lr_mult({"a": 0.5})
    optimizer.set_wd_mult({1: 2.0})
    return optimizer


@table.each
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(row, clone):
    params = {1: SimpleNamespace(lr_mult=1.0, wd_mult=1.0)}
    optimizer = used(row)
    call = table.make(row, [(4, 3), (2, 2)])
    optimizer.update(*call)
    optimizer.param_dict = params
    twin = clone(optimizer)
    assert type(twin) is row.cls
    assert twin.param_dict == {}  # objects of the program
    assert optimizer.param_dict is params
    optimizer.param_dict = {}
    assert (twin.num_update, twin._index_update_count) == (4, {0: 4, 1: 4})
    other = call.copy()
    for _ in range(2):
        optimizer.update(*call)
        twin.update(*other)
    table.assert_bits(table.outputs(call), table.outputs(other))
    assert twin.learning_rate == optimizer.learning_rate
    twin.update(*other)
    assert (twin.num_update, optimizer.num_update) == (7, 6)


@table.each
def test_repr_names_class_and_arguments(row):
    given = {**row.kwargs, "learning_rate": 0.125, "clip_gradient": 0.5, "begin_num_update": 3}
    optimizer = table.build(row, **{k: v for k, v in given.items() if k not in row.kwargs})
    text = repr(optimizer)
    assert text.startswith(f"{row.cls.__name__}(")
    assert all(f"{name}={getattr(optimizer, name)!r}" in text for name in given if name != "learning_rate")
    assert "learning_rate=0.125" in text
    assert repr(eval(text, vars(numba_opt))) == text


# ---------------------------------------------------------------- optimizers of one's own


class Momentum(numba_opt.Optimizer):
    """Written for MXNet: a `step`, and nothing that this package asks for."""

    def __init__(self, learning_rate=0.5, momentum=0.5, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum

    def create_state(self, index, weight):
        return np.zeros(weight.shape, weight.dtype)

    def step(self, indices, weights, grads, states):
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            lr, wd = self._get_lr(index), self._get_wd(index)
            grad = grad * self.rescale_grad + wd * weight
            state[:] = self.momentum * state - lr * grad / self._index_update_count[index]
            weight[:] += state


def test_a_subclass_with_a_step_alone():
    optimizer = Momentum(wd=0.5, rescale_grad=0.5, param_idx2name={1: "b"})
    assert not optimizer.use_fused_step
    optimizer.set_lr_mult({"b": 0.5})
    weights = [np.ones(1), np.ones(1)]
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(weights)]
    optimizer.update_multi_precision([0, 1], weights, [np.ones(1), np.ones(1)], states)
    assert [weight[0] for weight in weights] == [0.5, 0.75]
    optimizer.update([0], weights[:1], [np.ones(1)], states[:1])
    assert weights[0][0] == 0.5 - 0.25 - 0.5 * 0.75 / 2
    assert (optimizer.num_update, optimizer._index_update_count) == (2, {0: 2, 1: 1})
    optimizer._update_count([0, 1])
    assert optimizer._index_update_count == {0: 3, 1: 2}


def test_a_subclass_with_a_step_has_no_fused_step():
    with pytest.raises(TypeError, match="Momentum has no rule"):
        Momentum().fused_step([0], [np.ones(1)], [np.ones(1)], [None])
    with pytest.raises(TypeError, match="Optimizer has no rule"):
        numba_opt.Optimizer().update([0], [np.ones(1)], [np.ones(1)], [None])


def test_mxnet_style_subclass_in_an_updater():
    updater = numba_opt.get_updater(Momentum())
    weight = np.ones(1)
    updater(0, np.ones(1), weight)
    assert weight[0] == 0.5
    assert updater.states[0][0] == -0.5


def test_a_rule_that_comes_after_the_constructor():
    """`update` is compiled for it as for any other."""

    def rule(weight, grad, lr):
        return (weight - lr * grad,)

    class Late(numba_opt.Optimizer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.rule = rule

        def hyper(self, lr, t):
            return (lr,)

    assert Late().use_fused_step
    assert not Late(use_fused_step=False).use_fused_step
    assert not numba_opt.Optimizer().use_fused_step
    late = Late()
    late.use_fused_step = False
    assert not late.use_fused_step
