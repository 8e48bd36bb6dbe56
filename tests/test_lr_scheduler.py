"""The learning-rate schedulers, against closed forms and MXNet-like stateful loops."""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import json
import math
import pickle
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numba_opt import lr_scheduler
from numba_opt.lr_scheduler import (
    CosineScheduler,
    FactorScheduler,
    LRScheduler,
    MultiFactorScheduler,
    PolyScheduler,
)

EXAMPLES = [
    FactorScheduler(3, 0.5, base_lr=0.7, warmup_steps=5, warmup_begin_lr=0.1),
    MultiFactorScheduler([4, 9], 0.1, base_lr=0.7, warmup_steps=3, warmup_mode="constant"),
    PolyScheduler(20, 0.7, 1.5, 0.01, warmup_steps=5, warmup_begin_lr=0.1),
    CosineScheduler(20, 0.7, 0.01, warmup_steps=5, warmup_begin_lr=0.1),
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda s: type(s).__name__)


class InverseRoot(LRScheduler):
    """What a user writes with the hook; at module level so that it can be pickled."""

    def decayed(self, num_update):
        return self.base_lr / math.sqrt(1 + num_update - self.warmup_steps)


def test_doctests():
    modules = [sys.modules[f"{lr_scheduler.__name__}.{name}"] for name in ("base", "steps", "decays")]
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in results) >= 10
    assert not any(result.failed for result in results)


# --- values -----------------------------------------------------------------------------------


def warmed_up(decay, begin, base, steps, mode, updates):
    """Yield the rates of a training run, `decay` being asked only after the warm-up."""
    for n in updates:
        if n >= steps:
            yield decay(n)
        elif mode == "constant":
            yield begin
        else:
            yield begin * (1 - n / steps) + base * (n / steps)


def factor_loop(step, factor, stop, base):
    lr, count = base, 0

    def decay(n):
        nonlocal lr, count
        while n > count + step:
            count += step
            lr = max(lr * factor, stop)
        return lr

    return decay


def multi_factor_loop(step, factor, base):
    lr, left = base, list(step)

    def decay(n):
        nonlocal lr
        while left and n > left[0]:
            left.pop(0)
            lr *= factor
        return lr

    return decay


WARMUPS = [(0, 0.0, "linear"), (7, 0.0, "linear"), (7, 0.02, "linear"), (7, 0.02, "constant")]
each_warmup = pytest.mark.parametrize("warmup", WARMUPS, ids=str)


def check_run(scheduler, decay, warmup, base):
    steps, begin, mode = warmup
    expected = list(warmed_up(decay, begin, base, steps, mode, range(120)))
    got = [scheduler(n) for n in range(120)]
    assert all(type(lr) is float for lr in got)
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-17)


@each_warmup
@pytest.mark.parametrize("step", [1, 5, 40])
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("stop", [0.0, 1e-3, 0.5])
def test_factor(warmup, step, factor, stop):
    base = 0.3
    scheduler = FactorScheduler(step, factor, stop, base, warmup[0], *warmup[1:])
    check_run(scheduler, factor_loop(step, factor, stop, base), warmup, base)


@each_warmup
@pytest.mark.parametrize("step", [[1], [3, 4, 60], [50, 100, 1000]])
@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_multi_factor(warmup, step, factor):
    base = 0.3
    scheduler = MultiFactorScheduler(step, factor, base, warmup[0], *warmup[1:])
    check_run(scheduler, multi_factor_loop(step, factor, base), warmup, base)


