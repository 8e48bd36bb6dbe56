"""CUDA arrays: their address, dtype, shape and device, and the stream that their library is at.

Numba's CUDA compiler and the driver are looked for when the first CUDA array arrives, not before. Arrays are
looked at through NumPy arrays that stand for them, with the same address, dtype and shape, which nobody
reads: so the checks of `numba_opt.cpu.arrays` are the same, and so are its errors.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..core.foreign import lack_of_memory, loaded, on_cuda, type_name
from ..core.storage import EXPECTED, OF_NAME, bfloat16, name_of
from ..errors import CudaUnavailableError

_stream: ContextVar[int | None] = ContextVar("stream", default=None)

BFLOAT16 = "<V2"  # what stands for a dtype that array interfaces do not know


@cache
def loops() -> Any:
    """The kernels' module, imported when it is first needed, as Numba's CUDA compiler is."""
    try:
        with warnings.catch_warnings():  # NumPy 2.5 warns of what numba-cuda 0.30 does when it is imported
            warnings.simplefilter("ignore", DeprecationWarning)
            from numba import cuda as target

        if getattr(target, "implementation", "") != "NVIDIA":
            raise ModuleNotFoundError("No module named 'numba_cuda'")
        from . import kernels as cuda
    except (ImportError, AttributeError) as error:
        raise CudaUnavailableError(
            f"CUDA needs the package numba-cuda, which is not there or not whole ({error}): "
            "pip install 'numba_opt[cuda]', or 'numba_opt[cuda12]' for drivers before 580"
        ) from error
    return cuda


@cache
def kernels() -> SimpleNamespace:
    """The modules that a step needs, with a driver that has been started."""
    found = loops()
    try:
        from . import driver as cuda_driver

        cuda_driver.start()
    except Exception as error:  # the bindings raise of their own if the library is not there
        raise CudaUnavailableError(
            f"CUDA needs NVIDIA's driver, which could not be started ({error}): "
            "install one from version 580 on for 'numba_opt[cuda]', from 525 on for 'numba_opt[cuda12]'"
        ) from error
    return SimpleNamespace(loops=found, driver=cuda_driver)


def devices() -> list[Any]:
    """The GPUs that are there."""
    driver = kernels().driver
    return [driver.device(number) for number in range(driver.count())]


# ---------------------------------------------------------------- streams


@contextmanager
def on(stream: Any) -> Iterator[None]:
    """Let steps within this context go to a stream.

    Parameters
    ----------
    stream : int or object
        The stream's address, or PyTorch's, CuPy's or Numba's object for it.

    Raises
    ------
    TypeError
        `stream` is none of these.

    Examples
    --------
    >>> import numba_opt.cuda
    >>> with numba_opt.cuda.on(0):  # the default stream
    ...     pass
    """
    token = _stream.set(_address_of(stream))
    try:
        yield
    finally:
        _stream.reset(token)


def _address_of(stream: Any) -> int:
    for name in ("cuda_stream", "ptr", "handle"):
        stream = getattr(stream, name, stream)
    stream = getattr(stream, "value", stream)
    try:
        return int(stream or 0)
    except (TypeError, ValueError):
        raise TypeError(f"stream must be a CUDA stream or its address, got {stream!r}") from None


def current_stream(weight: Any, number: int) -> int:
    """The stream that the caller's library is at, for a device."""
    given = _stream.get()
    if given is not None:
        return given
    torch, cupy = library_of(weight)
    if torch is not None:
        return int(torch.cuda.current_stream(number).cuda_stream)
    if cupy is not None:
        with cupy.cuda.Device(number):
            return int(cupy.cuda.get_current_stream().ptr)
    return 0


# ---------------------------------------------------------------- arrays


class View(NamedTuple):
    """A CUDA array's memory, device and stream."""

    shadow: np.ndarray  # stands for it; its memory is the device's and must not be read
    device: int
    stream: int | None  # where it is being made, if that is said


