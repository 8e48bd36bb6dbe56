"""The norm of gradients that are on several devices, in whatever order these come by their work."""

from __future__ import annotations

import numpy as np
import pytest

from ..conformance.backends import Ptx
from ..conformance.test_trainer import agree, over
from ..ptx.driver import Driver, installed

PTX = Ptx()


@pytest.mark.parametrize("seed", range(5))
def test_several_devices(seed):
    """The CPU's bits, and the same norm on each device."""
    with installed(Driver(devices=3, processors=2, seed=seed)):
        twins = over(PTX, where=(0, 2, 1, 2), clip_global_norm=0.5, skip_nonfinite=True)
        ours = twins.given(twins.grads)
        for scale in (1, 3, 1):
            for grad, own in zip(ours, twins.grads, strict=True):
                own *= scale
                grad.array[...] = own
            twins.ours.step(ours, batch_size=2)
            twins.theirs.step(twins.grads, batch_size=2)
            assert {buffer.outputs()[1] for buffer in buffers(twins.ours)} == {twins.theirs.grad_norm}
            agree(twins)


def buffers(trainer):
    (bound,) = trainer._bound.values()
    return [steps.buffer for steps in bound.executor.steps]


@pytest.mark.parametrize("seed", range(3))
def test_steps_in_a_row(seed):
    """Nobody looks at what the devices do meanwhile: a sum is not overwritten while another device has yet
    to fetch it."""
    with installed(Driver(seed=seed)) as driver:
        twins = over(PTX, where=(0, 1), shapes=[5, 7], clip_global_norm=0.5)
        kept = []
        for scale in range(1, 41):
            fresh = [np.float32(scale % 7 + 1) * grad for grad in twins.grads]
            kept.append(twins.given(fresh))
            twins.ours.step(kept[-1])
            twins.theirs.step(fresh)
        agree(twins)
        before = driver.reads
        twins.ours.step(kept[-1])
        assert driver.reads == before
        assert driver.launches.count("peer") == 2 * 41


def test_norms_over_devices_are_not_captured(driver):
    twins = over(PTX, clip_global_norm=0.5)
    ours = twins.given(twins.grads)
    twins.ours.step(ours)
    driver.launches.clear()
    with (
        driver.capture(0, 0),
        driver.capture(0, 1),
        pytest.raises(RuntimeError, match="a norm over several devices cannot be captured"),
    ):
        twins.ours.step(ours)
    assert not driver.launches
