"""A real GPU's streams: a step goes behind what the caller's stream has been given, and nobody waits."""

from __future__ import annotations

import numpy as np
import pytest

import numba_opt.cuda

from .backends import Numba, Torch, on_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch():
    return on_gpu(Torch).module


def test_the_current_stream(torch):
    """What comes after a step waits for it."""
    weight = torch.ones(1_000_000, device="cuda")
    trainer = numba_opt.Trainer([weight], "nag", learning_rate=1, momentum=0)
    trainer.step([torch.zeros_like(weight)])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grad = torch.zeros_like(weight)
        torch.cuda._sleep(100_000_000)  # some 50 ms
        grad += 1
        trainer.step([grad])
        assert not stream.query()  # nobody has waited
        found = weight + 0
    stream.synchronize()
    assert found.unique().tolist() == [0]


def test_a_stream_by_its_address(torch):
    backend, stream = on_gpu(Numba), torch.cuda.Stream()
    weight, grad = backend.put([np.ones(1000, "f4")] * 2)
    optimizer = numba_opt.NAG(learning_rate=1, momentum=0)
    with numba_opt.cuda.on(stream):
        optimizer.update([0], [weight], [grad], [None])
    stream.synchronize()
    assert (backend.get(weight) == 0).all()
