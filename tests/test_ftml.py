"""FTML's reduced form, which keeps one state, against the usual one with three and against MXNet's."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numba_opt
from numba_opt import lr_scheduler

from . import table, test_golden

arrays = test_golden.arrays  # the fixture

STEPS = 40
OPTIONS = {
    "defaults": {},
    "wd": {"wd": 0.05},
    "clip": {"clip_gradient": 0.4},
    "rescale": {"rescale_grad": 0.125},
    "betas": {"beta1": 0.9, "beta2": 0.9, "epsilon": 1e-3},
    "scheduler": {"learning_rate": None, "lr_scheduler": lambda: lr_scheduler.CosineScheduler(STEPS, 0.05)},
    "late": {"begin_num_update": 100},
    "all": {
        "wd": 0.05,
        "clip_gradient": 0.4,
        "rescale_grad": 2.0,
        "learning_rate": None,
        "lr_scheduler": lambda: lr_scheduler.FactorScheduler(3, 0.7, base_lr=0.05),
    },
}


def both(path="fused_step", **options):
    """The usual and the reduced optimizer, each with a scheduler of its own."""
    made = options.pop("lr_scheduler", None)
    given = {"learning_rate": 0.02, "use_fused_step": path == "fused_step", **options}
    return [
        numba_opt.FTML(reduced=reduced, lr_scheduler=made and made(), **given) for reduced in (False, True)
    ]


def train(optimizer, weight, grads):
    """The weight's copy after the gradients, and its state."""
    weight = weight.copy()
    state = optimizer.create_state(0, weight)
    for grad in grads:
        optimizer.update([0], [weight], [grad], [state])
    return weight, state


@table.each_path
@table.each_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_the_usual_form(path, dtype, options):
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((13, 21)).astype(dtype)
    grads = rng.standard_normal((STEPS, *weight.shape)).astype(dtype)
    (usual, (_, v, _)), (found, reduced) = (train(o, weight, grads) for o in both(path, **options))
    # some roundings in each of 40 steps; weights measured 4e-16 and 3e-7
    near = {"float32": 2e-6, "float64": 4e-15}[dtype]
    table.assert_near(found, usual, near)
    if "wd" in options:  # v depends on the weight
        table.assert_near(reduced, v, near)
    else:
        table.assert_bits(reduced, v)
    assert np.abs(found - weight).max() > 0.01


@pytest.mark.parametrize("sparse_update", ["lazy", "dense", "exact"])
@table.each_path
def test_agrees_on_sparse_rows(path, sparse_update):
    rng = np.random.default_rng(9)
    weights = [rng.standard_normal((50, 6))] * 2
    weights = [weight.copy() for weight in weights]
    optimizers = both(path, sparse_update=sparse_update, wd=0.01)
    states = [o.create_state(0, w) for o, w in zip(optimizers, weights, strict=True)]
    for _ in range(STEPS):
        rows = rng.integers(0, 50, 8)
        grad = numba_opt.RowSparse(rows, rng.standard_normal((8, 6)), (50, 6))
        for optimizer, weight, state in zip(optimizers, weights, states, strict=True):
            optimizer.update([0], [weight], [grad], [state])
    for optimizer, weight, state in zip(optimizers, weights, states, strict=True):
        optimizer.flush([0], [weight], [state])
    table.assert_near(weights[1], weights[0], 4e-15)


@table.each_path
def test_learning_rate_0_in_between(path):
    """The weight stays as it is; v goes on, and so does the agreement."""
    rng = np.random.default_rng(10)
    optimizers = both(path)
    weights = [np.ones((4, 5)) for _ in optimizers]
    states = [o.create_state(0, w) for o, w in zip(optimizers, weights, strict=True)]
    for rate in (0.02, 0.0, 0.0, 0.05):
        grad = rng.standard_normal((4, 5))
        for optimizer, weight, state in zip(optimizers, weights, states, strict=True):
            before = weight.copy()
            optimizer.set_learning_rate(rate)
            optimizer.update([0], [weight], [grad], [state])
            assert (weight == before).all() == (rate == 0)
    table.assert_near(weights[1], weights[0], 4e-15)
    table.assert_bits(states[1], states[0][1])


@table.each_path
def test_learning_rate_0_keeps_the_weight_whatever_comes(path):
    """Infinite gradients, and 0 / 0 where epsilon is 0."""
    weight, grad = np.array([1.0, 2.0, 3.0]), np.array([math.inf, math.nan, 0.0])
    train(numba_opt.FTML(0.0, epsilon=0, reduced=True, use_fused_step=path == "fused_step"), weight, [grad])
    assert weight.tolist() == [1, 2, 3]


@table.each_path
def test_a_weight_changed_from_outside(path):
    """The usual form goes back towards where it had left the weight, the reduced one does not."""
    usual, reduced = both(path, learning_rate=1e-6, beta2=0.0)
    for optimizer, share in ((usual, 0.6), (reduced, 0.0)):
        weight, grad = np.array([1.0]), np.array([1.0])
        state = optimizer.create_state(0, weight)
        for _ in range(30):  # (1 - beta1**t), and so d, has settled
            optimizer.update([0], [weight], [grad], [state])
        weight += 5
        optimizer.update([0], [weight], [grad], [state])
        np.testing.assert_allclose(weight, 1 + (1 - share) * 5, atol=1e-4)


FTML = [case for case in test_golden.PLAIN if case["optimizer"].lower() == "ftml"]


@pytest.mark.parametrize("case", FTML, ids=lambda case: case["id"])
@table.each_path
def test_weights_are_mxnets(case, path, arrays):
    limit = test_golden.tolerances(case)
    for step, weights, _ in test_golden.replay(case, test_golden.build(case, path, reduced=True), arrays):
        for i, weight in enumerate(weights):
            expected = arrays[f"{case['id']}/weight{i}"][step]
            table.assert_near(
                weight, expected, limit.get("half", limit["weight"]), f"step {step}, weight {i}"
            )


def test_checkpoints_of_one_form_are_not_the_other_s():
    usual, reduced = (numba_opt.Trainer([np.ones(3)], "ftml", reduced=flag) for flag in (False, True))
    with pytest.raises(numba_opt.checkpoint.CheckpointError, match="d, v, z; this one has v"):
        reduced.load_state_dict(usual.state_dict())
    other = numba_opt.Trainer([np.zeros(3)], "ftml", reduced=True)
    reduced.step([np.ones(3)])
    other.load_state_dict(reduced.state_dict())
    for trainer in (reduced, other):
        trainer.step([np.full(3, 0.5)])
    table.assert_bits(
        [*other.params.values(), *other.states.values()], [*reduced.params.values(), *reduced.states.values()]
    )
