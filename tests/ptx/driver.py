"""What stands in the place of NVIDIA's driver: its functions, by their names, for devices that are none.

Like the real one this says what went wrong by numbers, and raises nothing. But what a kernel does wrong
is raised at whoever comes next, again and again, until the test is over.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import library
from .faults import KernelError
from .memory import PROCESS, DeviceMemory
from .queues import Event, Queues
from .scheduling import Run

INVALID, NO_CONTEXT, HANDLE, CAPTURE, ISOLATION = 1, 201, 400, 900, 905
ERRORS = {
    INVALID: "invalid argument",
    NO_CONTEXT: "invalid device context",
    HANDLE: "invalid resource handle",
    CAPTURE: "operation not permitted when stream is capturing",
    ISOLATION: "dependency created on uncaptured work in another stream",
}


class Context:
    """A device's, for the stack of those that are current."""

    def __init__(self, number: int, driver: Driver) -> None:
        self.number, self.driver = number, weakref.ref(driver)


class Function(SimpleNamespace):
    """A kernel that has been loaded."""


_current: list[Driver] = []


def current() -> Driver:
    """The one that is there now."""
    return _current[-1]


class Driver(Queues):
    """The driver's functions, and what tests ask a device for."""

    def __init__(
        self,
        devices: int = 2,
        capability: tuple[int, int] = (9, 0),
        processors: int = 1,
        seed: int = 0,
        ordered: bool = True,
        any_thread_next: bool = False,
    ) -> None:
        from cuda.bindings import driver as real

        for name in ("CUpointer_attribute", "CUdevice_attribute", "CUevent_flags", "CUstreamCaptureStatus"):
            setattr(self, name, getattr(real, name))
        super().__init__(devices, seed)
        self.capability, self.processors, self.ordered = capability, processors, ordered
        self.streams_used: list[int] = []  # of launches and copies, in the same order
        self.waits: list[tuple[int, int]] = []  # which streams wait for which others
        self.covered: dict[Any, set[int]] = {}  # the basic blocks of each program that were run
        self.reads = 0  # how often the host has waited for what a device holds
        self._lanes = np.random.default_rng(seed) if any_thread_next else None
        self.memories = [DeviceMemory(number) for number in range(devices)]
        self._pinned: dict[int, np.ndarray] = {}
        self._stack = threading.local()
        self.last: Run | None = None  # the launch that was done last

    def put(self, number: int, size: int, offset: int = 0) -> int:
        """The address of so many bytes of a device's memory."""
        with self._lock:
            self._release()
            return self.memories[number].allocate(size, offset)

    def drop(self, address: int) -> None:
        """Have memory freed once nothing can use it any more."""
        self.later(lambda: self._memory_at(address).free(address))

    def settled(self, number: int = 0) -> DeviceMemory:
        """A device's memory, once everything has been done."""
        self.finish()
        return self.memories[number]

    def _memory_at(self, address: int) -> DeviceMemory:
        found = next((memory for memory in self.memories if memory.owns(address)), None)
        if found is None:
            raise KernelError(f"no device has anything at {address:#x}")
        return found

    def _submit(self, stream: int, act: Callable[[], None], name: str) -> tuple[int]:
        """Give the current device's stream something, or the graph that it is captured in."""
        number = self._here()
        if number is None:
            return (NO_CONTEXT,)
        if (number, stream) not in self._queues:
            return (HANDLE,)
        graph = self._captures.get((number, stream))
        if graph is None:
            if name:
                self.launches.append(name)
                self.streams_used.append(stream)
            self._give(number, stream, act)
        else:
            graph.acts.append(act)
            graph.names.append(name)
        return (0,)

    def _here(self) -> int | None:
        """The number of the current context's device."""
        stack = getattr(self._stack, "contexts", [])
        return stack[-1].number if stack else None

    # ------------------------------------------------------------ the driver's functions

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, ERRORS[error].encode()

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, len(self.memories)

    def cuDeviceGet(self, number: int) -> tuple[int, Any]:
        return (0, number) if number < len(self.memories) else (101, None)

    def cuDevicePrimaryCtxRetain(self, handle: int) -> tuple[int, Context]:
        return 0, Context(handle, self)

    def cuDeviceGetAttribute(self, kind: Any, handle: int) -> tuple[int, int]:
        kinds = self.CUdevice_attribute
        known = {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: self.processors,
        }
        return 0, known[kind]

    def cuDeviceGetName(self, size: int, handle: int) -> tuple[int, bytes]:
        return 0, b"Interpreted\0".ljust(size, b"\0")

    def cuDeviceTotalMem(self, handle: int) -> tuple[int, int]:
        return 0, len(self.memories[handle].content[1])

    def cuPointerGetAttribute(self, kind: Any, address: int) -> tuple[int, int]:
        if kind != self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            return INVALID, 0
        found = next((memory.number for memory in self.memories if memory.owns(address)), None)
        return (INVALID, 0) if found is None else (0, found)

    def cuCtxPushCurrent(self, context: Context) -> tuple[int]:
        if context.driver() is not self:  # what an earlier test left goes with that test's driver
            return (INVALID,)
        self._stack.contexts = [*getattr(self._stack, "contexts", []), context]
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, Any]:
        context = self._stack.contexts.pop()
        return 0, context

    def cuCtxSynchronize(self) -> tuple[int]:
        if self._captures:
            return (CAPTURE,)
        self.reads += 1
        self.finish(self._here())
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        if self._captures:
            return (CAPTURE,)
        self.reads += stream != 0
        self.finish(self._here(), stream)
        return (0,)

    def cuStreamIsCapturing(self, stream: int) -> tuple[int, Any]:
        if (self._here(), stream) not in self._queues:
            return HANDLE, None
        kinds = self.CUstreamCaptureStatus
        active = (self._here(), stream) in self._captures
        return 0, kinds.CU_STREAM_CAPTURE_STATUS_ACTIVE if active else kinds.CU_STREAM_CAPTURE_STATUS_NONE

    def cuStreamWaitEvent(self, stream: int, event: Event, flags: int) -> tuple[int]:
        number = self._here()
        if number is None or (number, stream) not in self._queues:
            return (HANDLE,)
        if (number, stream) in self._captures:
            return (ISOLATION,)
        if event.mark is not None:
            self._give(number, stream, None, event.mark)
            self.waits.append((stream, event.mark.stream))
        return (0,)

    def cuEventCreate(self, flags: Any) -> tuple[int, Event]:
        return 0, Event()

    def cuEventRecord(self, event: Event, stream: int) -> tuple[int]:
        number = self._here()
        if number is None or (number, stream) not in self._queues:
            return (HANDLE,)
        if (number, stream) in self._captures:
            return (CAPTURE,)
        event.mark = self._give(number, stream, None)
        event.mark.stream = stream
        return (0,)

    def cuEventSynchronize(self, event: Event) -> tuple[int]:
        if self._captures:
            return (CAPTURE,)
        mark = event.mark
        if mark is not None:
            self._until(lambda: mark.done)
        return (0,)

    def cuEventDestroy(self, event: Event) -> tuple[int]:
        return (0,)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        number = self._here()
        if number is None or self._captures:
            return (CAPTURE if self._captures else NO_CONTEXT), 0
        return 0, self.put(number, size)

    def cuMemFree(self, address: int) -> tuple[int]:
        self.drop(address)
        if not self._captures:
            self._release()
        return (0,)

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[int]:
        def act() -> None:
            self._checked(address, size)[:] = value

        return (CAPTURE,) if self._captures else self._submit(0, act, "")

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        if self._captures:
            return CAPTURE, 0
        memory = np.full(size, 0xCD, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        return (0,) if self._pinned.pop(address, None) is not None else (INVALID,)

    def cuMemcpyHtoDAsync(self, address: int, source: int, size: int, stream: int) -> tuple[int]:
        def act() -> None:
            memory = self._pinned.get(source)
            if memory is None or len(memory) < size:
                raise KernelError(
                    f"{size} bytes at {source:#x} are copied, which are no pinned memory by now"
                )
            self._checked(address, size)[:] = memory[:size]

        return self._submit(stream, act, "copy")

    def cuMemcpyPeerAsync(self, *given: Any) -> tuple[int]:
        address, to, source, owner, size, stream = given
        places = self.memories[to.number].owns(address) and self.memories[owner.number].owns(source)
        if not places or to.number != self._here():
            return (INVALID,)

        def act() -> None:
            self._checked(address, size)[:] = self._checked(source, size)

        return self._submit(stream, act, "peer")

    def cuMemcpyHtoD(self, address: int, source: int, size: int) -> tuple[int]:
        if self._captures:
            return (CAPTURE,)
        self.finish(self._here(), 0)
        self._checked(address, size)[:] = PROCESS[1][source - 16 :][:size]
        return (0,)

    def cuMemcpyDtoH(self, target: int, address: int, size: int) -> tuple[int]:
        if self._captures:
            return (CAPTURE,)
        self.reads += 1
        self.finish(self._here(), 0)
        ctypes.memmove(target, self._checked(address, size).tobytes(), size)
        return (0,)

    def _checked(self, address: int, size: int) -> np.ndarray:
        """Bytes of a device that must be there."""
        memory = self._memory_at(address)
        if not memory.holds(address, size):
            raise KernelError(f"{size} bytes at {address:#x} are not within one allocation")
        return memory.view(address, size)

    def cuModuleLoadData(self, image: Any) -> tuple[int, Any]:
        return (0, image) if self._here() is not None else (NO_CONTEXT, None)

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[int, Any]:
        return 0, Function(program=module, number=self._here())

    def cuLaunchKernel(self, function: Any, *given: Any) -> tuple[int]:
        blocks, y, z, threads, own_y, own_z, shared, stream, places, extra = given
        if (y, z, own_y, own_z, shared, extra) != (1, 1, 1, 1, 0, 0):
            return (INVALID,)
        if not (1 <= blocks < 1 << 31 and 1 <= threads <= 1024):
            return (INVALID,)
        if self._here() != function.number:
            return (NO_CONTEXT,)
        program = function.program
        arguments = _values(places, [kind for kind, _ in program.params])
        memory, title = self.memories[function.number], program.title.split()[0]

        def act() -> None:
            run = Run(program, blocks, threads, arguments, memory, self._lanes, self.ordered)
            self.last = run.run()
            self.covered.setdefault(program, set()).update(run.visited)

        return self._submit(stream, act, title)


def _values(places: int, kinds: Sequence[str]) -> list[Any]:
    """A launch's arguments, which are there only as long as it is being asked for."""
    pointers = (ctypes.c_void_p * len(kinds)).from_address(places)
    found = []
    for pointer, kind in zip(pointers, kinds, strict=True):
        size = {"f64": ctypes.c_double, "u64": ctypes.c_int64, "b64": ctypes.c_int64, "s64": ctypes.c_int64}
        found.append(size[kind].from_address(pointer).value)
    return found


@contextlib.contextmanager
def installed(driver: Driver) -> Iterator[Driver]:
    """While this lasts, the package has a driver that is none, and everything else as it is."""
    from unittest import mock

    from numba_opt.cuda import arrays as cuda_arrays
    from numba_opt.cuda import driver as cuda_driver

    from .arrays import DeviceArray

    def compiled(kernel: Any, capability: tuple[int, int]) -> Any:
        program = library.program(kernel, capability)
        if len(program.params) != kernel.integers + kernel.reals:
            raise KernelError(
                f"{program.title} takes {len(program.params)} arguments, which its `Kernel` does not say"
            )
        return SimpleNamespace(name=program.name, cubin=program)

    caches = (cuda_arrays.kernels, cuda_driver.start, cuda_driver.device)
    for function in caches:
        function.cache_clear()
    _current.append(driver)
    try:
        with (
            mock.patch.object(cuda_driver, "driver", driver),
            mock.patch.object(cuda_driver, "compiled", compiled),
            mock.patch.object(cuda_driver, "array", lambda number, content: DeviceArray(content, number)),
        ):
            yield driver
            driver.finish()
    finally:
        _current.remove(driver)
        for function in caches:
            function.cache_clear()
