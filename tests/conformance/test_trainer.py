"""`Trainer`: norms, guards, multipliers and checkpoints are the same on every backend."""

from __future__ import annotations

import numpy as np
import pytest

import numba_opt

from .. import table
from .gradients import SHAPE, block, csr
from .pairs import Twins

SHAPES = [(5, 7), (8, 16), 33]


@table.each
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_global_norm(backend, row, limit):
    twins = Twins(backend, row, SHAPES, trainer={"clip_global_norm": limit})
    for _ in range(2):
        twins.step(*twins.grads, batch_size=2)
    twins.agree_on_norms()
    twins.agree(1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_steps_that_are_skipped(backend, bad):
    twins = Twins(backend, table.row("adamax"), SHAPES, trainer={"skip_nonfinite": True})
    twins.step(*twins.grads)
    before = backend.get(twins.content(twins.ours))
    worse = [grad.copy() for grad in twins.grads]
    worse[1][0, 3] = bad
    ours = twins.given(worse)
    twins.ours.step(ours)
    table.assert_bits(backend.get(twins.content(twins.ours)), before)
    assert twins.ours.skipped_steps == 1
    assert not np.isfinite(twins.ours.grad_norm)
    # on a GPU a step is counted nonetheless, as the host does not know
    assert twins.ours.optimizer.num_update == 1 + backend.on_device
    backend.write(ours[1], twins.grads[1])
    twins.ours.step(ours)
    assert twins.ours.skipped_steps == 1
    if backend.on_device:
        twins.theirs.optimizer._update_count([0, 1, 2])
    twins.theirs.step(twins.grads)
    twins.agree()  # all but the counts is as it was


def test_multipliers_freezing_and_gradients_that_are_missing(backend):
    twins = Twins(backend, table.row("rmsprop"), SHAPES, trainer={"lr_mult": {"1": 0.5}})
    twins.step(twins.grads[0], None, twins.grads[2])
    twins.step(*twins.grads)
    twins.each(lambda trainer: trainer.freeze("0"))
    twins.step(*twins.grads)
    twins.each(lambda trainer: trainer.set_learning_rate(0.3))
    twins.step(*twins.grads, batch_size=4)
    twins.agree()


def test_more_groups_than_before(backend):
    """Buffers that grow are where everybody looks from then on, whoever adds up the norm included."""
    twins = Twins(backend, table.row("nag"), [3, 40, 5, 7, 9], trainer={"clip_global_norm": 0.5})
    for multipliers in ({}, {str(k): 1.0 + k for k in range(5)}, {"1": 0.5}):
        twins.each(lambda trainer, given=multipliers: trainer.set_lr_mult(given))
        ours = twins.given(twins.grads)
        for _ in range(2):
            twins.ours.step(ours)
            twins.theirs.step(twins.grads)
        twins.agree(1e-6)


def test_many_groups_of_many_tensors(backend):
    """More sums of squares, and more hyper-parameters, than a block has threads."""
    rates = {str(k): 1.0 + k / 1100 for k in range(1100)}
    options = {"clip_global_norm": 0.5, "lr_mult": rates}
    twins = Twins(backend, table.row("nag-plain"), [1 + k % 3 for k in range(1100)], trainer=options)
    twins.step(*twins.grads)
    twins.agree_on_norms()
    twins.agree(1e-6)


@pytest.mark.parametrize("trainer", [{}, {"clip_global_norm": 0.5}])
def test_chance_is_taken_over_from_a_file(backend, trainer):
    """There was none before."""
    kept = {"state_dtype": "bfloat16", "beta1": 0.5}
    call = table.make(table.row("adamax"), SHAPES)
    chance = numba_opt.Trainer(call.weights, "adamax", stochastic_rounding=True, **kept)
    chance.step(call.grads)
    twins = Twins(backend, table.row("adamax"), SHAPES, trainer=trainer, **kept)
    twins.step(*twins.grads)
    twins.each(lambda trainer: trainer.load_state_dict(chance.state_dict()))
    twins.theirs.optimizer.use_fused_step = backend.on_device
    for _ in range(2):
        twins.step(*twins.grads)
    assert twins.ours.optimizer.stochastic_rounding
    if trainer and backend.on_device:  # a norm's rounding may lead to another neighbour of a state
        found = backend.get([*twins.ours.params.values()])
        table.assert_near(found, [*twins.theirs.params.values()], 1e-5)
    else:
        twins.agree()


def test_new_gradients_at_each_step(backend):
    twins = Twins(backend, table.row("nag"), [3, 40])
    for scale in (1, 2, 3):
        twins.step(*[np.float32(scale) * grad for grad in twins.grads])
    twins.agree()


@pytest.mark.parametrize("name", ["nag", "ftml", "groupadagrad"])
def test_checkpoints(backend, name, tmp_path):
    """From a backend to the reference and back."""
    twins = Twins(backend, table.row(name), [(5, 7), (4, 8)], trainer={"skip_nonfinite": True})
    twins.ours.step(twins.given(twins.grads))
    twins.ours.save(tmp_path / "a.safetensors")
    twins.theirs.load(tmp_path / "a.safetensors")
    table.assert_bits(backend.get(twins.content(twins.ours)), twins.content(twins.theirs))
    assert all(isinstance(array, np.ndarray) for array in twins.content(twins.theirs))
    twins.theirs.step(twins.grads)
    twins.ours.load_state_dict(twins.theirs.state_dict())
    table.assert_bits(backend.get(twins.content(twins.ours)), twins.content(twins.theirs))
    twins.agree()
    assert ("on CUDA" in repr(twins.ours)) == backend.on_device


def test_arrays_of_the_other_side(device):
    """Weights and their gradients and states are on one side, all of a trainer's on one kind of device."""
    optimizer = numba_opt.NAG(momentum=0)
    here, there = np.ones(5, "f4"), device.put(np.ones(5, "f4"))
    with pytest.raises(TypeError, match="not on a GPU; expected a CUDA array, as the weight"):
        optimizer.update([0], [there], [here], [None])
    with pytest.raises(
        TypeError, match=r"gradient of parameter 0 is on a GPU.*; expected an array on the CPU, as the weight"
    ):
        optimizer.update([0], [here], [there], [None])
    with pytest.raises(ValueError, match="params are on the CPU and on GPUs"):
        numba_opt.Trainer([there, here], "nag")


# ---------------------------------------------------------------- several devices


@pytest.fixture
def several(device):
    if device.devices < 2:
        pytest.skip("needs two GPUs")
    return device


def over(several, name="nag", where=(0, 1, 1, 0), shapes=((5, 7), 4096 * 2 + 100, 33, (8, 16)), **trainer):
    """Parameters on several devices, and gradients whose squares add up exactly."""
    twins = Twins(several, table.row(name), shapes, where=where, trainer=trainer)
    for grad in twins.grads:
        grad[...] = np.round(4 * grad)
    return twins


def agree(twins):
    """To the bit, with norms."""
    assert twins.ours.grad_norm == twins.theirs.grad_norm
    assert twins.ours.skipped_steps == twins.theirs.skipped_steps
    twins.agree()


def test_two_devices(several):
    twins = Twins(several, table.row("nag"), [3, 40, 5], where=[0, 1, 0])
    for _ in range(2):
        twins.step(*twins.grads)
    twins.agree()
    grads = twins.given(twins.grads)
    with pytest.raises(ValueError, match="is on CUDA device 1; expected device 0"):
        twins.ours.step([several.put(twins.grads[0], 1), *grads[1:]])


def test_norms_over_devices(several):
    """The same on all of them."""
    twins = over(several, clip_global_norm=0.5, skip_nonfinite=True)
    for scale in (1, 3, 1):
        for grad in twins.grads:
            grad *= scale
        twins.step(*twins.grads, batch_size=2)
        agree(twins)


@pytest.mark.parametrize("t", range(4))
def test_a_step_that_is_skipped_everywhere(several, t):
    twins = over(several, skip_nonfinite=True)
    ours = twins.given(twins.grads)
    twins.ours.step(ours)
    before = several.get(twins.content(twins.ours))
    worse = twins.grads[t].copy()
    worse.flat[1] = np.nan
    several.write(ours[t], worse)
    twins.ours.step(ours)
    table.assert_bits(several.get(twins.content(twins.ours)), before)
    assert twins.ours.skipped_steps == 1
    several.write(ours[t], twins.grads[t])
    twins.ours.step(ours)
    assert twins.ours.skipped_steps == 1
    assert np.isfinite(twins.ours.grad_norm)


def test_parts_that_change(several):
    """Gradients that are missing, on all of a device too, and sparse ones: shares of the sums are others."""
    twins = over(several, where=(0, 1, 1), shapes=[SHAPE, (5, 7), SHAPE], clip_global_norm=0.5)
    rows, matrix, full = block([7, 2, 7, 0]), csr(), twins.grads
    rows.values[...] = np.round(rows.values)
    matrix.data[...] = np.round(matrix.data)
    patterns = [full, [rows, full[1], None], [None, full[1], full[2]], [rows, None, matrix], full]
    for grads in patterns:
        ours = twins.given(grads)
        for _ in range(2):
            twins.ours.step(ours)
            twins.theirs.step([*grads])
            agree(twins)


# ---------------------------------------------------------------- graphs


def replayed(twins, grads, rates):
    """A step that is captured after one that is not, and launched again at each learning rate."""
    ours = twins.given(grads)
    twins.ours.step(ours)
    twins.theirs.step(grads)
    again = twins.backend.captured(lambda: twins.ours.step(ours))
    twins.agree(1e-6)
    for lr in rates:
        twins.each(lambda trainer, lr=lr: trainer.set_learning_rate(lr))
        twins.ours.advance(batch_size=2)
        again()
        twins.theirs.step(grads, batch_size=2)
        twins.agree(1e-6)


@pytest.mark.parametrize("name", ["ftml", "rmsprop"])
@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5, "skip_nonfinite": True}])
def test_a_captured_step(device, name, options):
    """Replayed, kernels see new hyper-parameters."""
    twins = Twins(device, table.row(name), [3, 40, (8, 16)], trainer=options)
    replayed(twins, twins.grads, (0.1, 0.1, 0.03, 0.001))


def test_a_captured_sparse_step(device):
    """Row numbers may change from replay to replay, as may the values."""
    twins = Twins(device, table.row("nag"))
    theirs = block([1, 4, 4])
    (ours,) = twins.given([theirs])
    twins.ours.step([ours])
    twins.theirs.step([theirs])
    again = device.captured(lambda: twins.ours.step([ours]))
    theirs.rows[:], theirs.values[:] = [8, 8, 8], theirs.values[::-1].copy()
    device.write(ours.rows, theirs.rows)
    device.write(ours.values, theirs.values)
    twins.ours.advance()
    again()
    twins.theirs.step([theirs])
    twins.agree()


# ---------------------------------------------------------------- at a GPU's size


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5, "skip_nonfinite": True}])
def test_large_arrays(gpu, options):
    twins = Twins(gpu, table.row("ftml"), [(5, 7), (8, 16), 3, 0, (300, 64), 100_003], trainer=options)
    for lr in (0.1, 0.1, 0.02):
        twins.each(lambda trainer, lr=lr: trainer.set_learning_rate(lr))
        twins.step(*twins.grads, batch_size=2)
    if options:
        twins.agree_on_norms()
    twins.agree(1e-6)
