"""Rules that do not fit their class are refused when they are first used, and nothing has been written."""

from __future__ import annotations

import copy
import functools
import inspect

import numpy as np
import pytest
from numba import njit

import numba_opt
from numba_opt.core import rules
from numba_opt.scalar import sqrt

from . import table


class Momentum(numba_opt.Optimizer):
    """What the cases below are made of: one state, two coefficients."""

    state_names = ("mom",)

    def rule(weight, grad, mom, lr, decay):  # noqa: N805
        mom = decay * mom + grad
        return weight - lr * mom, mom

    def hyper(self, lr, t):
        return lr, 0.5


def variant(**changes):
    return type("Bad", (Momentum,), changes)


def starred(weight, grad, *rest):
    return weight, rest[0]


def keywords(weight, grad, mom, lr, decay, **rest):
    return weight, mom


def keyword_only(weight, grad, mom, lr, *, decay):
    return weight, mom


def with_default(weight, grad, mom, lr, decay=0.5):
    return weight, mom


def with_self(self, weight, grad, mom, lr, decay):
    return weight, mom


def short(weight, grad):
    return weight, grad


def no_tuple(weight, grad, mom, lr, decay):
    return weight - lr * grad


def a_list(weight, grad, mom, lr, decay):
    return [weight, mom]


def too_few(weight, grad, mom, lr, decay):
    return (weight,)


def too_many(weight, grad, mom, lr, decay):
    return weight, mom, grad


def nothing(weight, grad, mom, lr, decay):
    pass


def complex_result(weight, grad, mom, lr, decay):
    return weight, mom * 1j


def undefined(weight, grad, mom, lr, decay):
    return weight - scale(grad), mom  # noqa: F821


def undefined_in_a_branch(weight, grad, mom, lr, decay):
    return (weight, mom) if decay > 0 else (scale(weight), mom)  # noqa: F821


def unknown_attribute(weight, grad, mom, lr, decay):
    return weight - np.squareroot(grad), mom


def generator(weight, grad, mom, lr, decay):
    yield weight, mom


def swapped(weight, grad, var, mean, lr, decay):
    return weight, var, mean


def plain(weight, grad, mom, lr, decay):
    return weight, mom


def helper(x):
    return 2 * x


def calls_python(weight, grad, mom, lr, decay):
    return weight - helper(grad), mom


def text(weight, grad, mom, lr, decay):
    return weight - grad.upper(), mom


class Callable:
    def __call__(self, weight, grad, mom, lr, decay):
        return weight, mom

    def method(self, weight, grad, mom, lr, decay):
        return weight, mom