@each_warmup
@pytest.mark.parametrize("final", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("pwr", [0.5, 1, 2, 3])
def test_poly(warmup, final, pwr):
    base, end, steps = 0.3, 100, warmup[0]

    def decay(n):
        left = 1 - min((n - steps) / (end - steps), 1)
        return final * (1 - left**pwr) + base * left**pwr

    check_run(PolyScheduler(end, base, pwr, final, *warmup), decay, warmup, base)


@each_warmup
@pytest.mark.parametrize("final", [0.0, 0.05, 0.9])
def test_cosine(warmup, final):
    base, end, steps = 0.3, 100, warmup[0]

    def decay(n):
        p = min((n - steps) / (end - steps), 1)
        return (base + final) / 2 + (base - final) / 2 * math.cos(math.pi * p)

    check_run(CosineScheduler(end, base, final, *warmup), decay, warmup, base)


def test_changes_come_after_the_step():
    factor = FactorScheduler(10, 0.5, base_lr=1.0)
    assert [factor(n) for n in (0, 1, 10, 11, 20, 21)] == [1, 1, 1, 0.5, 0.5, 0.25]
    multi = MultiFactorScheduler([10, 15], 0.5, base_lr=1.0)
    assert [multi(n) for n in (0, 10, 11, 15, 16, 10**9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_factor_stops():
    scheduler = FactorScheduler(1, 0.5, stop_factor_lr=0.2, base_lr=1.0)
    assert [scheduler(n) for n in (1, 2, 3, 4, 10**6)] == [1, 0.5, 0.25, 0.2, 0.2]
    below = FactorScheduler(1, 0.5, stop_factor_lr=0.2, base_lr=0.1)
    assert [below(n) for n in (0, 1, 2, 3)] == [0.1, 0.1, 0.2, 0.2]


@pytest.mark.parametrize("cls", [PolyScheduler, CosineScheduler])
def test_past_max_update_is_final(cls):
    scheduler = cls(10, base_lr=0.3, final_lr=0.07)
    assert [scheduler(n) for n in (10, 11, 10**12)] == [0.07] * 3


@pytest.mark.parametrize("cls", [PolyScheduler, CosineScheduler])
def test_warmup_up_to_max_update(cls):
    scheduler = cls(4, base_lr=0.8, final_lr=0.1, warmup_steps=4)
    assert [scheduler(n) for n in (0, 2, 4, 5)] == [0.0, 0.4, 0.1, 0.1]


def test_poly_of_power_zero():
    scheduler = PolyScheduler(4, base_lr=0.8, pwr=0, final_lr=0.1)
    assert [scheduler(n) for n in (0, 3, 4, 5)] == [0.8, 0.8, 0.1, 0.1]


# --- properties -------------------------------------------------------------------------------

rates = st.floats(0, 10)
modes = st.sampled_from(["linear", "constant"])


@st.composite
def schedulers(draw):
    """Return any scheduler whose rate may not rise after its warm-up."""
    base = draw(rates)
    steps = draw(st.integers(0, 40))
    warmup = {
        "base_lr": base,
        "warmup_steps": steps,
        "warmup_begin_lr": draw(st.floats(0, base)),
        "warmup_mode": draw(modes),
    }
    lower = draw(st.floats(0, base))
    factor = draw(st.floats(0, 1))
    end = max(1, steps + draw(st.integers(0, 150)))
    marks = sorted(draw(st.sets(st.integers(1, 200), min_size=1, max_size=6)))
    return draw(
        st.sampled_from(
            [
                FactorScheduler(draw(st.integers(1, 60)), factor, lower, **warmup),
                MultiFactorScheduler(marks, factor, **warmup),
                PolyScheduler(end, pwr=draw(st.floats(0, 8)), final_lr=lower, **warmup),
                CosineScheduler(end, final_lr=lower, **warmup),
            ]
        )
    )


@given(schedulers(), st.randoms(use_true_random=False))
def test_pure(scheduler, rng: random.Random):
    before = copy.deepcopy(vars(scheduler))
    in_order = [scheduler(n) for n in range(200)]
    shuffled = rng.sample(range(200), 200)
    assert [scheduler(n) for n in shuffled] == [in_order[n] for n in shuffled]
    assert vars(scheduler) == before


@given(schedulers())
def test_falls_within_bounds_after_warmup(scheduler):
    values = [scheduler(n) for n in range(scheduler.warmup_steps, 250)]
    rounding = 1 + 4e-16  # pow and cos promise no monotone last bit
    assert all(b <= a * rounding for a, b in itertools.pairwise(values))
    low = getattr(scheduler, "final_lr", getattr(scheduler, "stop_factor_lr", 0.0))
    assert all(low <= value <= scheduler.base_lr for value in values)


@given(schedulers())
def test_warmup_within_bounds(scheduler):
    values = [scheduler(n) for n in range(scheduler.warmup_steps)]
    assert values == sorted(values)
    assert all(scheduler.warmup_begin_lr <= v <= scheduler.base_lr for v in values)
    if scheduler.warmup_mode == "constant":
        assert set(values) <= {scheduler.warmup_begin_lr}


@given(rates, rates, st.integers(0, 30), st.integers(31, 10**9), st.floats(0, 8))
def test_warmup_ends_exactly_at_base_lr(base, final, steps, end, pwr):
    for scheduler in (
        FactorScheduler(end, 0.5, base_lr=base, warmup_steps=steps),
        MultiFactorScheduler([end], 0.5, base_lr=base, warmup_steps=steps),
        PolyScheduler(end, base, pwr, final, warmup_steps=steps),
        CosineScheduler(end, base, final, warmup_steps=steps),
    ):
        assert scheduler(steps) == base


# --- attributes -------------------------------------------------------------------------------


@each_example
def test_override_of_base_lr(example):
    overridden = copy.deepcopy(example)
    overridden.base_lr = 1.9
    built = type(example)(**{**vars(example), "base_lr": 1.9})
    assert [overridden(n) for n in range(40)] == [built(n) for n in range(40)]
    assert overridden(overridden.warmup_steps) != example(example.warmup_steps)
    if example.warmup_mode == "linear":
        assert overridden(2) > example(2)


@each_example
def test_settable_attributes(example):
    scheduler = copy.deepcopy(example)
    scheduler.warmup_steps = 0
    built = type(example)(**{**vars(example), "warmup_steps": 0})
    assert [scheduler(n) for n in range(40)] == [built(n) for n in range(40)]


@pytest.mark.parametrize("example", [*EXAMPLES, InverseRoot(0.3, 4)], ids=repr)
def test_copies(example):
    expected = [example(n) for n in range(40)]
    copies = [
        pickle.loads(pickle.dumps(example)),
        copy.deepcopy(example),
        type(example)(**json.loads(json.dumps(vars(example)))),
        eval(repr(example), globals()),
    ]
    for twin in copies:
        assert type(twin) is type(example)
        assert vars(twin) == vars(example)
        assert [twin(n) for n in range(40)] == expected


def test_numpy_arguments_become_plain():
    scheduler = MultiFactorScheduler(
        (np.int64(3), np.uint8(9)), np.float32(0.5), np.float64(0.25), np.int32(2), np.float16(0)
    )
    assert [type(v) for v in vars(scheduler).values()] == [list, float, float, int, float, str]
    assert {type(v) for v in scheduler.step} == {int}
    assert [scheduler(np.uint8(n)) for n in (0, 1, 3, 4)] == [0, 0.125, 0.25, 0.125]
    assert FactorScheduler(np.int16(2), 0.5, base_lr=1.0)(np.uint64(0)) == 1.0


def test_step_list_is_copied():
    step = [3, 5]
    scheduler = MultiFactorScheduler(step, 0.5, base_lr=1.0)
    step[0] = 1
    assert scheduler(2) == 1.0


def test_repr():
    assert repr(FactorScheduler(3, 0.5)) == (
        "FactorScheduler(step=3, factor=0.5, stop_factor_lr=1e-08, base_lr=0.01, "
        "warmup_steps=0, warmup_begin_lr=0.0, warmup_mode='linear')"
    )


WARMUP = {"base_lr": 0.01, "warmup_steps": 0, "warmup_begin_lr": 0, "warmup_mode": "linear"}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (LRScheduler, WARMUP),
        (FactorScheduler, {"step": ..., "factor": 1, "stop_factor_lr": 1e-8, **WARMUP}),
        (MultiFactorScheduler, {"step": ..., "factor": 1, **WARMUP}),
        (
            PolyScheduler,
            {"max_update": ..., "base_lr": 0.01, "pwr": 2, "final_lr": 0, **WARMUP},
        ),
        (CosineScheduler, {"max_update": ..., "base_lr": 0.01, "final_lr": 0, **WARMUP}),
    ],
)
def test_signature_is_mxnets(cls, expected):
    parameters = inspect.signature(cls).parameters.values()
    got = {p.name: ... if p.default is p.empty else p.default for p in parameters}
    assert list(got.items()) == list(expected.items())


# --- a user's own -----------------------------------------------------------------------------


def test_subclass_with_decayed():
    scheduler = InverseRoot(base_lr=0.4, warmup_steps=4)
    assert [scheduler(n) for n in (0, 1, 2, 4, 7)] == [0.0, 0.1, 0.2, 0.4, 0.2]


def test_subclass_with_call():
    class Own(LRScheduler):
        def __call__(self, num_update):
            if num_update < self.warmup_steps:
                return self.get_warmup_lr(num_update)
            return self.base_lr / num_update

    scheduler = Own(base_lr=1.0, warmup_steps=2)
    assert [scheduler(n) for n in (0, 1, 2, 4)] == [0.0, 0.5, 0.5, 0.25]


def test_base_class_has_no_decay():
    scheduler = LRScheduler(base_lr=1.0, warmup_steps=2)
    assert scheduler(1) == 0.5
    with pytest.raises(NotImplementedError, match="LRScheduler must override decayed"):
        scheduler(2)


# --- bad arguments ----------------------------------------------------------------------------

SMALLEST = {
    LRScheduler: {},
    FactorScheduler: {"step": 5},
    MultiFactorScheduler: {"step": [5]},
    PolyScheduler: {"max_update": 50},
    CosineScheduler: {"max_update": 50},
}
NOT_RATES = [-0.1, math.nan, math.inf, -math.inf, 10**400, True, "0.1", None, 1j, np.float32("nan")]
NOT_COUNTS = [-1, True, 1.0, math.nan, "3", None, np.bool_(True), np.float64(3), np.arange(3)]


def refuse(cls, name, value, shown=None):
    with pytest.raises((TypeError, ValueError)) as error:
        cls(**{**SMALLEST[cls], name: value})
    message = str(error.value)
    assert name in message
    assert "must be" in message
    assert (repr(value) if shown is None else shown) in message


@pytest.mark.parametrize("cls", SMALLEST)
@pytest.mark.parametrize("value", NOT_RATES, ids=lambda v: repr(v)[:20])
def test_bad_rates(cls, value):
    for name in ("base_lr", "warmup_begin_lr", "stop_factor_lr", "final_lr", "factor", "pwr"):
        if name in inspect.signature(cls).parameters:
            refuse(cls, name, value)


@pytest.mark.parametrize("cls", SMALLEST)
@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_bad_counts(cls, value):
    for name in ("warmup_steps", "max_update", "step"):
        if name in inspect.signature(cls).parameters:
            refuse(cls, name, value)


@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_bad_num_update(value):
    for example in EXAMPLES:
        with pytest.raises((TypeError, ValueError), match="num_update must be an integer >= 0"):
            example(value)


@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_bad_count_in_step_list(value):
    with pytest.raises((TypeError, ValueError), match=r"step\[1\] must be an integer >= 1"):
        MultiFactorScheduler([1, value])


def test_types_and_values_are_told_apart():
    for name, wrong_type, wrong_value in [("base_lr", "x", -1), ("warmup_steps", 1.5, -1)]:
        with pytest.raises(TypeError, match=name):
            LRScheduler(**{name: wrong_type})
        with pytest.raises(ValueError, match=name):
            LRScheduler(**{name: wrong_value})


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (FactorScheduler, "step", 0),
        (FactorScheduler, "factor", 1.01),
        (MultiFactorScheduler, "factor", 1.01),
        (MultiFactorScheduler, "step", []),
        (MultiFactorScheduler, "step", [3, 3]),
        (MultiFactorScheduler, "step", [5, 3]),
        (MultiFactorScheduler, "step", 5),
        (MultiFactorScheduler, "step", "35"),
        (MultiFactorScheduler, "step", {3, 5}),
        (PolyScheduler, "max_update", 0),
        (CosineScheduler, "max_update", 0),
        (PolyScheduler, "warmup_steps", 51),
        (CosineScheduler, "warmup_steps", 51),
        (LRScheduler, "warmup_begin_lr", 0.02),
        (LRScheduler, "warmup_mode", "cosine"),
        (LRScheduler, "warmup_mode", None),
    ],
)
def test_out_of_range(cls, name, value):
    refuse(cls, name, value)


def test_step_list_starts_at_one():
    refuse(MultiFactorScheduler, "step", [0, 3], shown="got 0")


@pytest.mark.parametrize("num_update", [-1, 4, 5])
def test_get_warmup_lr_outside_the_warmup(num_update):
    with pytest.raises(ValueError, match="num_update must be from 0 to warmup_steps - 1 = 3"):
        FactorScheduler(5, warmup_steps=4).get_warmup_lr(num_update)
