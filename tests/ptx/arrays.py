"""CUDA arrays for tests: what they hold is in a device's memory, where only tests can look."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from . import driver

ACCESS = 16  # bytes of the widest access


class DeviceArray:
    """A CUDA array with the content of a NumPy array, as far from a multiple of 16 bytes as that one."""

    def __init__(self, content: np.ndarray, number: int = 0, read_only: bool = False) -> None:
        content = np.asarray(content)
        self._kind = content.dtype
        self.number, self.read_only = number, read_only
        self.dtype, self.shape, self.size, self.ndim = (
            content.dtype,
            content.shape,
            content.size,
            content.ndim,
        )
        self.strides = np.empty(content.shape, content.dtype).strides
        self._place(content)

    def _place(self, content: np.ndarray) -> None:
        self.address = driver.current().put(self.number, content.nbytes, content.ctypes.data % ACCESS)
        self._end = weakref.finalize(self, driver.current().drop, self.address)
        self._end.atexit = False
        self._view(driver.current().memories[self.number])[...] = content  # which nobody uses yet

    @classmethod
    def part(cls, whole: DeviceArray, index: Any) -> DeviceArray:
        """Some of an array, in the same memory."""
        found = cls.__new__(cls)
        host = np.empty(whole.shape, whole._kind)
        view = host[index]
        found.number, found.read_only, found.whole = whole.number, whole.read_only, whole
        found.dtype, found._kind = whole.dtype, whole._kind
        found.shape, found.strides, found.size, found.ndim = view.shape, view.strides, view.size, view.ndim
        found.address = whole.address + view.ctypes.data - host.ctypes.data
        return found

    def move(self) -> None:
        """Be somewhere else, with the same content; what was here is NaN, and stays there."""
        content = self.array.copy()
        self.array[...] = np.nan
        self._end.detach()
        self._place(content)

    @property
    def array(self) -> np.ndarray:
        """What it holds, once the device is done, to be looked at and changed."""
        return self._view(driver.current().settled(self.number))

    def _view(self, memory: Any) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, self._kind)
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        content = memory.view(self.address, last + self._kind.itemsize)
        return np.ndarray(self.shape, self._kind, content, 0, self.strides)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self._kind.str,
            "data": (self.address, self.read_only),
            "strides": self.strides,
        }


def on_gpu(thing: Any, number: int = 0) -> Any:
    """A nest of NumPy arrays as CUDA arrays."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(on_gpu(part, number) for part in thing)
    return None if thing is None else DeviceArray(thing, number)


def on_cpu(thing: Any) -> Any:
    """A nest of CUDA arrays as copies in the host's memory."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(on_cpu(part) for part in thing)
    return None if thing is None else thing.array.copy()