# What is wrong, and what the error says. Where the rule is not the one above, it names the rule's line.
WRONG = {
    "stars": ({"rule": staticmethod(starred)}, "no stars"),
    "double stars": ({"rule": staticmethod(keywords)}, "no stars"),
    "keyword only": ({"rule": staticmethod(keyword_only)}, "keyword only"),
    "default": ({"rule": staticmethod(with_default)}, "no defaults"),
    "self": ({"rule": with_self}, "takes (self, weight, grad, mom, lr, decay)", "rules get no self"),
    "class method": ({"rule": classmethod(plain)}, "a method of Bad"),
    "too few arguments": (
        {"rule": staticmethod(short)},
        "takes (weight, grad); expected (weight, grad, mom,",
    ),
    "no tuple": ({"rule": staticmethod(no_tuple)}, "must return a tuple", "did you mean (weight,)"),
    "list": ({"rule": staticmethod(a_list)}, "must return a tuple, got a list"),
    "nothing": ({"rule": staticmethod(nothing)}, "must return a tuple, got a NoneType"),
    "too few results": ({"rule": staticmethod(too_few)}, "returns 1 results; expected 2: (weight, mom)"),
    "too many results": ({"rule": staticmethod(too_many)}, "returns 3 results; expected 2"),
    "complex": ({"rule": staticmethod(complex_result)}, "must return numbers; result 1"),
    "undefined": ({"rule": staticmethod(undefined)}, "uses 'scale', which is not defined"),
    "branch": ({"rule": staticmethod(undefined_in_a_branch)}, "uses 'scale', which is not defined"),
    "attribute": ({"rule": staticmethod(unknown_attribute)}, "squareroot"),
    "method of a number": ({"rule": staticmethod(text)}, "upper"),
    "generator": ({"rule": staticmethod(generator)}, "not a generator"),
    "order of states": (
        {"rule": staticmethod(swapped), "state_names": ("mean", "var")},
        "its states are in another order",
    ),
    "callable object": ({"rule": Callable()}, "must be a plain function, got a Callable"),
    "method": ({"rule": Callable().method}, "a method of Callable"),
    "partial": ({"rule": staticmethod(functools.partial(plain))}, "must be a plain function, got a partial"),
    "compiled": ({"rule": njit(plain)}, "must be a plain function", "give the function that it was made of"),
    "builtin": ({"rule": max}, "must be a plain function"),
    "no function": ({"rule": 3}, "must be a plain function, got a int"),
    "states as a str": ({"state_names": "mom"}, "state_names must be a tuple", "('mom',)"),
    "states as a list": ({"state_names": ["mom"]}, "state_names must be a tuple of str, got ['mom']"),
    "states twice": ({"state_names": ("mom", "mom")}, "state_names must be all different"),
    "no name": ({"state_names": ("my mom",)}, "state_names must be names, got 'my mom'"),
    "number as a name": ({"state_names": (3,)}, "state_names must be names, got 3"),
    "too many states": ({"state_names": ("mom", "other")}, "returns 2 results; expected 3"),
    "too few states": ({"state_names": ()}, "returns 2 results; expected 1: (weight,)"),
    "per_row": ({"per_row": 2}, "per_row must be True or False, got 2"),
    "a coefficient too few": (
        {"hyper": lambda self, lr, t: (lr,)},
        "(lr, decay)",
        "hyper returned 1: (0.25,)",
    ),
    "a coefficient too many": ({"hyper": lambda self, lr, t: (lr, 1, 2)}, "takes 2", "hyper returned 3"),
    "a number for coefficients": ({"hyper": lambda self, lr, t: lr}, "must return a tuple", "got 0.25"),
    "a list of coefficients": ({"hyper": lambda self, lr, t: [lr, 0.5]}, "must return a tuple"),
    "text for a coefficient": ({"hyper": lambda self, lr, t: (lr, "0.5")}, "got '0.5' of type str"),
    "array for a coefficient": ({"hyper": lambda self, lr, t: (lr, np.ones(1))}, "of type ndarray"),
    "a large array": ({"hyper": lambda self, lr, t: np.ones((60, 60))}, "must return a tuple", "array([["),
    "None for coefficients": ({"hyper": lambda self, lr, t: None}, "must return a tuple"),
    "no hyper": ({"hyper": numba_opt.Optimizer.hyper}, "has no coefficients: define hyper(self, lr, t)"),
}

wrong = pytest.mark.parametrize("case", WRONG)


def line_of(rule):
    """Where a rule is, as errors say it, if that can be known."""
    rule = getattr(rule, "__func__", rule)
    for part in (rule, *(getattr(rule, name, None) for name in ("py_func", "func", "__call__"))):
        if hasattr(part, "__code__"):
            return f"{part.__code__.co_filename}:{part.__code__.co_firstlineno}"
    return f"a {type(rule).__name__}"


def assert_says(error, fragments, rule):
    message = str(error)
    assert message.startswith(f"rule of class Bad ({line_of(rule)})"), message
    assert len(message) < 500 + len(__file__)
    assert message.count("\n") < 2
    for fragment in fragments:
        assert fragment in message


def snapshot(optimizer, arrays):
    return table.content(arrays), optimizer.num_update, dict(optimizer._index_update_count)


@wrong
@table.each_path
def test_wrong_rules(case, path):
    changes, *fragments = WRONG[case]
    cls = variant(**changes)
    optimizer = cls(learning_rate=0.25)
    weights, grads = [np.ones(3), np.ones((2, 2))], [np.ones(3), np.ones((2, 2))]
    states = [np.zeros(3), np.zeros((2, 2))]
    before = snapshot(optimizer, (weights, grads, states))
    with pytest.raises(TypeError) as info:
        getattr(optimizer, path)([0, 1], weights, grads, states)
    assert_says(info.value, fragments, vars(cls).get("rule", Momentum.rule))
    assert snapshot(optimizer, (weights, grads, states)) == before


