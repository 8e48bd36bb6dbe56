"""Rows that catch up exactly: what dense steps make, on every backend."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from .. import table
from .gradients import SHAPE, block, dense, each_form, in_turn, made
from .pairs import Pair, Twins

pytestmark = pytest.mark.filterwarnings("ignore:states in float16")

some = pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])


def exact(backend, row, shapes=(SHAPE,), **options):
    return Pair(backend, row, shapes, **{"sparse_update": "exact"} | options)


def last_step(pair):
    """What rows of the first parameter have taken."""
    return pair.backend.get(pair.states[0][0][1])


@table.each
def test_rows_catch_up(backend, row):
    """Each touched row is at every step what it should be, and all of them are after a flush."""
    pair = exact(backend, row, [SHAPE, SHAPE])
    alone = exact(backend, row)  # where there is one tensor, kernels go another way
    for n in range(7):
        pair.step(in_turn(n), in_turn(n))
        alone.step(in_turn(n))
        pair.check()
        alone.check()
    pair.flush()
    pair.check()
    assert not last_step(pair).any()
    pair.step(in_turn(7), in_turn(8))
    pair.check()


@some
def test_catching_up_is_what_a_dense_step_does(backend, name):
    row = table.row(name)
    pair, every = exact(backend, row), exact(backend, row, sparse_update="dense")
    for n in range(5):
        for run in (pair, every):
            run.each(lambda optimizer, n=n: optimizer.set_learning_rate(0.1 / (n + 1)))
            run.each(lambda optimizer, n=n: setattr(optimizer, "wd", 0.01 * n * (not row.cls.per_row)))
            run.step(in_turn(n))
    pair.flush()
    found, expected = (
        backend.get(table.leaves([run.weights[0], run.rule_states(run.states[0][0])]))
        for run in (pair, every)
    )
    if row.cls.per_row and not backend.on_device:  # other loops add squares in another order
        backend.compare(row, found, expected)
    else:
        table.assert_bits(found, expected)


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@each_form("distinct", "csr-int64")
def test_other_forms_catch_up(backend, name, form):
    """Rows that have yet to take several steps, in one tensor and in two."""
    pair, alone = exact(backend, table.row(name), [SHAPE, SHAPE]), exact(backend, table.row(name))
    for n in range(4):
        grad = made(form, seed=n) if n % 2 else block([n, 8])
        pair.step(grad, grad, distinct=True)
        alone.step(grad, distinct=True)
    for run in (pair, alone):
        run.flush()
        run.check()


@some
def test_dense_gradients_between(backend, name):
    pair = exact(backend, table.row(name), [SHAPE, (4, 3)])
    for n in range(7):
        pair.step(dense(seed=n) if n in (2, 5) else in_turn(n), block([n % 4, 1], (4, 3), seed=n))
        pair.check()
    pair.flush()
    pair.check()


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@pytest.mark.parametrize(("dtype", "masters"), [("float64", False), ("float16", False), ("float16", True)])
def test_other_precisions(backend, name, dtype, masters):
    pair = exact(backend, table.row(name), dtype=dtype, multi_precision=masters)
    for n in range(4):
        pair.step(in_turn(n, dtype))
        pair.check()
    pair.flush()
    pair.check()


@pytest.mark.parametrize("name", ["adamax", "groupadagrad"])
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_states_rounded_by_chance(backend, name, mode):
    """Each step that is made up for has the chance of its own number."""
    options = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3}
    pair = exact(backend, table.row(name), sparse_update=mode, **options)
    for n in range(4):
        pair.step(in_turn(n))
        pair.check(1e-2)
    pair.flush()
    pair.check(1e-2)


def test_distinct_rows_and_other_dimensions(backend):
    pair = exact(backend, table.row("adamax"), [(5,), (4, 2, 3)])
    for rows in ([1, 4], [0, 3], [4, 2], [1, 2]):
        pair.step(block(rows, (5,)), block([r % 4 for r in rows], (4, 2, 3)), distinct=True)
        pair.check()
    pair.flush()
    pair.check()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_an_optimizer_is_copied_with_what_rows_have_yet_to_do(backend, how):
    pair = exact(backend, table.row("adamax"))
    for n in range(4):
        pair.step(in_turn(n))
    pair.ours, pair.theirs = how(pair.ours), how(pair.theirs)
    pair.step(in_turn(4))
    pair.check()
    pair.flush()
    pair.check()


@pytest.mark.parametrize("there", [True, False])
def test_moving_in_the_middle(device, there):
    """From the GPU to the CPU, and the other way, last_step and recorded steps and all."""
    pair = exact(device, table.row("ftml"))
    for n in range(4):
        pair.step(in_turn(n))
    if there:
        own = [device.get(pair.weights), device.get(pair.states[0])]
        for optimizer, weights, states in ((pair.ours, *own), (pair.theirs, pair.expected, pair.states[1])):
            optimizer.update([0], weights, [in_turn(4)], states)
            optimizer.flush([0], weights, states)
        table.assert_bits(own, [pair.expected, pair.states[1]])
    else:
        pair.ours, pair.theirs = pair.theirs, pair.ours
        pair.weights, pair.expected = device.put(pair.expected), device.get(pair.weights)
        pair.states = [device.put(pair.states[1]), device.get(pair.states[0])]
        pair.step(in_turn(4))
        pair.check()
        pair.flush()
        pair.check()


def test_a_new_state_owes_nothing(backend):
    pair = exact(backend, table.row("nag"))
    for n in range(3):
        pair.step(in_turn(n))
    pair.states[0][0] = pair.ours.create_state(0, pair.weights[0])
    pair.states[1][0] = pair.theirs.create_state(0, pair.expected[0])
    pair.step(in_turn(3))
    pair.check()


@pytest.mark.parametrize("bad", [False, True])
def test_a_trainer_catches_up(backend, bad, tmp_path):
    """With norms, a step that is skipped, multipliers, and a checkpoint in the middle."""
    trainer = {"clip_global_norm": 2.0, "skip_nonfinite": True, "lr_mult": {"1": 0.5}}
    shapes = [SHAPE, (4, 3), (5, 2)]
    twins = Twins(backend, table.row("adamax"), shapes, wd=0.1, sparse_update="exact", trainer=trainer)
    for n in range(6):
        grads = [in_turn(n), block([n % 4], (4, 3), seed=n), None if n == 4 else twins.grads[2]]
        if bad and n == 2:
            grads[1].values[0, 1] = np.nan
            skipped(twins, grads)
        else:
            twins.step(*grads)
        if n == 3:
            twins.ours.save(tmp_path / "a.safetensors")
            twins.ours.load(tmp_path / "a.safetensors")
            twins.theirs.flush()
    assert twins.ours.skipped_steps == bad
    twins.each(lambda trainer: trainer.flush())
    twins.agree(1e-6)


def skipped(twins, grads):
    """A step that changes nothing; on a GPU it is counted, as the host does not know."""
    twins.ours.step(twins.given(grads))
    if twins.backend.on_device:
        twins.theirs.optimizer._update_count(list(range(len(grads))))


@table.each
def test_more_steps_than_a_device_keeps(gpu, row):
    rng = np.random.default_rng(6)
    pair = exact(gpu, row, [(500, 33)])
    for n in range(1100):
        rows = rng.integers(0, 500 if n % 100 else 20, 7)
        pair.step(dense((500, 33), seed=n) if n % 250 == 60 else block(rows, (500, 33), seed=n))
        if n % 200 == 0:
            found, expected = pair.both()
            table.assert_near(found[0][rows], expected[0][rows], 1e-5)
    pair.flush()
    pair.check(1e-4)
    assert not last_step(pair).any()
