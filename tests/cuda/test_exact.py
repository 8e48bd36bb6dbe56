"""Rows that catch up exactly on a GPU: what the CPU has at each step, and what dense steps make."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import numba_opt

from .. import table
from ..ptx import arrays
from .test_rows import SHAPE, block, csr, on_gpu, some


class Pair:
    """A parameter on the GPU and one on the CPU, both of which catch up exactly."""

    def __init__(self, row, shapes=(SHAPE,), dtype="float32", **options):
        self.row, self.indices = row, list(range(len(shapes)))
        options = table.common(row) | {"sparse_update": "exact"} | options
        self.optimizers = table.build(row, **options), table.build(row, **options)
        call = table.make(row, shapes, dtype)
        self.weights = arrays.on_gpu(call.weights), call.weights
        self.states = [
            [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(weights)]
            for optimizer, weights in zip(self.optimizers, self.weights, strict=True)
        ]

    def step(self, *grads, distinct=False):
        strays = self.optimizers[0].sparse_update
        ours = [arrays.on_gpu(g) if isinstance(g, np.ndarray) else on_gpu(g, distinct, strays) for g in grads]
        for optimizer, weights, states, own in zip(
            self.optimizers, self.weights, self.states, (ours, list(grads)), strict=True
        ):
            optimizer.update_multi_precision(self.indices, weights, own, states)

    def flush(self):
        for optimizer, weights, states in zip(self.optimizers, self.weights, self.states, strict=True):
            optimizer.flush(self.indices, weights, states)

    def check(self, tolerance=1e-6):
        found, expected = (
            table.leaves([weights, states]) for weights, states in zip(self.weights, self.states, strict=True)
        )
        table.assert_alike(self.row, arrays.on_cpu(found), expected, tolerance)


def kinds(n, dtype="float32"):
    """A gradient of each form in turn; every row is touched now and then, one of them late."""
    rows = np.random.default_rng(n).integers(0, 8 if n < 5 else 9, 3)
    return csr(dtype=dtype, seed=n) if n % 3 == 1 else block(rows, dtype=dtype, seed=n)


@table.each
def test_rows_catch_up(row):
    """Each touched row is at every step what the CPU has, and all of them are after a flush."""
    pair = Pair(row, [SHAPE, SHAPE])
    alone = Pair(row)  # where there is one tensor, kernels go another way
    for n in range(7):
        pair.step(kinds(n), kinds(n))
        alone.step(kinds(n))
        pair.check()
        alone.check()
    pair.flush()
    pair.check()
    assert not pair.states[0][0][1].array.any()
    pair.step(kinds(7), kinds(8))
    pair.check()


@some
def test_catching_up_is_what_a_dense_step_does(name):
    row = table.row(name)
    pair, dense = Pair(row), Pair(row, sparse_update="dense")
    for n in range(5):
        for run in (pair, dense):
            run.optimizers[0].set_learning_rate(0.1 / (n + 1))
            run.optimizers[0].wd = 0.01 * n * (not row.cls.per_row)
            run.step(kinds(n))
    pair.flush()
    states = [state[0] for state in pair.states[0]], dense.states[0]
    found, expected = (
        arrays.on_cpu(table.leaves([run.weights[0], state]))
        for run, state in zip((pair, dense), states, strict=True)
    )
    table.assert_bits(found, expected)


@some
def test_catching_up_with_dense_gradients_between(name):
    row = table.row(name)
    pair = Pair(row, [SHAPE, (4, 3)])
    rng = np.random.default_rng(0)
    for n in range(7):
        dense = rng.standard_normal(SHAPE).astype("float32")
        pair.step(dense if n in (2, 5) else kinds(n), block([n % 4, 1], (4, 3), seed=n))
        pair.check()
    pair.flush()
    pair.check()


@pytest.mark.filterwarnings("ignore:states in float16")
@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@pytest.mark.parametrize(("dtype", "masters"), [("float64", False), ("float16", False), ("float16", True)])
def test_catching_up_in_other_precisions(name, dtype, masters):
    pair = Pair(table.row(name), dtype=dtype, multi_precision=masters)
    for n in range(4):
        pair.step(kinds(n, dtype))
        pair.check(1e-6 if dtype == "float64" or masters else 1e-2)
    pair.flush()
    pair.check(1e-6 if dtype == "float64" or masters else 1e-2)


@pytest.mark.parametrize("name", ["adamax", "groupadagrad"])
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_states_rounded_by_chance(name, mode):
    """Each step that is made up for has the chance of its own number."""
    row = table.row(name)
    pair = Pair(row, sparse_update=mode, state_dtype="bfloat16", stochastic_rounding=True, seed=3)
    for n in range(4):
        pair.step(kinds(n))
        pair.check(1e-2)
    pair.flush()
    pair.check(1e-2)


def test_catching_up_with_distinct_rows_and_other_dimensions():
    pair = Pair(table.row("adamax"), [(5,), (4, 2, 3)])
    for rows in ([1, 4], [0, 3], [4, 2], [1, 2]):
        pair.step(block(rows, (5,)), block([r % 4 for r in rows], (4, 2, 3)), distinct=True)
        pair.check()
    pair.flush()
    pair.check()


def test_many_steps(monkeypatch):
    """The history is of a fixed length: once it is full, all rows catch up. Nothing else can be told."""
    monkeypatch.setattr(numba_opt.cuda.deferred, "ROOM", 3)
    pair = Pair(table.row("ftml"))
    for n in range(8):
        pair.step(block([n % 2, 5], seed=n))
        assert pair.optimizers[0]._deferred[0].recorded == 1 + n % 3
        found = arrays.on_cpu(table.leaves([pair.weights[0], pair.states[0][0][0]]))
        expected = table.leaves([pair.weights[1], pair.states[1][0][0]])
        table.assert_bits([a[[n % 2, 5]] for a in found], [a[[n % 2, 5]] for a in expected])
    pair.flush()
    pair.check()


def test_what_catching_up_launches(driver):
    """Two launches more than a lazy step has; nothing is copied or compiled from step to step."""
    pair = Pair(table.row("nag"))
    grad = on_gpu(block([3, 1]), distinct=True)
    optimizer, weights, states = pair.optimizers[0], pair.weights[0], pair.states[0]
    for _ in range(2):
        driver.launches.clear()
        optimizer.update([0], weights, [grad], states)
    assert driver.launches == ["catch_up", "rows", "record"]
    driver.launches.clear()
    optimizer.flush([0], weights, states)
    assert driver.launches == ["copy", "catch_up", "forget"]
    driver.launches.clear()
    optimizer.flush([0], weights, states)
    assert not driver.launches


@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_an_optimizer_is_copied_with_what_rows_have_yet_to_do(how):
    pair = Pair(table.row("adamax"))
    for n in range(4):
        pair.step(kinds(n))
    assert pair.optimizers[0]._deferred[0].recorded == 4
    pair.optimizers = tuple(map(how, pair.optimizers))
    pair.step(kinds(4))
    pair.check()
    pair.flush()
    pair.check()


@pytest.mark.parametrize("there", [True, False])
def test_moving_in_the_middle(there):
    """From the GPU to the CPU, and the other way, last_step and recorded steps and all."""
    pair = Pair(table.row("ftml"))
    for n in range(4):
        pair.step(kinds(n))
    if there:
        pair.weights = arrays.on_cpu(pair.weights[0]), pair.weights[1]
        pair.states = [arrays.on_cpu(pair.states[0]), pair.states[1]]
        pair.optimizers[0].update([0], pair.weights[0], [kinds(4)], pair.states[0])
        pair.optimizers[1].update([0], pair.weights[1], [kinds(4)], pair.states[1])
        pair.flush()
        table.assert_bits(
            table.leaves([pair.weights[0], pair.states[0]]), table.leaves([pair.weights[1], pair.states[1]])
        )
    else:
        pair.optimizers = pair.optimizers[::-1]
        weights, states = arrays.on_gpu(pair.weights[1]), arrays.on_gpu(pair.states[1])
        pair.weights = weights, arrays.on_cpu(pair.weights[0])
        pair.states = [states, arrays.on_cpu(pair.states[0])]
        pair.step(kinds(4))
        pair.check()
        pair.flush()
        pair.check()


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
@pytest.mark.parametrize("mode", ["lazy", "dense", "exact"])
def test_what_is_warmed_up(driver, name, mode):
    """Whatever a trainer launches is among what `warmup` compiles."""
    from numba_opt.cuda import kernels as loops
    from numba_opt.tools.wanted import cuda_kernels, variants

    row = table.row(name)
    call = table.make(row, [SHAPE] * 3)
    optimizer = table.build(row, sparse_update=mode)
    trainer = numba_opt.Trainer(arrays.on_gpu(call.weights), optimizer, clip_global_norm=1.0)
    for index in ("int32", "int64"):
        rows = block([1, 2] * 7)
        rows.rows = rows.rows.astype(index)
        distinct = on_gpu(block([1, 2]), distinct=True)
        trainer.step([on_gpu(rows), on_gpu(csr(index=index)), distinct])
    for _ in range(3):
        trainer.accumulate(arrays.on_gpu(call.grads))
    trainer.step()
    for grad in (block(), csr()):
        trainer.accumulate([on_gpu(grad)] * 3)
    trainer.accumulate(arrays.on_gpu(call.grads))
    trainer.step([on_gpu(csr())] * 3)
    trainer.flush()
    driver.finish()
    used = {program.key for program in driver.covered}
    made = cuda_kernels(variants(optimizer), ["f32"], sparse=True)
    ready = {getattr(loops, kernel)(*args).key for kernel, *args in made}
    assert used <= ready
    exact = {"catch_up", "record", "forget"}
    assert {key[0] for key in used} & exact == (exact if mode == "exact" else set())


def test_a_new_state_owes_nothing():
    pair = Pair(table.row("nag"))
    for n in range(3):
        pair.step(kinds(n))
    for optimizer, weights, states in zip(pair.optimizers, pair.weights, pair.states, strict=True):
        states[0] = optimizer.create_state(0, weights[0])
    pair.step(kinds(3))
    pair.check()


@pytest.mark.parametrize("bad", [False, True])
def test_a_trainer_catches_up(bad, tmp_path):
    """With norms, a step that is skipped, multipliers, and a checkpoint in the middle."""
    row = table.row("adamax")
    call = table.make(row, [SHAPE, (4, 3), (5, 2)])
    options = {"clip_global_norm": 2.0, "skip_nonfinite": True, "lr_mult": {"1": 0.5}}
    gpu, cpu = (
        numba_opt.Trainer(w, table.build(row, wd=0.1, sparse_update="exact"), **options)
        for w in (arrays.on_gpu(call.weights), call.weights)
    )
    for n in range(6):
        grads = [kinds(n), block([n % 4], (4, 3), seed=n), call.grads[2]]
        if bad and n == 2:
            grads[1].values[0, 1] = np.nan
        if n == 4:
            grads[1] = None
        ours = [g if g is None else arrays.on_gpu(g) if g is grads[2] else on_gpu(g) for g in grads]
        for trainer, own in ((gpu, ours), (cpu, grads)):
            if not (bad and n == 2 and trainer is cpu):
                trainer.step(own)
        if bad and n == 2:  # on the GPU it is counted, as the host does not know
            cpu.optimizer._update_count([0, 1, 2])
        if n == 3:
            gpu.save(tmp_path / "a.safetensors")
            gpu.load(tmp_path / "a.safetensors")
            cpu.flush()
    assert gpu.skipped_steps == bad
    gpu.flush()
    cpu.flush()
    found, expected = ([*t.params.values(), *table.leaves(list(t.states.values()))] for t in (gpu, cpu))
    table.assert_near(arrays.on_cpu(found), expected, 1e-6)


@pytest.mark.parametrize("marks", [[-(10**12)] * 9, [10**12] * 9])
def test_last_step_that_are_nonsense(marks):
    """The host does not see them; kernels stay within the history."""
    pair = Pair(table.row("nag"))
    pair.step(block([1]))
    pair.states[0][0][1].array[:] = marks
    pair.optimizers[0].update([0], pair.weights[0], [on_gpu(block([1, 2]))], pair.states[0])
    assert pair.states[0][0][1].array[[1, 2]].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "last_step of parameter 0 is a numpy.ndarray, which is not on a GPU", lambda s: s.array),
        (TypeError, "last_step of parameter 0 is .*; expected an array of int64",
         lambda s: arrays.on_gpu(s.array.astype("i4"))),
        (ValueError, r"last_step of parameter 0 has shape \(3,\); expected \(9,\)",
         lambda s: arrays.on_gpu(np.zeros(3, "i8"))),
        (ValueError, "last_step of parameter 0 must be contiguous and writable",
         lambda s: arrays.DeviceArray(s.array, read_only=True)),
        (ValueError, "last_step of parameter 0 is on CUDA device 1; expected device 0",
         lambda s: arrays.DeviceArray(s.array, 1)),
    ],
)  # fmt: skip
def test_bad_last_step(driver, error, message, change):
    pair = Pair(table.row("nag"))
    pair.step(block([1]))
    state, last_step = pair.states[0][0]
    driver.launches.clear()
    with pytest.raises(error, match=message):
        pair.optimizers[0].update([0], pair.weights[0], [on_gpu(block([1]))], [(state, change(last_step))])
    with pytest.raises(TypeError, match=r"expected \(state, last_step\)"):
        pair.optimizers[0].update([0], pair.weights[0], [on_gpu(block([1]))], [state])
    assert not driver.launches
    assert pair.optimizers[0]._deferred[0].recorded == 1