@wrong
def test_wrong_rules_in_a_trainer(case):
    changes, *fragments = WRONG[case]
    cls = variant(**changes)
    params = {"w": np.ones(3, np.float32)}
    with pytest.raises(TypeError) as info:
        numba_opt.Trainer(params, cls(learning_rate=0.25)).step({"w": np.ones(3, np.float32)})
    assert_says(info.value, fragments, vars(cls).get("rule", Momentum.rule))
    assert params["w"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------- rules that Numba refuses


def test_what_numba_refuses_is_said_in_a_line():
    optimizer = variant(rule=staticmethod(calls_python))(learning_rate=0.25)
    weight, grad, state = np.ones(3), np.ones(3), np.zeros(3)
    before = snapshot(optimizer, (weight, grad, state))
    with pytest.raises(TypeError, match="does not compile: Untyped global name 'helper'") as info:
        optimizer.fused_step([0], [weight], [grad], [state])
    assert_says(info.value, [], calls_python)
    assert type(info.value.__cause__).__name__ == "TypingError"
    assert snapshot(optimizer, (weight, grad, state)) == before
    optimizer.step([0], [weight], [grad], [state])  # Python takes it
    assert weight.tolist() == [-1, -1, -1]


def test_results_of_different_types_do_not_compile():
    def rule(weight, grad, mom, lr, decay):
        return (weight, mom) if mom > 0.1 else (weight, mom, grad)

    optimizer = variant(rule=staticmethod(rule))(learning_rate=0.25)
    weight = np.ones(3)
    with pytest.raises(TypeError, match="does not compile: ") as info:
        optimizer.update([0], [weight], [weight.copy()], [np.zeros(3)])
    assert_says(info.value, [], rule)


def test_a_warm_up_says_what_does_not_compile():
    optimizer = variant(rule=staticmethod(calls_python))(learning_rate=0.25)
    with pytest.raises(TypeError, match="does not compile: Untyped global name 'helper'") as info:
        numba_opt.warmup(optimizer, sparse=False)
    assert_says(info.value, [], calls_python)


def test_machine_code_for_a_gpu():
    pytest.importorskip("numba.cuda.dispatcher")
    pytest.importorskip("cuda.bindings.nvjitlink")
    from numba_opt.cuda import code as cuda_code
    from numba_opt.cuda import kernels as cuda

    rule = variant(rule=staticmethod(calls_python))(learning_rate=0.25)._rule()
    with pytest.raises(TypeError, match="does not compile: Untyped global name 'helper'") as info:
        cuda_code.compiled(cuda.dense(*rule, "f4 f4 f4"), (9, 0))
    assert_says(info.value, [], calls_python)


@np.errstate(all="raise")
def test_a_rule_that_python_cannot_run_on_numbers_is_compiled_to_count_its_results():
    import math

    def rule(weight, grad, mom, lr, decay):
        return weight - lr * math.acos(grad + 4.0), mom, grad  # out of range, in Python

    optimizer = variant(rule=staticmethod(rule))(learning_rate=0.25)
    weight = np.ones(3)
    with pytest.raises(TypeError, match="returns 3 results; expected 2"):
        optimizer.update([0], [weight], [weight.copy()], [np.zeros(3)])
    assert weight.tolist() == [1, 1, 1]


def test_a_rule_with_branches_is_not_applied_to_whole_arrays():
    """Not even to the first one, which has a single element, so that Python can tell which branch to take."""

    def rule(weight, grad, mom, lr, decay):
        if grad > 0:
            return weight - lr, mom
        return weight + lr, mom

    optimizer = variant(rule=staticmethod(rule))(learning_rate=0.25)
    weights, states = [np.ones(1), np.ones(2)], [np.zeros(1), np.zeros(2)]
    grads = [np.ones(1), np.ones(2)]
    before = snapshot(optimizer, (weights, grads, states))
    with pytest.raises(TypeError, match="cannot be applied to whole arrays, as step does") as info:
        optimizer.step([0, 1], weights, grads, states)
    assert_says(info.value, ["ValueError"], rule)
    assert snapshot(optimizer, (weights, grads, states)) == before
    optimizer.fused_step([0, 1], weights, grads, states)
    assert weights[1].tolist() == [0.75, 0.75]


# ---------------------------------------------------------------- from step to step


def other(weight, grad, mom, lr, decay, third):
    return weight - lr * third, mom


CHANGES = {
    "a rule with a coefficient more": (lambda o: setattr(o, "rule", other), "takes 3", "hyper returned 2"),
    "a rule without its state": (lambda o: setattr(o, "rule", no_tuple), "must return a tuple"),
    "states": (lambda o: setattr(o, "state_names", ("mom", "more")), "returns 2 results; expected 3"),
    "states as a str": (lambda o: setattr(o, "state_names", "mom"), "state_names must be a tuple"),
    "per_row": (lambda o: setattr(o, "per_row", 1), "per_row must be True or False"),
    "hyper": (lambda o: setattr(o, "hyper", lambda lr, t: (lr,)), "takes 2", "hyper returned 1"),
    "code": (lambda o: setattr(o.rule.__func__, "__code__", other.__code__), "has changed"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("how", ["update", "step", "trainer"])
def test_changes_between_steps(case, how):
    change, *fragments = CHANGES[case]
    rule = types_copy(Momentum.rule)
    optimizer = variant(rule=rule)(learning_rate=0.25)
    weight, grad, state = np.ones(3), np.ones(3), np.zeros(3)
    trainer = numba_opt.Trainer([weight], optimizer) if how == "trainer" else None

    def step():
        if trainer is not None:
            trainer.step([grad])
        else:
            getattr(optimizer, how)([0], [weight], [grad], [state])

    step()
    before = snapshot(optimizer, (weight, grad, state))
    change(optimizer)
    for _ in range(2):
        with pytest.raises((TypeError, RuntimeError)) as info:
            step()
        assert_says(info.value, fragments, optimizer.rule)
        assert snapshot(optimizer, (weight, grad, state)) == before


def types_copy(function):
    """A function of its own with the same code."""
    return type(function)(function.__code__, function.__globals__, function.__name__)


@pytest.mark.parametrize("how", ["update", "trainer"])
def test_another_rule_that_fits_is_used(how):
    def doubled(weight, grad, mom, lr, decay):
        return weight - 2 * lr * grad, mom

    optimizer = Momentum(learning_rate=0.25)
    weight, state = np.ones(3), np.zeros(3)
    trainer = numba_opt.Trainer([weight], optimizer)
    step = {
        "update": lambda: optimizer.update([0], [weight], [np.ones(3)], [state]),
        "trainer": lambda: trainer.step([np.ones(3)]),
    }[how]
    step()
    assert weight.tolist() == [0.75] * 3
    optimizer.rule = doubled
    step()
    assert weight.tolist() == [0.25] * 3


def test_a_trainer_refuses_other_states():
    optimizer = Momentum(learning_rate=0.25)
    weight = np.ones(3)
    trainer = numba_opt.Trainer([weight], optimizer)
    trainer.step([np.ones(3)])
    optimizer.rule, optimizer.state_names = swapped, ("var", "mean")
    with pytest.raises(TypeError, match=r"optimizer has 2 states now \(var, mean\); expected 1"):
        trainer.step([np.ones(3)])
    assert weight.tolist() == [0.75] * 3


def test_hyper_that_returns_more_later():
    def hyper(self, lr, t):
        return (lr, 0.5) if t < 3 else (lr, 0.5, 0.5)

    optimizer = variant(hyper=hyper)(learning_rate=0.25)
    weight, grad, state = np.ones(3), np.ones(3), np.zeros(3)
    for _ in range(2):
        optimizer.update([0], [weight], [grad], [state])
    before = snapshot(optimizer, (weight, grad, state))
    with pytest.raises(TypeError, match="hyper returned 3"):
        optimizer.update([0], [weight], [grad], [state])
    assert snapshot(optimizer, (weight, grad, state)) == before


@pytest.mark.parametrize("how", ["fused_step", "trainer"])
def test_a_rule_that_is_changed_within_a_step(how):
    """`hyper` is asked before anything is settled, so kernel and row are both of the new rule."""

    def hyper(self, lr, t):
        if t == 2:
            self.rule = plain_two
            return (lr,)
        return lr, 0.5

    def plain_two(weight, grad, mom, lr):
        return weight, mom

    optimizer = variant(hyper=hyper)(learning_rate=0.25)
    weight, grad, state = np.ones(3), np.ones(3), np.zeros(3)
    trainer = numba_opt.Trainer([weight], optimizer) if how == "trainer" else None
    step = (
        functools.partial(trainer.step, [grad])
        if trainer is not None
        else functools.partial(optimizer.fused_step, [0], [weight], [grad], [state])
    )
    step()
    before = weight.copy()
    step()
    assert weight.tolist() == before.tolist()
    assert optimizer.num_update == 2


def test_steps_that_are_recorded_for_another_rule():
    class Late(Momentum):
        n = 2

        def hyper(self, lr, t):
            return (lr, 0.5, 1.0)[: self.n]

    optimizer = Late(learning_rate=0.25, sparse_update="exact")
    weight = np.ones((3, 2))
    state = optimizer.create_state(0, weight)
    grad = numba_opt.RowSparse([1], np.ones((1, 2)), (3, 2))
    optimizer.update([0], [weight], [grad], [state])
    optimizer.rule, optimizer.n = other, 3
    before = snapshot(optimizer, (weight, state))
    with pytest.raises(ValueError, match="has recorded steps of 5 hyper-parameters; expected 6: flush it"):
        optimizer.update([0], [weight], [grad], [state])
    with pytest.raises(ValueError, match="flush it before its rule changes"):
        optimizer.flush([0], [weight], [state])
    assert snapshot(optimizer, (weight, state)) == before


# ---------------------------------------------------------------- what a rule uses changes

FACTOR = 2.0


def with_global(weight, grad, mom, lr, decay):
    return weight - FACTOR * lr * grad, mom


@pytest.mark.parametrize("how", ["update", "step", "trainer"])
def test_a_global_that_changes(how, monkeypatch):
    """Kernels keep what it was; half of them with the old value and half with the new one would be worse."""
    optimizer = variant(rule=types_copy(with_global))(learning_rate=0.25)
    weight, grad, state = np.ones(3), np.ones(3), np.zeros(3)
    trainer = numba_opt.Trainer([weight], optimizer)

    def step(w=weight, s=state):
        if how == "trainer":
            trainer.step([np.ones(3)])
        else:
            getattr(optimizer, how)([0], [w], [w.copy()], [s])

    step()
    monkeypatch.setitem(globals(), "FACTOR", 4.0 / 2)  # another object, and the same number
    step(weight, state)
    before = snapshot(optimizer, (weight, grad, state))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(RuntimeError, match="has changed: a global, a closure or a helper") as info:
        step()
    assert_says(info.value, ["through hyper"], with_global)
    if how == "update":
        with pytest.raises(RuntimeError, match="has changed"):  # nor is there a new kernel
            step(np.ones(3, np.float32), np.zeros(3, np.float32))
    assert snapshot(optimizer, (weight, grad, state)) == before
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    step()


def test_an_array_that_changes_is_noticed_by_the_next_kernel():
    lookup = np.array([1.0, 2.0])

    def rule(weight, grad, mom, lr, decay):
        return weight - lookup[0] * lr * grad, mom

    optimizer = variant(rule=staticmethod(rule))(learning_rate=0.25)
    weight, state = np.ones(3), np.zeros(3)
    optimizer.fused_step([0], [weight], [np.ones(3)], [state])
    lookup[0] = 5
    with pytest.raises(RuntimeError, match=r"rule of class Bad .* has changed"):
        optimizer.fused_step([0], [weight.astype("f4")], [np.ones(3, "f4")], [np.zeros(3, "f4")])


# ---------------------------------------------------------------- rules that are in order


def test_rules_in_many_forms():
    decay = 0.5

    class Own(Momentum):
        state_names = ()

        def rule(weight, grad, lr):  # noqa: N805
            return (weight - decay * lr * grad,)

        def hyper(self, lr, t):
            return (np.float32(lr),)

    class Nameless(Own):
        rule = lambda weight, grad, /, lr: (weight - lr * grad / 2,)  # noqa: E731

    class Rooted(Own):
        def rule(weight, grad, lr):  # noqa: N805
            return (weight - lr * sqrt(grad) / 2,)

        def hyper(self, lr, t):
            return [(1,), (np.float64(lr),)][t > 0]

    for cls in (Own, Nameless, Rooted):
        for path in ("step", "fused_step"):
            weight = np.ones(3)
            optimizer = cls(learning_rate=1)
            getattr(optimizer, path)([0], [weight], [np.ones(3)], [None])
            assert weight.tolist() == [0.5] * 3
            getattr(copy.deepcopy(optimizer), path)([0], [weight], [np.ones(3)], [None])
            assert weight.tolist() == [0] * 3


@table.each
def test_rules_of_this_package(row):
    optimizer = table.build(row)
    rule = optimizer._rule()
    assert len(optimizer.hyper(0.1, 1)) == rule.n_hyper
    assert optimizer._rule() is rule  # it is looked at once
    rules.check_on_arrays(rule)


def test_rules_of_the_torch_front():
    pytest.importorskip("torch")
    import torch

    import numba_opt.torch as front

    options = [
        (front.NAG, {"momentum": 0.9}),
        *[(front.RMSProp, {"momentum": m, "centered": c}) for m in (0, 0.9) for c in (False, True)],
        (front.Adamax, {}),
        (front.FTML, {}),
        (front.GroupAdaGrad, {}),
    ]
    assert {cls for cls, _ in options} == {getattr(front, name) for name in front.__all__}
    for cls, given in options:
        optimizer = cls([torch.ones(2, 2)], lr=0.1, **given)
        for formula in optimizer._current(optimizer.param_groups):
            kind = formula.kind
            checked = rules.check(cls.__name__, kind.rule.function, kind.states, kind.rule.per_row)
            assert checked == kind.rule
            assert len(formula.row(0.1, 1)) == kind.rule.row_length("f4 f4")


def test_sources_are_where_errors_say():
    lines, first = inspect.getsourcelines(with_self)
    assert line_of(with_self) == f"{__file__}:{first}"
    assert lines[0].startswith("def with_self")