class _Interface:
    """An object whose array interface is what it is told."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def library_of(value: Any) -> tuple[Any, Any]:
    """torch if an array is a tensor of it, and CuPy if it is one of its arrays; None otherwise."""
    torch, cupy = loaded("torch", "Tensor"), loaded("cupy", "ndarray")
    return (
        sys.modules["torch"] if torch is not None and isinstance(value, torch) else None,
        sys.modules["cupy"] if cupy is not None and isinstance(value, cupy) else None,
    )


def look(value: Any, what: str) -> View:
    """Return the view of a CUDA array.

    Raises
    ------
    TypeError
        It is on the host, or not an array, or of a dtype that is not known.
    ValueError
        It is not contiguous or aligned.
    """
    if not on_cuda(value):
        name = type_name(value)
        raise TypeError(f"{what} is {name}, which is not on a GPU; expected a CUDA array, as the weight")
    if library_of(value)[0] is not None:
        return _look_at_tensor(value, what)
    if not hasattr(value, "__cuda_array_interface__"):
        value = _from_dlpack(value, what)
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{what} has a mask; expected a CUDA array without one")
    name = getattr(getattr(value, "dtype", None), "name", "")
    typestr = BFLOAT16 if name == "bfloat16" else interface["typestr"]
    address, read_only = interface["data"]
    shadow = _shadow(
        address or 0, tuple(interface["shape"]), typestr, interface.get("strides"), read_only, what
    )
    number = kernels().driver.device_of(address) if shadow.size else 0
    return View(shadow, number, interface.get("stream"))


def _look_at_tensor(tensor: Any, what: str) -> View:
    dtype = name_of(tensor.dtype)
    if dtype not in (*OF_NAME, "int32", "int64"):
        raise TypeError(f"{what} is {tensor.dtype}; expected {EXPECTED}")
    typestr = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).str
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{what} is a tensor of layout {tensor.layout}; expected torch.strided")
    if tensor.is_neg():
        raise TypeError(f"{what} is a negative view; expected a tensor that holds its own numbers")
    if lack := lack_of_memory(tensor):
        raise ValueError(f"{what} {lack}")
    size = tensor.element_size()
    strides = tuple(size * s for s in tensor.stride())
    shadow = _shadow(tensor.data_ptr(), tuple(tensor.shape), typestr, strides, False, what)
    return View(shadow, tensor.device.index or 0, None)


def _from_dlpack(value: Any, what: str) -> Any:
    """Return an object with ``__cuda_array_interface__`` over the memory of an array that only has DLPack."""
    for name in ("torch", "cupy"):
        if convert := loaded(name, "from_dlpack"):
            return convert(value)
    raise TypeError(f"{what} is a CUDA array with DLPack only; that needs PyTorch or CuPy to be imported")


def _shadow(
    address: int, shape: tuple[int, ...], typestr: str, strides: Any, read_only: bool, what: str
) -> np.ndarray:
    """A NumPy array that stands for a CUDA array."""
    is_bfloat, kind = typestr == BFLOAT16, bfloat16()
    if is_bfloat and kind is None:
        raise TypeError(f"{what} is bfloat16, which needs the package ml_dtypes to be imported")
    array = stand_in(address, shape, "<u2" if is_bfloat else typestr, strides, read_only)
    if is_bfloat:
        array = array.view(kind)
    if not array.flags.c_contiguous:
        raise ValueError(f"{what} has strides {array.strides}; expected a contiguous CUDA array")
    if not array.flags.aligned:
        raise ValueError(f"{what} begins at address {address:#x}; expected a multiple of {array.itemsize}")
    return array


def stand_in(
    address: int, shape: tuple[int, ...], typestr: str, strides: Any, read_only: bool = False
) -> np.ndarray:
    """A NumPy array that lies where and as a CUDA array does, to be asked for that and nothing else."""
    if 0 in shape:
        array = np.empty(shape, typestr)
        array.flags.writeable = not read_only
        return array
    interface = {
        "version": 3,
        "shape": shape,
        "typestr": typestr,
        "data": (address, bool(read_only)),
        "strides": None if strides is None else tuple(strides),
    }
    return np.asarray(_Interface(interface))


def look_at(value: Any, what: str) -> np.ndarray:
    """A NumPy array with a CUDA array's shape and dtype; what it holds must not be looked at."""
    return look(value, what).shadow


def zeros_like(weight: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Zeros of a weight's library, and on its device."""
    view = look(weight, "weight")
    torch, cupy = library_of(weight)
    if torch is not None:
        kind = weight.dtype if dtype == view.shadow.dtype else getattr(torch, dtype.name)
        return torch.zeros(shape, dtype=kind, device=weight.device)
    if cupy is not None:
        with cupy.cuda.Device(view.device):
            return cupy.zeros(shape, dtype)
    return kernels().driver.array(view.device, np.zeros(shape, dtype))


def as_single(weight: Any, what: str) -> Any:
    """A float32 copy of a weight, of its library, and on its device."""
    view = look(weight, what)
    torch, cupy = library_of(weight)
    if torch is not None:
        return weight.detach().to(torch.float32, copy=True)
    if cupy is not None:
        with cupy.cuda.Device(view.device):
            return weight.astype(np.float32)
    return kernels().driver.array(view.device, to_host(weight, what).astype(np.float32))


def to_host(array: Any, what: str) -> np.ndarray:
    """A copy of a CUDA array in the host's memory; waits for everything on its device."""
    view = look(array, what)
    shadow = view.shadow
    content = kernels().driver.device(view.device).read(place(shadow), shadow.nbytes)
    return np.frombuffer(bytearray(content), shadow.dtype).reshape(shadow.shape)


def writable(array: Any, what: str) -> Any:
    """Return something that takes ``[...] = array`` for a CUDA array, and has its shape and dtype."""
    return Writable(look(array, what))


class Writable:
    """A CUDA array to which content of the host's memory can be assigned."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.shape, self.dtype = view.shadow.shape, view.shadow.dtype

    def __setitem__(self, everything: Any, content: np.ndarray) -> None:
        shadow = self._view.shadow
        content = np.ascontiguousarray(content, shadow.dtype)
        kernels().driver.device(self._view.device).assign(place(shadow), content)


def place(shadow: np.ndarray) -> int:
    """The address that a stand-in has."""
    return int(shadow.ctypes.data)


def address_of(value: Any) -> int:
    """Return the address of an array, found quickly."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    pointer = getattr(getattr(value, "data", None), "ptr", None)
    return value.__cuda_array_interface__["data"][0] if pointer is None else pointer


def kind_of(value: Any) -> Any:
    """Return all that matters of a PyTorch tensor but its address, quickly; None for any other array."""
    torch, _ = library_of(value)
    if torch is None or value.layout is not torch.strided or value.is_neg():
        return None
    there = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
    return value.dtype, value.device, value.shape, value.stride(), there
