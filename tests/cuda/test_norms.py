"""The norm of gradients that are on several devices: all of them see the same one."""

from __future__ import annotations

import numpy as np
import pytest

import numba_opt

from .. import table
from ..ptx import arrays
from ..ptx.driver import Driver, installed
from .test_rows import SHAPE, block, csr, on_gpu

SHAPES = [(5, 7), 4096 * 2 + 100, 33, (8, 16)]


def twins(name="nag", where=(0, 1, 1, 0), shapes=SHAPES, **options):
    """A trainer over several devices and one on the CPU, and gradients whose squares add up exactly."""
    row = table.row(name)
    call = table.make(row, shapes)
    for grad in call.grads:
        grad[...] = np.round(4 * grad)
    gpu = numba_opt.Trainer(
        [arrays.on_gpu(w, n) for w, n in zip(call.weights, where, strict=True)],
        table.build(row, **table.common(row)),
        **options,
    )
    cpu = numba_opt.Trainer(call.weights, table.build(row, **table.common(row)), **options)
    return gpu, cpu, [arrays.on_gpu(g, n) for g, n in zip(call.grads, where, strict=True)], call.grads


def content(trainer):
    return [*trainer.params.values(), *table.leaves(list(trainer.states.values()))]


def agree(gpu, cpu):
    assert gpu.grad_norm == cpu.grad_norm
    assert gpu.skipped_steps == cpu.skipped_steps
    table.assert_bits(arrays.on_cpu(content(gpu)), content(cpu))


@pytest.mark.parametrize("seed", range(5))
def test_several_devices(seed):
    """The CPU's bits, in whatever order the devices come by what they have been given."""
    with installed(Driver(devices=3, processors=2, seed=seed)):
        where = (0, 2, 1, 2)
        gpu, cpu, ours, theirs = twins(where=where, clip_global_norm=0.5, skip_nonfinite=True)
        for scale in (1, 3, 1):
            for grad, own in zip(ours, theirs, strict=True):
                own *= scale
                grad.array[...] = own
            gpu.step(ours, batch_size=2)
            cpu.step(theirs, batch_size=2)
            assert {buffer.outputs()[1] for buffer in buffers(gpu)} == {cpu.grad_norm}
            agree(gpu, cpu)


def buffers(trainer):
    (bound,) = trainer._bound.values()
    return [steps.buffer for steps in bound.executor.steps]


@pytest.mark.parametrize("seed", range(3))
def test_steps_in_a_row(seed):
    """Nobody looks at what the devices do meanwhile: a sum is not overwritten while another device has yet
    to fetch it."""
    with installed(Driver(seed=seed)) as driver:
        gpu, cpu, _, theirs = twins(where=(0, 1), shapes=[5, 7], clip_global_norm=0.5)
        kept = []
        for scale in range(1, 41):
            fresh = [np.float32(scale % 7 + 1) * grad for grad in theirs]
            kept.append([arrays.on_gpu(grad, n) for n, grad in enumerate(fresh)])
            gpu.step(kept[-1])
            cpu.step(fresh)
        agree(gpu, cpu)
        before = driver.reads
        gpu.step(kept[-1])
        assert driver.reads == before
        assert driver.launches.count("peer") == 2 * 41


@pytest.mark.parametrize("t", range(4))
def test_a_step_that_is_skipped_everywhere(t):
    gpu, _, ours, _ = twins(skip_nonfinite=True)
    gpu.step(ours)
    before = arrays.on_cpu(content(gpu))
    good = ours[t].array.flat[1]
    ours[t].array.flat[1] = np.nan
    gpu.step(ours)
    table.assert_bits(arrays.on_cpu(content(gpu)), before)
    assert gpu.skipped_steps == 1
    ours[t].array.flat[1] = good
    gpu.step(ours)
    assert gpu.skipped_steps == 1
    assert np.isfinite(gpu.grad_norm)


def test_parts_that_change():
    """Gradients that are missing, on all of a device too, and sparse ones: shares of the sums are others."""
    shapes = [SHAPE, (5, 7), SHAPE]
    gpu, cpu, ours, theirs = twins(where=(0, 1, 1), shapes=shapes, clip_global_norm=0.5)
    whole = block([7, 2, 7, 0])
    whole.values[...] = np.round(whole.values)
    entries = csr()
    entries.data[...] = np.round(entries.data)
    for grads in (
        theirs,
        [whole, theirs[1], None],
        [None, theirs[1], theirs[2]],
        [whole, None, entries],
        theirs,
    ):
        own = [
            None if g is None else ours[t] if g is theirs[t] else placed(g, t) for t, g in enumerate(grads)
        ]
        for _ in range(2):
            gpu.step(own)
            cpu.step(grads)
            agree(gpu, cpu)


def placed(grad, t):
    """A sparse gradient on the device of its parameter."""
    if t == 0:
        return on_gpu(grad)
    found = on_gpu(grad)
    for name in ("data", "indices", "indptr"):
        setattr(found, name, arrays.on_gpu(getattr(grad, name), 1))
    return found


def test_norms_over_devices_are_not_captured(driver):
    gpu, _, ours, _ = twins(clip_global_norm=0.5)
    gpu.step(ours)
    driver.launches.clear()
    with (
        driver.capture(0, 0),
        driver.capture(0, 1),
        pytest.raises(RuntimeError, match="a norm over several devices cannot be captured"),
    ):
        gpu.step(ours)
    assert not driver.launches
