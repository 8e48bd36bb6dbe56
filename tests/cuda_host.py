"""What a simulated GPU is made of: the driver and the elements of `numba_opt.kernels`, on the host's memory.

Numba's simulator runs kernels as Python functions, in which compiled intrinsics are of no use and device
memory is the host's. Once imported, this module is in the place of those two. It checks what a GPU would not
say: every access must lie within an array that has been made known, and 16-byte accesses must be aligned.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np

from numba_opt.kernels import rounding

ACCESS = 16
SIZES = {"f4": 4, "f8": 8, "f2": 2, "b2": 2, "i4": 4, "i8": 8}
INTEGERS = {"f4": ctypes.c_uint32, "f8": ctypes.c_uint64, "f2": ctypes.c_uint16, "b2": ctypes.c_uint16}


# In the place of the driver and of the elements, before anything imports them.
sys.modules["numba_opt.kernels.cuda_elements"] = sys.modules[__name__]
sys.modules["numba_opt.kernels.cuda_driver"] = sys.modules[__name__]


# ---------------------------------------------------------------- memory

known = {}  # where arrays begin, and how long they are
starts = []  # in order


def make_known(array):
    """Let kernels use an array's memory for as long as the array lives."""
    start = array.__array_interface__["data"][0]
    known[start] = array.nbytes
    starts[:] = sorted(known)
    weakref.finalize(array, known.pop, start, None)
    return array


def check(address, size):
    at = bisect.bisect_right(starts, address) - 1
    assert at >= 0, f"no array at {address:#x}"
    start = starts[at]
    assert address + size <= start + known.get(start, 0), f"{size} bytes at {address:#x} are nobody's"


def view(address, code, count):
    kind = {"b2": "u2"}.get(code, code)
    size = SIZES[code] * count
    check(address, size)
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind)


# ---------------------------------------------------------------- elements


def decode(values, code):
    if code == "b2":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32) if code == "f2" else values


def encode(values, code):
    if code == "b2":
        import ml_dtypes

        return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.asarray(values).astype(code)


