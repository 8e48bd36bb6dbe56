"""What a GPU's kernels would not survive is refused before anything is launched, in words."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt import RowSparse

from .. import table
from ..conformance.backends import Ptx
from ..conformance.gradients import SHAPE, block, csr
from ..ptx import arrays

PTX = Ptx()
on_gpu = PTX.put


def refused(driver, row, call, error, message, change):
    """A step with something wrong in it raises, and launches and changes nothing."""
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    weights, grads, states = change(weights, grads, states)
    driver.launches.clear()
    optimizer = table.build(row)
    with pytest.raises(error, match=message):
        optimizer.fused_step(call.indices, weights, grads, states)
    assert not driver.launches
    assert optimizer.num_update == 0


def elsewhere(array, number=1):
    return arrays.DeviceArray(array.array, number)


def part_of(array):
    return arrays.DeviceArray.part(arrays.DeviceArray(np.zeros((5, 14), np.float32)), np.s_[:, ::2])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "gradient of parameter 0 is a numpy.ndarray.*expected a CUDA array",
         lambda w, g, s: (w, [g[0].array, g[1]], s)),
        (TypeError, "state 'var' of parameter 1 is a numpy.ndarray.*expected a CUDA array",
         lambda w, g, s: (w, g, [s[0], (s[1][0], s[1][1].array)])),
        (ValueError, "gradient of parameter 1 is on CUDA device 1; expected device 0, as the weight",
         lambda w, g, s: (w, [g[0], elsewhere(g[1])], s)),
        (ValueError, r"gradient of parameter 0 has shape \(8, 16\); expected \(5, 7\)",
         lambda w, g, s: (w, [g[1], g[1]], s)),
        (TypeError, "gradient of parameter 0 is float64; expected float32",
         lambda w, g, s: (w, [arrays.on_gpu(g[0].array.astype("f8")), g[1]], s)),
        (TypeError, "gradient of parameter 0 is int32",
         lambda w, g, s: (w, [arrays.on_gpu(g[0].array.astype("i4")), g[1]], s)),
        (ValueError, "gradient of parameter 0 has strides .*; expected a contiguous CUDA array",
         lambda w, g, s: (w, [part_of(g[0]), g[1]], s)),
        (ValueError, "weight of parameter 0 is read-only",
         lambda w, g, s: ([arrays.DeviceArray(w[0].array, read_only=True), w[1]], g, s)),
        (ValueError, "weight of parameter 0 shares memory with gradient of parameter 0",
         lambda w, g, s: (w, [w[0], g[1]], s)),
        (ValueError, "state 'mean' of parameter 1 shares memory with state 'mean' of parameter 0|has shape",
         lambda w, g, s: (w, g, [s[0], (s[0][0], s[1][1])])),
        (TypeError, "weight of parameter 1 is a numpy.ndarray",
         lambda w, g, s: ([w[0], w[1].array], g, s)),
    ],
)  # fmt: skip
def test_bad_arrays(driver, error, message, change):
    row = table.row("adamax")
    refused(driver, row, table.make(row, [(5, 7), (8, 16)]), error, message, change)


# ---------------------------------------------------------------- sparse gradients


def changed(**others):
    grad = on_gpu(csr())
    for name, array in others.items():
        setattr(grad, name, arrays.on_gpu(array))
    return grad


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (lambda: on_gpu(block(shape=(9, 5))), ValueError, r"has shape \(9, 5\); expected \(9, 6\)"),
        (lambda: block(), TypeError,
         "gradient of parameter 0 is a numba_opt.cpu.row_sparse.RowSparse.*not on a GPU"),
        (lambda: csr(), TypeError, "gradient of parameter 0 is a scipy.sparse.*not on a GPU"),
        (lambda: on_gpu(block(dtype="int32")), TypeError, "values of RowSparse are int32"),
        (lambda: RowSparse(arrays.on_gpu(np.zeros(2, "u4")), arrays.on_gpu(np.zeros((2, 6))), SHAPE),
         TypeError, "rows of gradient of parameter 0 are uint32; expected int32 or int64"),
        (lambda: changed(indptr=np.zeros(3, "i4")), ValueError,
         "indptr of gradient .* has length 3; expected 10"),
        (lambda: changed(indices=np.zeros(9, "i8")), TypeError, "int64 and int32; expected the same"),
        (lambda: changed(data=np.zeros(9, "i4")), TypeError, "data of gradient of parameter 0 are int32"),
        (lambda: SimpleNamespace(format="coo", shape=SHAPE, tocsr=None), TypeError,
         "expected RowSparse or a CSR matrix"),
    ],
)  # fmt: skip
def test_bad_gradients(driver, grad, error, message):
    row = table.row("nag")
    call = table.make(row, [SHAPE])
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    optimizer = table.build(row)
    driver.launches.clear()
    with pytest.raises(error, match=message):
        optimizer.update([0], weights, [grad()], states)
    assert not driver.launches
    assert optimizer.num_update == 0


def test_gradients_that_share_memory_with_weights():
    row = table.row("nag")
    call = table.make(row, [(2, 6)])
    weights, states = arrays.on_gpu(call.weights), arrays.on_gpu(call.states)
    grad = RowSparse(arrays.on_gpu(np.array([0, 1])), weights[0], (2, 6))
    with pytest.raises(ValueError, match="shares memory with gradient of parameter 0"):
        table.build(row).update([0], weights, [grad], states)


# ---------------------------------------------------------------- sums

SHAPES = [(5, 7), (8, 16), 33]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "gradient of parameter '1' is a numpy.ndarray.*expected a CUDA array", lambda g: g.array),
        (ValueError, r"gradient of parameter '1' has shape \(2,\); expected \(8, 16\)",
         lambda g: arrays.on_gpu(np.ones(2, "f4"))),
        (TypeError, "gradient of parameter '1' is float64; expected float32",
         lambda g: arrays.on_gpu(g.array.astype("f8"))),
        (ValueError, "gradient of parameter '1' is on CUDA device 1; expected device 0",
         lambda g: elsewhere(g)),
        (ValueError, r"gradient of parameter '1' has shape \(8, 15\); expected \(8, 16\)",
         lambda g: numba_opt.RowSparse(arrays.on_gpu(np.zeros(1, "i8")),
                                       arrays.on_gpu(np.zeros((1, 15), "f4")), (8, 15))),
    ],
)  # fmt: skip
def test_gradients_that_cannot_be_added(driver, error, message, change):
    row = table.row("nag")
    call = table.make(row, SHAPES)
    gpu, ours = numba_opt.Trainer(on_gpu(call.weights), table.build(row)), on_gpu(call.grads)
    bad = [ours[0], change(ours[1]), ours[2]]
    for _ in range(2):  # without anything accumulated, and with
        before = gpu.state_dict()["accumulated"]
        driver.launches.clear()
        for call in (gpu.accumulate, gpu.step):
            if call == gpu.accumulate or before:
                with pytest.raises(error, match=message):
                    call(bad)
        assert not driver.launches
        after = gpu.state_dict()["accumulated"]
        assert after.keys() == before.keys()
        table.assert_bits([*after.values()], [*before.values()])
        gpu.accumulate(ours)


# ---------------------------------------------------------------- rows that catch up


def catching_up():
    """An optimizer whose rows catch up, after a step of row 1, with its arrays and a step of other rows."""
    weights = on_gpu(table.make(table.row("nag"), [SHAPE]).weights)
    optimizer = numba_opt.NAG(sparse_update="exact")
    state = optimizer.create_state(0, weights[0])

    def step(rows):
        optimizer.update([0], weights, [on_gpu(block(rows))], [state])

    step([1])
    return optimizer, weights, state, step


@pytest.mark.parametrize("marks", [[-(10**12)] * 9, [10**12] * 9])
def test_stamps_that_are_nonsense(marks):
    """The host does not see them; kernels stay within the history."""
    _, _, (_, last_step), step = catching_up()
    last_step.array[:] = marks
    step([1, 2])
    assert last_step.array[[1, 2]].tolist() == [2, 2]


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
def test_bad_stamps(driver, error, message, change):
    optimizer, weights, (state, last_step), _ = catching_up()
    driver.launches.clear()
    with pytest.raises(error, match=message):
        optimizer.update([0], weights, [on_gpu(block([1]))], [(state, change(last_step))])
    with pytest.raises(TypeError, match=r"expected \(state, last_step\)"):
        optimizer.update([0], weights, [on_gpu(block([1]))], [state])
    assert not driver.launches
    assert optimizer._deferred[0].recorded == 1
