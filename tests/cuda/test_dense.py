"""Dense steps on a GPU: the CPU's results, to the bit."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  bfloat16 needs it
import numpy as np
import pytest

from .. import table
from ..ptx import arrays

SHAPES = [(5, 7), (8, 16), 3, 0, (1, 130), (2, 1301), (3, 500)]


def both(row, call, steps=2, **options):
    """Weights and states after some steps: on the GPU, and on the CPU."""
    options = table.common(row) | options
    gpu, cpu = table.build(row, **options), table.build(row, **options)
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    for _ in range(steps):
        cpu.update_multi_precision(*call)
        gpu.update_multi_precision(call.indices, weights, grads, states)
    return arrays.on_cpu([weights, states]), table.outputs(call)


@table.each
@table.each_dtype
def test_the_cpus_results(row, dtype):
    table.assert_alike(row, *both(row, table.make(row, SHAPES, dtype)))


@table.each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(row, dtype):
    call = table.make(row, [(8, 16), (5, 7), (2, 1301)], dtype)
    table.assert_alike(row, *both(row, call), tolerance=1e-2)


@table.each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("grads", ["half", "single"])
def test_master_weights(row, dtype, grads):
    call = table.make(row, [(4, 16), (3, 5), (2, 1301)], dtype)
    optimizer = table.build(row, multi_precision=True)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
    if grads == "single":
        call = call._replace(grads=[g.astype(np.float32) for g in call.grads])
    table.assert_alike(row, *both(row, call._replace(states=states), multi_precision=True))


@table.each
def test_half_gradients_of_single_weights(row):
    call = table.make(row, [(4, 16), (3, 5), (2, 1301)])
    table.assert_alike(row, *both(row, call._replace(grads=[g.astype(np.float16) for g in call.grads])))


def test_values_that_are_no_numbers():
    row = table.row("rmsprop")
    call = table.make(row, [64])
    call.grads[0][:6] = [np.nan, np.inf, -np.inf, 3e38, 1e-42, -0.0]
    call.weights[0][8:11] = [np.nan, np.inf, -0.0]
    table.assert_alike(row, *both(row, call))


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_arrays_that_begin_anywhere(offset):
    """16-byte accesses only where all arrays allow them: a device refuses others."""
    row = table.row("adamax")
    call = table.make(row, [37 + offset] * 2)
    moved = call._replace(weights=[w[offset:] for w in call.weights])
    rest = [[a[:37] for a in call.grads], [tuple(s[:37] for s in state) for state in call.states]]
    moved = moved._replace(grads=rest[0], states=rest[1])
    table.assert_alike(row, *both(row, moved))


def test_many_tensors_with_rows_of_hyper_parameters():
    row = table.row("nag")
    call = table.make(row, [3, 50, 0, 7, 20])
    expected = call.copy()
    gpu, cpu = table.build(row, **table.common(row)), table.build(row, **table.common(row))
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    for multipliers in ({}, {0: 2.0, 3: 0.5}, {k: 1 + k for k in range(5)}):
        cpu.set_lr_mult(multipliers)
        gpu.set_lr_mult(multipliers)
        cpu.update(*expected)
        gpu.update(call.indices, weights, grads, states)
    table.assert_bits(arrays.on_cpu([weights, states]), table.outputs(expected))


def test_chunks():
    """A tensor of several chunks, the last one a part, and another after it."""
    row = table.row("nag-plain")
    call = table.make(row, [2 * 4096 + 37, 5])
    table.assert_alike(row, *both(row, call, steps=1))


def test_one_launch_for_all_tensors_of_a_layout(driver):
    row = table.row("nag")
    call = table.make(row, [4] * 30)
    optimizer = table.build(row)
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    driver.launches.clear()
    for _ in range(3):
        optimizer.update(call.indices, weights, grads, states)
    assert driver.launches == ["copy", "set_coefficients", "dense", "dense", "dense"]
    optimizer.set_learning_rate(0.5)
    optimizer.update(call.indices, weights, grads, states)
    assert driver.launches[5:] == ["set_coefficients", "dense"]  # nothing is compiled or copied again


def test_every_element_is_read_and_written_once(driver):
    row = table.row("rmsprop-centered")
    call = table.make(row, [4096 + 30, 9])
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    optimizer = table.build(row)
    optimizer.update(call.indices, weights, grads, states)
    arrays.on_cpu(weights)
    held = [array for array in table.leaves([weights, grads, states]) if array.size]
    touched = [
        place + size * k
        for _, places, _, size, count, _, _ in driver.last.log.entries
        for k in range(count)
        for place in places.tolist()
        if any(array.address <= place < array.address + 4 * array.size for array in held)
    ]
    places = np.unique(touched, return_counts=True)
    elements = sum(w.size for w in call.weights)
    assert len(places[0]) == 5 * elements
    assert sorted(places[1]) == [1] * elements + [2] * 4 * elements  # gradients are only read


def test_step_is_fused_step():
    row = table.row("nag")
    call = table.make(row, [5])
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    table.build(row).step(call.indices, weights, grads, states)
    table.build(row).fused_step(*call)
    table.assert_alike(row, arrays.on_cpu([weights, states]), table.outputs(call))


@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
def test_states_of_another_dtype(name, kept):
    row = table.row(name)
    call = table.make(row, [(4, 16), (3, 5), (2, 1301)])
    optimizer = table.build(row, state_dtype=kept)
    call = call._replace(states=[optimizer.create_state(t, w) for t, w in enumerate(call.weights)])
    gpu = table.build(row, state_dtype=kept)
    made = gpu.create_state(0, arrays.on_gpu(call.weights[0]))
    assert {array.dtype for array in table.leaves(made)} == {np.dtype(kept)}
    table.assert_alike(row, *both(row, call, state_dtype=kept))


def by_chance(row, kept, call, seed=5, **options):
    """The call with states in half precision, and the options for rounding them by chance."""
    options = {"state_dtype": kept, "stochastic_rounding": True, "seed": seed, **options}
    optimizer = table.build(row, **options)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
    rng = np.random.default_rng(6)
    for state in states:
        masters = options.get("multi_precision")
        for array in table.leaves(state[1] if masters else state):
            array[...] = rng.random(array.shape)
    return call._replace(states=states), options


@table.each
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_rounding_by_chance(row, kept):
    """The CPU's bits, for many tensors, two chunks, and groups of 16 bytes with what is left of them.

    Squares of whole numbers are added exactly, in any order.
    """
    shapes = [(5, 7), (8, 16), 3, 0, (1, 130)] if row.cls.per_row else [4096 + 37, (8, 16), 0, 3]
    call = table.make(row, shapes)
    if row.cls.per_row:
        call = call._replace(grads=[np.round(4 * grad) for grad in call.grads])
    call, options = by_chance(row, kept, call)
    found, expected = both(row, call.copy(), **options, rescale_grad=1.0, clip_gradient=None)
    table.assert_bits(found, expected)
    if row.states:
        other, _ = both(row, call, **{**options, "seed": 6}, rescale_grad=1.0, clip_gradient=None)
        with pytest.raises(AssertionError):
            table.assert_bits(other, expected)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_rounding_by_chance_of_other_weights(dtype):
    row = table.row("adamax")
    call, options = by_chance(row, "bfloat16", table.make(row, [(4, 16), 37], dtype), multi_precision=True)
    table.assert_bits(*both(row, call, **options))


def test_rounding_by_chance_is_by_index_and_count():
    """Not by the place in a call; and a run goes on as the CPU's does."""
    row = table.row("ftml")
    call, options = by_chance(row, "float16", table.make(row, [(4, 16), 37]))
    cpu, gpu = table.build(row, **options), table.build(row, **options)
    weights, grads, states = (arrays.on_gpu(part) for part in call[1:])
    for _ in range(3):
        cpu.update([8, "b"], *call[1:])
        for t in (1, 0):
            gpu.update([(8, "b")[t]], weights[t : t + 1], grads[t : t + 1], states[t : t + 1])
    table.assert_bits(arrays.on_cpu([weights, states]), table.outputs(call))