def group(address, code, i, count):
    step = min(count, max(1, ACCESS // SIZES[code]))
    place = int(address) + int(i) * count * SIZES[code]
    assert place % (step * SIZES[code]) == 0, f"{place:#x} is not aligned"
    accesses.append((threading.current_thread(), code, place, count))
    return view(place, code, count)


accesses = []  # of the arrays: by whom, how stored, where and how many elements


def load(addresses, layout, i, count):
    codes = layout.replace("s", "").split()
    columns = [decode(group(a, code, i, count), code) for a, code in zip(addresses, codes, strict=True)]
    return tuple(zip(*columns, strict=True))


def store(addresses, layout, i, rows, key):
    chances = 0
    for c, (address, code) in enumerate(zip(addresses, layout.split(), strict=True)):
        values, lanes, plain = [row[c] for row in rows], len(rows), code.removeprefix("s")
        bits = encode(values, plain) if code == plain else by_chance(values, plain, i, key, chances)
        group(address, plain, i, lanes)[:] = bits
        chances += code != plain


def by_chance(values, code, i, key, state):
    elements = np.uint32(int(i) * len(values)) + np.arange(len(values), dtype=np.uint32)
    dtype = np.dtype(np.float16) if code == "f2" else np.dtype("bfloat16")
    return rounding.rounded(values, dtype, elements, key, state).view(np.uint16 if code == "b2" else dtype)


def numbers(address, code, count):
    found = decode(view(int(address), code, count), code)
    return tuple(found.tolist() if code[0] == "i" else found)


def put(address, code, values):
    view(int(address), code, len(values))[:] = encode(values, code)


def rounded(number, code):
    return decode(encode(np.array([number]), code), code)[0]


def moved(addresses, layout, elements):
    return tuple(
        int(a) + int(elements) * SIZES[code]
        for a, code in zip(addresses, layout.replace("s", "").split(), strict=True)
    )


def aligned(addresses):
    return all(address % ACCESS == 0 for address in addresses)


shared = {}  # what the threads of a block show each other


def from_other(number, mask):
    thread = threading.current_thread()
    own = thread.threadIdx.x
    shared[own] = number
    thread.syncthreads()
    found = shared[own ^ int(mask)]
    thread.syncthreads()
    return found


def agreed(flag):
    from numba_opt.kernels import cuda as loops

    thread = threading.current_thread()
    own = thread.threadIdx.x
    shared[own] = flag
    thread.syncthreads()
    found = all(shared[own // loops.WARP * loops.WARP + k] for k in range(loops.WARP))
    thread.syncthreads()
    return found


def meet():
    threading.current_thread().syncthreads()


# ---------------------------------------------------------------- the driver

launches = []  # names of kernels, in order


class DriverError(RuntimeError):
    pass


def device_of(address):
    check(address, 0)
    return devices.get(address, 0)


devices = {}  # of arrays that are not on device 0, by address
_made = {}


def start():
    from numba.cuda.simulator import kernel

    from numba_opt.kernels import cuda, cuda_loops, cuda_rows

    modules = cuda, cuda_loops, cuda_rows
    for module in modules:
        module.WARP = 4  # a simulated thread is one of the operating system's
    cuda.RUN = cuda_rows.RUN = 8
    plain = kernel.swapped_cuda_module

    @contextlib.contextmanager
    def swapped(function, stand_in):
        """What threads see as ``numba.cuda``; by itself the simulator swaps it in the kernel's file alone."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(plain(SimpleNamespace(__globals__=vars(module)), stand_in))
            yield

    kernel.swapped_cuda_module = swapped


def device(number):
    return _made.setdefault(number, Device(number))


class Device:
    capability = (9, 0)
    processors = 1
    in_capture = False

    def __init__(self, number):
        self.number = number

    def memory(self, size):
        return Memory(size)

    def pinned(self, size):
        return Pinned(size)

    def synchronize(self, stream):
        pass

    def capturing(self, stream):
        return self.in_capture

    def after(self, stream, other):
        pass

    def read(self, address, size):
        check(address, size)
        return ctypes.string_at(address, size)

    def assign(self, address, content):
        check(address, content.nbytes)
        ctypes.memmove(address, content.ctypes.data, content.nbytes)

    def current(self):
        return contextlib.nullcontext()


class HostArray:
    """A CUDA array, as far as anybody can tell."""

    def __init__(self, array, number=0, read_only=False):
        self.array, self.read_only = array, read_only
        self.dtype, self.shape = array.dtype, array.shape
        if array.base is None:
            make_known(array)
        devices[array.__array_interface__["data"][0]] = number

    @property
    def __cuda_array_interface__(self):
        told = self.array.__array_interface__
        return {
            "version": 3,
            "shape": self.array.shape,
            "typestr": told["typestr"],
            "data": (told["data"][0], self.read_only),
            "strides": told["strides"],
        }


def array(number, content):
    return HostArray(content.copy(), number)


class Memory:
    def __init__(self, size):
        self.size = size
        self.array = make_known(np.zeros(max(size, 8) // 8 + 1, np.int64))
        self.address = self.array.__array_interface__["data"][0]

    def fill(self, pinned, stream):
        launches.append("copy")
        self.array.view(np.uint8)[: pinned.size] = pinned.words.view(np.uint8)

    def read(self, size):
        return self.array.tobytes()[:size]


class Pinned:
    def __init__(self, size):
        self.size = size
        self.words = np.zeros(size // 8, np.int64)

    def settle(self):
        pass


class Launch:
    def __init__(self, device, kernel, blocks, threads, integers, reals=()):
        from numba import cuda

        self.kernel, self.jitted = kernel, cuda.jit(kernel.function)
        self.grid = min(max(blocks, 1), 3), min(threads, 8)
        assert len(integers) == kernel.integers
        assert len(reals) == kernel.reals
        self.integers, self.reals = [*map(int, integers)], reals

    def __call__(self, stream):
        launches.append(self.kernel.key[0])
        self.jitted[self.grid](*self.integers, *map(np.float64, self.reals))


# ---------------------------------------------------------------- for tests


def on_gpu(thing):
    """A nest of arrays on the simulated GPU, as copies."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(on_gpu(part) for part in thing)
    return None if thing is None else HostArray(whole(thing))


def whole(array):
    """A copy that is as far from a multiple of 16 bytes as an array."""
    offset = array.__array_interface__["data"][0] % ACCESS // array.itemsize
    memory = np.zeros(array.size + 32, array.dtype)
    first = -(memory.__array_interface__["data"][0] // array.itemsize) % (ACCESS // array.itemsize) + offset
    make_known(memory)
    found = memory[first : first + array.size].reshape(array.shape)
    found[...] = array
    return found


def on_cpu(thing):
    """The same in the host's memory."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(on_cpu(part) for part in thing)
    return None if thing is None else thing.array
