"""The device: its memory, its streams, and launches that cost as little as they can.

An ordinary launch through Numba looks at every argument's type. Here a kernel's arguments are numbers in C
arrays that are made once, and a launch hands the driver their address. NVIDIA's own bindings are used, in the
device's primary context, which Numba, CuPy and PyTorch share.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver

from .code import compiled
from .units import KernelSource


class DriverError(RuntimeError):
    """The CUDA driver could not do what it was asked for."""


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the driver and return its results; raise if it fails."""
    error, *found = function(*args)
    if error:
        text = driver.cuGetErrorString(error)[1]
        told = text.decode() if isinstance(text, bytes) else str(error)
        raise DriverError(f"{function.__name__}: {told}")
    return found[0] if len(found) == 1 else tuple(found)


def device_of(address: int) -> int:
    """The number of the device that has an address."""
    start()
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(call(driver.cuPointerGetAttribute, kind, address))


@functools.cache
def start() -> None:
    """Have a driver; raises if there is none."""
    call(driver.cuInit, 0)


def count() -> int:
    """Return the number of devices."""
    return int(call(driver.cuDeviceGetCount))


@functools.cache
def device(number: int) -> Device:
    """A device by its number."""
    return Device(number)


class Device:
    """One GPU."""

    def __init__(self, number: int) -> None:
        start()
        self.number = number
        self._handle = call(driver.cuDeviceGet, number)
        self._current = Current(call(driver.cuDevicePrimaryCtxRetain, self._handle))
        kinds = driver.CUdevice_attribute
        major = self._ask(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        self.capability = (major, self._ask(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        self.processors = self._ask(kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self._functions: dict[KernelSource, Any] = {}

    def _ask(self, kind: Any) -> int:
        return int(call(driver.cuDeviceGetAttribute, kind, self._handle))

    def describe(self) -> dict[str, Any]:
        """Return the device's name, its compute capability and the bytes of its memory."""
        name = call(driver.cuDeviceGetName, 256, self._handle).split(b"\0")[0].decode()
        memory = int(call(driver.cuDeviceTotalMem, self._handle))
        return {"name": name, "capability": "{}.{}".format(*self.capability), "bytes": memory}

    def current(self) -> Current:
        """Return a context in which the driver works for this device."""
        return self._current

    def function(self, kernel: KernelSource) -> Any:
        """A kernel, compiled and loaded."""
        found = self._functions.get(kernel)
        if found is None:
            code = compiled(kernel, self.capability)
            with self.current():
                module = call(driver.cuModuleLoadData, code.cubin)
                found = call(driver.cuModuleGetFunction, module, code.name.encode())
            self._functions[kernel] = found
        return found

    def read(self, address: int, size: int) -> bytes:
        """Return bytes of the device's memory, once everything on the device is done."""
        found = ctypes.create_string_buffer(size)
        with self.current():
            call(driver.cuCtxSynchronize)
            if size:
                call(driver.cuMemcpyDtoH, ctypes.addressof(found), address, size)
        return found.raw

    def assign(self, address: int, content: np.ndarray) -> None:
        """Write the content of a contiguous array to the device's memory, once everything there is done."""
        with self.current():
            call(driver.cuCtxSynchronize)
            if content.nbytes:
                call(driver.cuMemcpyHtoD, address, content.ctypes.data, content.nbytes)

    def memory(self, size: int) -> Memory:
        """Allocate memory of the device, all zero."""
        return Memory(self, size)

    def pinned(self, size: int) -> Pinned:
        """Allocate memory of the host that the device can read by itself."""
        return Pinned(self, size)

    def synchronize(self, stream: int) -> None:
        """Wait until a stream has come to its end."""
        with self.current():
            call(driver.cuStreamSynchronize, stream)

    def bring(self, address: int, owner: Device, source: int, size: int, stream: int) -> None:
        """Copy another device's memory here, when the stream gets to it."""
        contexts = self._current.context, owner._current.context
        with self.current():
            call(driver.cuMemcpyPeerAsync, address, contexts[0], source, contexts[1], size, stream)

    def capturing(self, stream: int) -> bool:
        """Tell whether what is launched on a stream goes into a graph, instead of being carried out."""
        with self.current():
            status = call(driver.cuStreamIsCapturing, stream)
        return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)

    def after(self, stream: int, other: int, owner: Device | None = None) -> None:
        """Let a stream wait for what another one, perhaps another device's, has been given so far."""
        with (owner or self).current():
            mark = call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            call(driver.cuEventRecord, mark, other)
        with self.current():
            call(driver.cuStreamWaitEvent, stream, mark, 0)
            call(driver.cuEventDestroy, mark)  # once it has happened


class Current:
    """A device's context, as a context of Python's."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        call(driver.cuCtxPushCurrent, self.context)

    def __exit__(self, *error: object) -> None:
        call(driver.cuCtxPopCurrent)


class Memory:
    """Some memory of a device."""

    address = 0  # until there is some

    def __init__(self, device: Device, size: int) -> None:
        self._device, self.size = device, size
        with device.current():
            self.address = int(call(driver.cuMemAlloc, max(size, 1)))
            call(driver.cuMemsetD8, self.address, 0, max(size, 1))
            call(driver.cuStreamSynchronize, 0)  # streams that do not wait for the default one write here

    def __del__(self) -> None:
        if self.address:
            try:
                with self._device.current():
                    driver.cuMemFree(self.address)  # waits until nobody uses it
            except Exception:  # the process is ending, and the driver may have gone
                return

    def fill(self, pinned: Pinned, stream: int) -> None:
        """Copy pinned memory here, when the stream gets to it."""
        with self._device.current():
            call(driver.cuMemcpyHtoDAsync, self.address, pinned.address, pinned.size, stream)
            pinned.mark(stream)

    def read(self, size: int) -> bytes:
        """Return the first bytes, once everything on the device is done."""
        return self._device.read(self.address, size)


class Pinned:
    """Some memory of the host that the device reads by itself, at a time of its own."""

    address = 0  # until there is some

    def __init__(self, device: Device, size: int) -> None:
        self._device, self.size = device, size
        with device.current():
            self._mark = call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            self.address = int(call(driver.cuMemHostAlloc, max(size, 1), 0))
        self.words = np.ctypeslib.as_array((ctypes.c_int64 * (size // 8)).from_address(self.address))

    def mark(self, stream: int) -> None:
        """Note that the stream has been asked to read this."""
        call(driver.cuEventRecord, self._mark, stream)

    def settle(self) -> None:
        """Wait until it has been read."""
        with self._device.current():
            call(driver.cuEventSynchronize, self._mark)

    def __del__(self) -> None:
        if self.address:
            try:
                with self._device.current():
                    driver.cuEventSynchronize(self._mark)
                    driver.cuEventDestroy(self._mark)
                    driver.cuMemFreeHost(self.address)
            except Exception:  # as above
                return


class Launch:
    """A kernel with its arguments, ready to be launched any number of times.

    The `reals` are where they are given, and may be changed there: a launch takes them along, so that earlier
    ones are not disturbed.
    """

    def __init__(
        self,
        device: Device,
        kernel: KernelSource,
        blocks: int,
        threads: int,
        integers: Sequence[int],
        reals: np.ndarray | None = None,
    ) -> None:
        self._integers, self._reals = (ctypes.c_int64 * len(integers))(*integers), reals
        places = [ctypes.addressof(self._integers) + 8 * k for k in range(kernel.integers)]
        if reals is not None:
            places += [reals.ctypes.data + 8 * k for k in range(kernel.reals)]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._launch = functools.partial(
            driver.cuLaunchKernel, device.function(kernel), max(blocks, 1), 1, 1, threads, 1, 1, 0
        )
        self._arguments = ctypes.addressof(self._places)

    def __call__(self, stream: int) -> None:
        """Launch it, in the device's context."""
        (error,) = self._launch(stream, self._arguments, 0)
        if error:
            raise DriverError(f"cuLaunchKernel: {error}")


def array(number: int, content: np.ndarray) -> Any:
    """A Numba device array with the content of an array of the host."""
    from numba import cuda

    with cuda.gpus[number]:
        return cuda.to_device(content)
