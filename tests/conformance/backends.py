"""Where optimizers run: how arrays get there and back, and what their results are compared with.

A device's results are compared with the CPU's, to the bit but for the order in which squares are added. The
CPU's are compared with the readable step's, which computes by NumPy what kernels compute in one pass.
"""

from __future__ import annotations

import copy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from numba_opt import RowSparse

from .. import table
from ..ptx.playing import played

ACCESS = 16  # bytes of the widest access
# The readable step rounds in other places than a kernel does; as fractions of an array's largest number.
CLOSE = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-2, "bfloat16": 2e-2}


def mapped(function: Any, thing: Any) -> Any:
    """A nest of tuples and lists with something else in the place of each array."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(mapped(function, part) for part in thing)
    return None if thing is None else function(thing)


class Backend:
    """A place for arrays. It is the CPU, or like it but for the methods of one array."""

    on_device = False
    reference = {"use_fused_step": False}  # options of the optimizer to compare with
    dtypes = ("float32", "float64", "float16", "bfloat16")
    devices = 1

    def place(self, array: np.ndarray, number: int) -> Any:
        """A copy of an array, as far from a multiple of 16 bytes as that one."""
        shift = array.ctypes.data % ACCESS
        memory = np.empty(array.nbytes + 2 * ACCESS, np.uint8)
        begin = (shift - memory.ctypes.data) % ACCESS
        copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def fetch(self, array: Any) -> np.ndarray:
        """A copy of an array, on the host."""
        return array.copy()

    def write(self, array: Any, content: Any) -> None:
        """Put something else into an array."""
        array[...] = content

    def csr(self, grad: Any, put: Any) -> Any:
        """A CSR matrix, whose arrays are put somewhere."""
        matrix = copy.copy(grad)
        matrix.data, matrix.indices, matrix.indptr = put(grad.data), put(grad.indices), put(grad.indptr)
        return matrix

    # ------------------------------------------------------------ the same for all

    def put(self, thing: Any, number: int = 0) -> Any:
        """A nest of NumPy arrays and gradients, on a device."""

        def one(part: Any) -> Any:
            return (
                self.place(part, number) if isinstance(part, np.ndarray) else self.sparse(part, number=number)
            )

        return mapped(one, thing)

    def get(self, thing: Any) -> Any:
        """The arrays again, on the host."""
        return mapped(self.fetch, thing)

    def sparse(self, grad: Any, distinct: bool = False, strays: str = "", number: int = 0) -> Any:
        """A sparse gradient there.

        With `strays`, the meaning that it has for an optimizer, it has rows in addition that the parameter
        has not, which devices leave out. A CSR matrix has columns that it has not, and, unless "dense"
        updates every row, an empty one that begins before its entries.
        """
        put = lambda array: self.place(array, number)  # noqa: E731
        height, width = grad.shape[0], grad.shape[-1]
        strays = strays if self.on_device else ""
        if isinstance(grad, RowSparse):
            rows, values = grad.rows, grad.values
            if strays:
                rows = np.concatenate([rows, np.array([height + 3, -2], rows.dtype)])
                values = np.concatenate([values, np.ones_like(values, shape=(2, *values.shape[1:]))])
            return RowSparse(put(rows), put(values), grad.shape, distinct)
        if strays:
            data = np.concatenate([grad.data, np.ones_like(grad.data, shape=2)])
            indices = np.concatenate([grad.indices, np.array([width + 1, -1], grad.indices.dtype)])
            indptr = grad.indptr.copy()
            indptr[indptr == grad.nnz] += 2  # in the last row that has entries
            if strays != "dense" and indptr[1] == 0:
                indptr[0] = -1
            grad = _csr(grad.shape, data, indices, indptr)
        return self.csr(grad, put)

    def needs(self, *dtypes: Any) -> None:
        """Skip a test of a dtype that arrays cannot have here."""
        for dtype in dtypes:
            if dtype is not None and np.dtype(dtype).name not in self.dtypes:
                pytest.skip(f"{self} has no {np.dtype(dtype).name}")

    def compare(self, row: table.Row, found: Any, expected: Any, tolerance: float = 1e-6) -> None:
        """As alike as is promised; of rows whose squares are added, within a tolerance."""
        found, expected = table.leaves(found), table.leaves(expected)
        if not self.on_device:
            return close(found, expected)
        assert [array.dtype for array in found] == [array.dtype for array in expected]
        for half in (False, True):  # a copy in half precision may be the next number
            some, others = ([a for a in arrays if (a.itemsize == 2) == half] for arrays in (found, expected))
            table.assert_alike(row, some, others, max(tolerance, 1e-2 * half))
        return None

    def __str__(self) -> str:
        return type(self).__name__.lower()


def _csr(shape: tuple[int, ...], data: Any, indices: Any, indptr: Any) -> Any:
    """What the package asks of a CSR matrix; CuPy's have the same names."""
    return SimpleNamespace(
        format="csr", shape=shape, tocsr=None, data=data, indices=indices, indptr=indptr, nnz=data.size
    )


