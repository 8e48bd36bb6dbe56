"""Dense steps: the formula's, and one backend's like another's."""

from __future__ import annotations

import numpy as np
import pytest

from .. import table
from .pairs import Pair, conform_dense

pytestmark = pytest.mark.filterwarnings("ignore:states in float16", "ignore:states in bfloat16")

SHAPES = [(5, 7), (8, 16), 3, 0, (1, 130), (2, 1301), (3, 500)]
LARGE = [(5, 7), (8, 16), 3, 0, (1, 130), (300, 64), 100_003]

each_half = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@table.each
@table.each_path
@table.each_dtype
@pytest.mark.parametrize("options", ["defaults", "all"])
def test_formula(backend, row, path, dtype, options):
    """In float64, as the docstring has it. On a GPU `step` is `fused_step`."""
    options = table.common(row) if options == "all" else {}
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(table.fit(row, (9, 21))).astype(dtype)
    grads = rng.standard_normal((7, *weight.shape)).astype(dtype)
    expected = table.reference(row, weight, grads, **options)
    optimizer, weight = table.build(row, **options), backend.put(weight)
    state = optimizer.create_state(0, weight)
    for grad in grads:
        getattr(optimizer, path)([0], [weight], [backend.put(grad)], [state])
    # some roundings in each of 7 steps, some of them amplified by a division; measured 4e-16 and 3e-7
    table.assert_near(backend.get([weight, state]), expected, {"float32": 2e-6, "float64": 4e-15}[dtype])


@table.each
@table.each_dtype
def test_steps(backend, row, dtype):
    conform_dense(backend, row, table.make(row, SHAPES, dtype))


@table.each
@each_half
def test_half_precision(backend, row, dtype):
    call = table.make(row, [(8, 16), (5, 7), (2, 1301)], dtype)
    conform_dense(backend, row, call)


@table.each
@each_half
@pytest.mark.parametrize("grads", ["half", "single"])
def test_master_weights(backend, row, dtype, grads):
    call = table.make(row, [(4, 16), (3, 5), (2, 1301)], dtype)
    if grads == "single":
        call = call._replace(grads=[g.astype(np.float32) for g in call.grads])
    conform_dense(backend, row, call, multi_precision=True)


@table.each
def test_half_gradients_of_single_weights(backend, row):
    call = table.make(row, [(4, 16), (3, 5), (2, 1301)])
    conform_dense(backend, row, call._replace(grads=[g.astype(np.float16) for g in call.grads]))


def test_values_that_are_no_numbers(backend):
    row = table.row("rmsprop")
    call = table.make(row, [64])
    call.grads[0][:6] = [np.nan, np.inf, -np.inf, 3e38, 1e-42, -0.0]
    call.weights[0][8:11] = [np.nan, np.inf, -0.0]
    with np.errstate(all="ignore"):
        conform_dense(backend, row, call)


@table.each
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_weights_that_begin_anywhere(backend, row, offset):
    """16-byte accesses only where all arrays allow them: a device refuses others."""
    call = table.make(row, [(4, 9), 37])
    memory = [np.zeros(w.size + offset, w.dtype) for w in call.weights]
    begun = [m[offset:].reshape(w.shape) for m, w in zip(memory, call.weights, strict=True)]
    for part, weight in zip(begun, call.weights, strict=True):
        part[...] = weight
    conform_dense(backend, row, call._replace(weights=begun))


def test_rows_of_hyper_parameters(backend):
    row = table.row("nag")
    call = table.make(row, [3, 50, 0, 7, 20])
    pair = Pair(backend, row, call=call)
    for multipliers in ({}, {0: 2.0, 3: 0.5}, {k: 1 + k for k in range(5)}):
        pair.each(lambda optimizer, given=multipliers: optimizer.set_lr_mult(given))
        pair.step(*call.grads)
    pair.check()


def test_chunks(backend):
    """A tensor of several chunks, the last one a part, and another after it."""
    row = table.row("nag-plain")
    conform_dense(backend, row, table.make(row, [2 * 4096 + 37, 5]), steps=1)


@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
def test_states_of_another_dtype(backend, name, kept):
    pair = Pair(backend, table.row(name), [(4, 16), (3, 5), (2, 1301)], state_dtype=kept)
    assert {array.dtype for array in backend.get(table.leaves(pair.states[0]))} == {np.dtype(kept)}
    pair.step(*table.make(pair.row, [(4, 16), (3, 5), (2, 1301)]).grads, times=2)
    pair.check()


# ---------------------------------------------------------------- rounding by chance

CHANCE = {"stochastic_rounding": True, "seed": 5}


@table.each
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_rounding_by_chance(backend, row, kept):
    """The CPU's bits, for many tensors, two chunks, and groups of 16 bytes with what is left of them.

    Squares of whole numbers are added exactly, in any order.
    """
    shapes = [(5, 7), (8, 16), 3, 0, (1, 130)] if row.cls.per_row else [4096 + 37, (8, 16), 0, 3]
    call = table.make(row, shapes)
    if row.cls.per_row:
        call = call._replace(grads=[np.round(4 * grad) for grad in call.grads])
    options = {**CHANCE, "state_dtype": kept, "rescale_grad": 1.0, "clip_gradient": None}
    pair, other = (Pair(backend, row, call=call.copy(), **options | {"seed": seed}) for seed in (5, 6))
    for some in (pair, other):
        some.step(*call.grads, times=2)
    found, expected = pair.both()
    if backend.on_device:
        table.assert_bits(found, expected)
    else:
        pair.check()
    if row.states:
        with pytest.raises(AssertionError):
            table.assert_bits(other.both()[0], found)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_rounding_by_chance_of_other_weights(backend, dtype):
    row = table.row("adamax")
    options = {**CHANCE, "state_dtype": "bfloat16", "multi_precision": True}
    conform_dense(backend, row, table.make(row, [(4, 16), 37], dtype), **options)


def test_rounding_by_chance_is_by_index_and_count(backend):
    """Not by the place in a call; and a run goes on as the CPU's does."""
    row = table.row("ftml")
    call = table.make(row, [(4, 16), 37])
    pair = Pair(backend, row, call=call, **CHANCE, state_dtype="float16")
    grads = pair.given(call.grads)
    for _ in range(3):
        pair.theirs.update([8, "b"], pair.expected, call.grads, pair.states[1])
        for t in (1, 0):
            one = slice(t, t + 1)
            pair.ours.update([8, "b"][one], pair.weights[one], grads[one], pair.states[0][one])
    pair.check()


# ---------------------------------------------------------------- at a GPU's size


@table.each
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_large_arrays(gpu, row, dtype):
    conform_dense(gpu, row, table.make(row, LARGE, dtype), steps=3)


@table.each
@each_half
def test_large_arrays_with_master_weights(gpu, row, dtype):
    conform_dense(gpu, row, table.make(row, LARGE, dtype), steps=3, multi_precision=True)


@table.each
@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_rounding_by_chance_of_large_arrays(gpu, row, kept):
    """The CPU's bits, but where a row's squares, added in another order, lead to another neighbour."""
    options = {**CHANCE, "state_dtype": kept}
    conform_dense(gpu, row, table.make(row, LARGE), steps=3, tolerance=1e-2, **options)


def test_a_thousand_random_lists(gpu):
    rng = np.random.default_rng(0)
    row = table.row("adamax")
    for seed in range(1000):
        shapes = rng.choice([0, 1, 3, 4, 31, 128, 4095, 4096, 4097, 20_000], rng.integers(1, 9)).tolist()
        conform_dense(gpu, row, table.make(row, shapes, seed=seed), steps=1)
