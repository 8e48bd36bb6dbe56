"""`Trainer` on a GPU: memory that moves, streams, capture, and fresh tensors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt.cuda import arrays as cuda_arrays
from numba_opt.cuda import call as cuda_call

from .. import table
from ..conformance.backends import Ptx
from ..conformance.pairs import Twins
from ..ptx import arrays

PTX = Ptx()


def twins(name, shapes, **options):
    """A trainer on the GPU and one on the CPU, and gradients for the former."""
    made = Twins(PTX, table.row(name), shapes, trainer=options)
    return made, made.given(made.grads)


def agree(gpu, cpu):
    found, expected = Twins.content(gpu), Twins.content(cpu)
    table.assert_bits(arrays.on_cpu(found), expected)
    assert gpu.optimizer.num_update == cpu.optimizer.num_update


def test_the_norm_does_not_depend_on_who_adds(monkeypatch):
    norms = set()
    for blocks in (1, 2, 3):
        monkeypatch.setattr(cuda_arrays.kernels().driver.device(0), "processors", blocks)
        both, ours = twins("nag-plain", [4096 * 2 + 100, 50], clip_global_norm=1.0)
        both.ours.step(ours)
        norms.add(both.ours.grad_norm)
    assert len(norms) == 1


class Pointing(arrays.DeviceArray):
    """An array that says where it is as CuPy's do, too."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.address)


@pytest.mark.parametrize("kind", [arrays.DeviceArray, Pointing])
def test_arrays_that_move(kind):
    """An array's object may be the same and its memory another: that of a gradient, or of a weight."""
    call = table.make(table.row("nag"), [3, 40])
    weights, grads = ([kind(a) for a in part] for part in (call.weights, call.grads))
    gpu, cpu = numba_opt.Trainer(weights, "nag"), numba_opt.Trainer(call.weights, "nag")
    for moved in ([], [grads[0]], [weights[1], grads[1]], [weights[0]]):
        for array in moved:
            array.move()
        for trainer, given in ((gpu, grads), (cpu, call.grads)):
            trainer.step(given)
            trainer.step(given)
        agree(gpu, cpu)


def test_a_step_holds_no_gradient():
    import weakref

    both, ours = twins("nag", [3, 40])
    both.ours.step(ours)
    gone = weakref.ref(ours[0])
    del ours
    assert gone() is None


@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.5, "skip_nonfinite": True}])
def test_what_goes_into_a_graph(driver, options):
    """Kernels and nothing else; nothing is done, and no step counted, before it is launched."""
    both, ours = twins("ftml", [3, 40], **options)
    both.ours.step(ours)
    before = arrays.on_cpu(both.content(both.ours))
    driver.launches.clear()
    with driver.capture(0) as graph:
        both.ours.step(ours)
    assert not driver.launches
    table.assert_bits(arrays.on_cpu(both.content(both.ours)), before)
    assert both.ours.optimizer.num_update == 1
    assert graph.names[-1] == "dense"
    assert not {"set_coefficients", "copy"} & {*graph.names}


def test_what_cannot_be_captured(driver):
    both, ours = twins("nag", [3])
    with pytest.raises(ValueError, match="advance needs a step that has been captured"):
        both.ours.advance()
    driver.launches.clear()
    with driver.capture(0), pytest.raises(RuntimeError, match="make one before the capture"):
        both.ours.step(ours)
    assert not driver.launches
    assert both.ours.optimizer.num_update == 0


def test_streams(driver):
    import numba_opt.cuda

    both, ours = twins("nag", [3])
    gpu, stream = both.ours, driver.stream()
    driver.launches.clear()
    driver.streams_used.clear()
    with numba_opt.cuda.on(stream):
        gpu.step(ours)
    gpu.step(ours)
    assert driver.launches == ["copy", "set_coefficients", "dense", "dense"]
    assert driver.streams_used == [stream] * 3 + [0]
    assert driver.waits == [(0, stream)]
    with (
        pytest.raises(TypeError, match="stream must be a CUDA stream or its address"),
        numba_opt.cuda.on("a"),
    ):
        pass


def test_fresh_tensors_of_torch(driver, monkeypatch):
    """New gradients like the last ones go into the table that is there, once their memory is checked."""
    import sys
    from types import ModuleType

    class Tensor(arrays.DeviceArray):
        """What is asked of a PyTorch tensor on a GPU."""

        layout, is_cuda, device = "torch.strided", True, type("device", (), {"index": 0})

        def __init__(self, array):
            super().__init__(array)
            self.dtype = f"torch.{array.dtype}"

        def data_ptr(self):
            return self.address

        def is_neg(self):
            return False

        def numel(self):
            return self.size

        def storage_offset(self):
            return 0

        def untyped_storage(self):
            return SimpleNamespace(nbytes=lambda: self.array.nbytes)

        def stride(self):
            return tuple(stride // self.array.itemsize for stride in self.array.strides)

        def element_size(self):
            return self.array.itemsize

    class Stream:
        cuda_stream = 0

    torch = ModuleType("torch")
    torch.Tensor, torch.strided = Tensor, Tensor.layout
    torch.cuda = type("cuda", (), {"current_stream": staticmethod(lambda number: Stream)})
    torch.zeros = lambda shape, dtype, device: Tensor(np.zeros(shape, str(dtype)[6:]))
    monkeypatch.setitem(sys.modules, "torch", torch)
    row = table.row("nag")
    call = table.make(row, [3, 40])
    looks = []
    look = cuda_call.look
    monkeypatch.setattr(cuda_call, "look", lambda *args: looks.append(1) or look(*args))
    gpu = numba_opt.Trainer([Tensor(w) for w in call.weights], table.build(row))
    cpu = numba_opt.Trainer(call.weights, table.build(row))
    kept = []  # so that each one is elsewhere
    for scale in (1, 2, 3):
        fresh = [np.float32(scale) * grad for grad in call.grads]
        kept.append([Tensor(grad) for grad in fresh])
        looks.clear()
        driver.launches.clear()
        gpu.step(kept[-1])
        cpu.step(fresh)
        assert bool(looks) == (scale == 1)
        assert driver.launches[-2:] == ["copy", "dense"] or scale == 1
    agree(gpu, cpu)
    with pytest.raises(ValueError, match="shares memory with gradient"):
        gpu.step([gpu.params["0"], kept[0][1]])
    agree(gpu, cpu)
    gpu.step(kept[1])
    cpu.step([np.float32(2) * grad for grad in call.grads])
    agree(gpu, cpu)
    driver.launches.clear()
    gpu.step([Tensor.part(tensor, np.s_[:]) for tensor in kept[1]])  # other tensors in the same memory
    cpu.step([np.float32(2) * grad for grad in call.grads])
    agree(gpu, cpu)
    assert driver.launches == ["dense"]
