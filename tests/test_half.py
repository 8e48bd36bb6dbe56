"""float16 and bfloat16: conversions of every number, with F16C and without, and training with copies."""

from __future__ import annotations

import platform

import ml_dtypes
import numpy as np
import pytest

import numba_opt
from numba_opt.cpu import loops as cpu

from . import table
from .scripts import printed

HALVES = {"float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
each_half = pytest.mark.parametrize("name", HALVES)
each_path = pytest.mark.parametrize("fused", [True, False], ids=["fused", "step"])


def patterns(half):
    """All 65,536 numbers."""
    return np.arange(0x10000, dtype=np.uint32).astype(np.uint16).view(half)


def hard_cases(half):
    """float32 that is to be rounded: all numbers of a half, all ties of two, and what is next to these."""
    with np.errstate(invalid="ignore"):  # NaNs that signal
        numbers = patterns(half).astype(np.float32)
    finite = np.unique(numbers[np.isfinite(numbers)].astype(np.float64))
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    largest, step = finite[-1], finite[-1] - finite[-2]
    with np.errstate(over="ignore"):
        ends = np.float32([largest + step * k / 4 for k in range(1, 9)] + [3.4e38, 1e-45, 1e-40])
    exact = np.concatenate([numbers, ties, ends, -ends])
    exact = exact[~np.isnan(exact)]
    around = [np.nextafter(exact, np.float32(way)) for way in (-np.inf, np.inf)]
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000, 0x7F808000], np.uint32).view(np.float32)
    return np.concatenate([exact, *around, nans])


def check_loads(half, fused):
    """A gradient of every number, of a weight that then is its negative."""
    grad = patterns(half)
    weight = np.zeros(grad.shape, np.float32)
    numba_opt.NAG(1.0, momentum=0, use_fused_step=fused).update([0], [weight], [grad], [None])
    with np.errstate(invalid="ignore"):
        expected = np.float32(0) - grad.astype(np.float32)
    table.assert_bits(weight, expected)
    assert np.isnan(weight).sum() == {"float16": 2 * 1023, "bfloat16": 2 * 127}[half.name]


def check_stores(half, name, fused):
    """A momentum of every number: the gradient's negative, with 0 for -0."""
    grad = -hard_cases(half)
    weight = np.zeros(grad.shape, np.float32)
    optimizer = numba_opt.NAG(1.0, state_dtype=name, use_fused_step=fused)
    state = optimizer.create_state(0, weight)
    optimizer.update([0], [weight], [grad], [state])
    with np.errstate(all="ignore"):
        expected = (np.float32(0) - grad).astype(half)
        table.assert_bits(state.astype(np.float32), expected.astype(np.float32))
        assert np.isnan(state.astype(np.float32)).sum() == np.isnan(grad).sum() > 0


@each_half
@each_path
def test_loads_are_exact(name, fused):
    check_loads(HALVES[name], fused)


@each_half
@each_path
def test_stores_round_to_nearest_and_ties_to_even(name, fused):
    check_stores(HALVES[name], name, fused)


GENERIC = """
import warnings
import numpy as np
from numba.core.registry import cpu_target
from numba_opt.compiler import half
from tests import table, test_half, test_rounding, test_state_dtype

assert not half.converts_half(cpu_target.target_context)
warnings.simplefilter("ignore")
for name, kind in test_half.HALVES.items():
    test_half.check_loads(kind, True)
    test_half.check_stores(kind, name, True)
    test_rounding.test_what_can_be_stored_stays(name, True)
    for copies in (False, True):
        found = []
        for fused in (True, False):
            row = table.row("rmsprop-centered")
            call = table.make(row, [(9, 7), (30, 20)], kind)
            optimizer = table.build(row, multi_precision=copies, use_fused_step=fused, **table.common(row))
            states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
            for _ in range(3):
                optimizer.update_multi_precision(call.indices, call.weights, call.grads, states)
            found.append([call.weights, states])
        test_state_dtype.assert_same(*found)
    test_rounding.test_step_and_fused_step("nag", name)
print("done")
"""


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 without F16C is meant"
)
def test_a_processor_without_f16c():
    assert printed(GENERIC, NUMBA_CPU_NAME="generic") == "done\n"


# ---------------------------------------------------------------- training


@table.each
@each_half
@each_path
def test_copies_follow_the_formula(row, name, fused):
    """The float32 copy and its states, against float64; MXNet's own runs are in test_golden.py."""
    half, options = HALVES[name], table.common(row)
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(table.fit(row, (9, 21))).astype(half)
    grads = rng.standard_normal((7, *weight.shape)).astype(half)
    expected = table.reference(row, weight.astype("f8"), grads.astype("f8"), **options)
    optimizer = table.build(row, multi_precision=True, use_fused_step=fused, **options)
    state = optimizer.create_state_multi_precision(0, weight)
    for grad in grads:
        optimizer.update_multi_precision([0], [weight], [grad], [state])
    table.assert_near(state, expected, 2e-6)  # as in test_table.py
    table.assert_bits(weight.astype("f4"), state[0].astype(half).astype("f4"))


@each_half
def test_loss_scale_changes_at_each_step(name):
    """No new kernel, and the same as gradients that come unscaled: powers of two lose nothing."""
    half = HALVES[name]
    rng = np.random.default_rng(4)
    start = rng.standard_normal((40, 8)).astype(half)
    trainers = [numba_opt.Trainer([start.copy()], "adamax", multi_precision=True) for _ in range(2)]
    made = None
    for k in (0, 3, -2, 6):
        grad = rng.standard_normal((40, 8)).astype(half)
        trainers[0].step([grad])
        trainers[1].optimizer.rescale_grad = 2.0**-k
        trainers[1].step([(grad.astype("f4") * np.float32(2.0**k)).astype(half)])
        made = made or cpu.dense.cache_info().misses
    assert cpu.dense.cache_info().misses == made
    first, second = ([t.params["0"].astype("f4"), *table.leaves(t.states["0"])] for t in trainers)
    table.assert_bits(first, second)
