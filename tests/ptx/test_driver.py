"""What stands in the driver's place: queues that take turns, memory that is nobody else's, and errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import numba_opt
import numba_opt.cuda

from .. import table
from ..scripts import environment

pytestmark = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="needs the package numba-cuda: pip install 'numba_opt[cuda]'"
)

SEEDS = range(12)


def steps_on_two_streams(seed, count=6):
    """Whether steps that go to two streams in turn, with new gradients and rates, give the CPU's results."""
    from . import arrays
    from .driver import Driver, installed

    call = table.make(table.row("nag"), [(5, 7), 33])
    with installed(Driver(seed=seed)) as driver:
        streams = driver.stream(), driver.stream()
        gpu = numba_opt.Trainer(arrays.on_gpu(call.weights), "nag")
        cpu = numba_opt.Trainer(call.weights, "nag")
        kept = []
        for n in range(count):
            grads = [np.float32(1 + n) * grad for grad in call.grads]
            kept.append(arrays.on_gpu(grads))
            for trainer in (gpu, cpu):
                trainer.set_learning_rate(0.1 / (1 + n))
            with numba_opt.cuda.on(streams[n % 2]):
                gpu.step(kept[-1])
            cpu.step(grads)
        found = arrays.on_cpu([*gpu.params.values()])
    return all(map(np.array_equal, found, cpu.params.values()))


def test_steps_on_two_streams():
    assert all(map(steps_on_two_streams, SEEDS))


def test_a_wait_that_is_missing(monkeypatch):
    from numba_opt.cuda import driver as cuda_driver

    monkeypatch.setattr(cuda_driver.Device, "after", lambda *args: None)
    assert not all(map(steps_on_two_streams, SEEDS))


def test_pinned_memory_that_is_used_again_too_early(monkeypatch):
    from numba_opt.cuda import driver as cuda_driver

    monkeypatch.setattr(cuda_driver.Pinned, "settle", lambda pinned: None)
    assert not all(map(steps_on_two_streams, SEEDS))


def test_memory_that_is_used_before_it_is_zero(monkeypatch):
    from .driver import Driver

    monkeypatch.setattr(Driver, "cuStreamSynchronize", lambda driver, stream: (0,))
    assert not all(map(steps_on_two_streams, SEEDS))


@pytest.fixture
def driver():
    from .driver import Driver, installed

    with installed(Driver()) as made:
        yield made


def test_kernels_that_use_the_hosts_memory(driver):
    from . import arrays
    from .faults import KernelError

    class Host(arrays.DeviceArray):
        """Says that it is on the device."""

    weight, host = arrays.on_gpu(np.zeros(5, "f4")), np.zeros(5, "f4")
    grad = Host(host)
    trainer = numba_opt.Trainer([weight], "nag")
    grad.address = host.ctypes.data
    driver.cuPointerGetAttribute = lambda kind, address: (0, 0)
    trainer.step([grad])
    with pytest.raises(KernelError, match="outside of all arrays"):
        arrays.on_cpu(weight)
    with pytest.raises(KernelError, match="outside of all arrays"):  # as long as the device lives
        trainer.step([grad])
    driver.forgive()


SCRIPT = """
import sys
import numpy as np
from numba_opt.cuda import arrays as cuda_arrays
from tests.ptx import arrays
from tests.ptx.driver import Driver, installed

with installed(Driver()):
    shadow = cuda_arrays.look(arrays.on_gpu(np.ones(4, np.float32)), "array").shadow
    print(shadow.shape, flush=True)
    if sys.argv[1] == "read":
        print(shadow[0])
    else:
        shadow[0] = 1
"""


@pytest.mark.parametrize("what", ["read", "write"])
def test_the_host_cannot_use_a_devices_memory(what):
    """As where there is a GPU, it ends by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "(4,)\n"
    assert done.returncode not in (0, 1), done.stderr


def test_memory_that_was_freed(driver):
    from . import arrays
    from .faults import KernelError

    weight, grad = arrays.on_gpu(np.zeros(5, "f4")), arrays.on_gpu(np.ones(5, "f4"))
    trainer = numba_opt.Trainer([weight], "nag")
    trainer.step([grad])
    arrays.on_cpu(weight)
    driver.memories[0].free(grad.address)
    grad._end.detach()
    trainer.step([grad])
    with pytest.raises(KernelError, match="outside of all arrays"):
        arrays.on_cpu(weight)
    driver.forgive()


def test_what_the_driver_refuses(driver):
    from numba_opt.cuda import arrays as cuda_arrays

    module = cuda_arrays.kernels().driver
    gpu, other = module.device(0), module.device(1)
    with pytest.raises(module.DriverError, match="invalid resource handle"):
        gpu.capturing(0x77)
    with pytest.raises(module.DriverError, match="invalid argument"):
        module.device_of(np.zeros(3).ctypes.data)
    kernel = cuda_arrays.loops().set_coefficients()
    launch = module.Launch(gpu, kernel, 1, 1, (gpu.memory(8 * 60).address, 16, 0), np.zeros(16))
    with pytest.raises(module.DriverError, match="cuLaunchKernel: 201"), other.current():
        launch(0)
    with driver.capture(0), pytest.raises(module.DriverError, match="not permitted when stream is capturing"):
        gpu.memory(8)
    with driver.capture(0) as graph, gpu.current():
        launch(0)
    assert graph.names == ["set_coefficients"]
    assert driver.launches == []


def test_a_graph_has_its_arguments_for_itself(driver):
    """What was given with a launch is what it had when it was captured."""
    from numba_opt.cuda import arrays as cuda_arrays

    gpu, loops = cuda_arrays.kernels().driver.device(0), cuda_arrays.loops()
    memory, numbers = gpu.memory(8 * 60), np.full(16, 5.0)
    launch = cuda_arrays.kernels().driver.Launch(
        gpu, loops.set_coefficients(), 1, 1, (memory.address, 16, 0), numbers
    )
    with driver.capture(0) as graph, gpu.current():
        launch(0)
    numbers[:] = 7.0
    graph.launch(0)
    assert np.frombuffer(memory.read(8 * 20), "f8")[4:].tolist() == [5.0] * 16


def test_everything_is_as_before_afterwards():
    from numba_opt.cuda import arrays as cuda_arrays
    from numba_opt.cuda import driver as cuda_driver

    from .driver import Driver, installed

    before = cuda_driver.driver, cuda_driver.compiled
    with installed(Driver()):
        assert cuda_arrays.devices()[0].describe()["name"] == "Interpreted"
        assert cuda_driver.driver is not before[0]
    assert (cuda_driver.driver, cuda_driver.compiled) == before
    assert cuda_driver.device.cache_info().currsize == 0