def close(found: Any, expected: Any) -> None:
    """Within the rounding of each array's dtype; what is no number is the same."""
    found, expected = table.leaves(found), table.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype.kind == "i":
            np.testing.assert_array_equal(a, b)
            continue
        tolerance = CLOSE[a.dtype.name]
        a, b = a.astype(np.float64), b.astype(np.float64)
        largest = np.abs(b[np.isfinite(b)]).max(initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


class Cpu(Backend):
    """NumPy arrays, and kernels for this processor."""


class Ptx(Backend):
    """CUDA kernels as they are compiled, run by `tests.ptx`."""

    on_device, reference, devices = True, {}, 2

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver

    def place(self, array: np.ndarray, number: int) -> Any:
        from ..ptx.arrays import DeviceArray

        return DeviceArray(array, number)

    def fetch(self, array: Any) -> np.ndarray:
        return array.array.copy()

    def write(self, array: Any, content: Any) -> None:
        array.array[...] = content

    def csr(self, grad: Any, put: Any) -> Any:
        return _csr(grad.shape, put(grad.data), put(grad.indices), put(grad.indptr))

    def captured(self, step: Any) -> Any:
        """What a step launches, to be launched again."""
        with self.driver.capture(0) as graph:
            step()
        return lambda: graph.launch(0)


class Gpu(Ptx):
    """A real GPU, with one library's arrays."""

    library: str

    def __init__(self) -> None:
        if find_spec(self.library) is None or (self.library == "numba" and find_spec("numba_cuda") is None):
            pytest.skip(f"needs the package {self.library.replace('numba', 'numba-cuda')}")
        self.module = import_module("numba.cuda" if self.library == "numba" else self.library)

    def __str__(self) -> str:
        return self.library

    def captured(self, step: Any) -> Any:
        pytest.skip(f"graphs of {self} are not tried")


class Numba(Gpu):
    library, dtypes = "numba", ("float32", "float64", "float16")

    def place(self, array: np.ndarray, number: int) -> Any:
        with self.module.gpus[number]:
            shift = array.ctypes.data % ACCESS // array.itemsize
            if not shift or not array.size:
                return self.module.to_device(np.ascontiguousarray(array))
            padded = np.concatenate([np.zeros(shift, array.dtype), array.ravel()])
            return self.module.to_device(padded)[shift:].reshape(*array.shape)

    def fetch(self, array: Any) -> np.ndarray:
        return array.copy_to_host()

    def write(self, array: Any, content: Any) -> None:
        array.copy_to_device(np.ascontiguousarray(np.broadcast_to(content, array.shape), array.dtype))


class Cupy(Gpu):
    library, dtypes = "cupy", ("float32", "float64", "float16")

    def place(self, array: np.ndarray, number: int) -> Any:
        with self.module.cuda.Device(number):
            shift = array.ctypes.data % ACCESS // array.itemsize
            memory = self.module.zeros(array.size + shift, array.dtype)
            memory[shift:] = self.module.asarray(array).ravel()
            return memory[shift:].reshape(array.shape)

    def fetch(self, array: Any) -> np.ndarray:
        return array.get()

    def write(self, array: Any, content: Any) -> None:
        array[...] = self.module.asarray(np.asarray(content, array.dtype))

    def csr(self, grad: Any, put: Any) -> Any:
        """CuPy's own matrix, of what that takes."""
        made = super().csr(grad, put)
        if grad.data.dtype.char not in "fd" or grad.indices.dtype != np.int32:
            return made
        matrix = import_module("cupyx.scipy.sparse").csr_matrix(grad.shape, dtype=grad.data.dtype)
        matrix.data, matrix.indices, matrix.indptr = made.data, made.indices, made.indptr
        return matrix


class Torch(Gpu):
    library = "torch"

    def place(self, array: np.ndarray, number: int) -> Any:
        half = array.dtype == ml_dtypes.bfloat16
        content = self.module.from_numpy(np.array(array, order="C").view(np.int16 if half else array.dtype))
        shift = array.ctypes.data % ACCESS // array.itemsize
        memory = self.module.zeros(array.size + shift, dtype=content.dtype, device=f"cuda:{number}")
        memory[shift:] = content.ravel().to(memory.device)
        memory = memory.view(self.module.bfloat16) if half else memory
        return memory[shift:].view(array.shape)

    def fetch(self, array: Any) -> np.ndarray:
        if array.dtype == self.module.bfloat16:
            return array.view(self.module.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return array.cpu().numpy()

    def write(self, array: Any, content: Any) -> None:
        content = np.broadcast_to(np.asarray(content), tuple(array.shape))
        if content.dtype == ml_dtypes.bfloat16:
            content = content.astype(np.float32)  # from which all of its numbers come back
        array.copy_(self.module.from_numpy(content.copy()))

    def captured(self, step: Any) -> Any:
        graph = self.module.cuda.CUDAGraph()
        with self.module.cuda.graph(graph):
            step()
        return graph.replay


LIBRARIES = {f"gpu-{cls.library}": cls for cls in (Numba, Cupy, Torch)}
GPUS = [pytest.param(name, marks=pytest.mark.gpu) for name in LIBRARIES]
DEVICES = ["ptx", *GPUS]
BACKENDS = ["cpu", *DEVICES]


def opened(request: pytest.FixtureRequest) -> Any:
    """The backend of a fixture's parameter, for as long as a test runs."""
    if request.param == "cpu":
        yield Cpu()
    elif request.param == "ptx":
        with played(request) as driver:
            yield Ptx(driver)
    else:
        if any(True for _ in request.node.iter_markers("device")):
            pytest.skip("a GPU is as it is")
        yield on_gpu(LIBRARIES[request.param])


def on_gpu(library: type[Gpu]) -> Gpu:
    """A real GPU; a test of one is skipped before this where there is none."""
    backend = library()
    backend.devices = how_many()
    return backend


@cache
def how_many() -> int | str:
    """How many GPUs there are, or why there are none."""
    if find_spec("numba_cuda") is None:
        return "needs the package numba-cuda: pip install 'numba_opt[cuda]'"
    from numba import cuda

    try:
        return len(cuda.gpus) or "the driver knows of no GPU"
    except Exception as error:  # whatever the bindings raise where there is no driver
        return f"there is no NVIDIA driver that starts ({type(error).__name__})"
