"""CUDA kernels as machine code: compiled for a compute capability, with no device, and kept on disk.

Numba turns a kernel's function into PTX and NVIDIA's linker library turns that into machine code, so that a
driver older than the toolkit will take it. Neither needs a driver.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache as cache_results
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numba
import numba.cuda.dispatcher
from cuda.bindings import nvjitlink
from numba import cuda, types
from numba.cuda.core.compiler_lock import global_compiler_lock
from numba.cuda.cudadrv import nvvm

from ..compiler import cache
from ..core import rules
from ..core.rules import Rule
from .units import KernelSource

Capability = tuple[int, int]

_local = threading.local()


class Code:
    """A kernel's machine code and the name of what is in it."""

    def __init__(self, name: str, cubin: bytes) -> None:
        self.name = name
        self.cubin = cubin


@cache_results
def compiled(kernel: KernelSource, capability: Capability) -> Code:
    """A kernel's machine code, from the cache if it is there."""
    key = [part.key if isinstance(part, Rule) else part for part in kernel.key]
    path = cache.place(f"cuda-{kernel.key[0]}", (key, capability, _versions()))
    content = cache.read(path)
    if content is None:
        _local.compiled = how_many() + 1
        for part in kernel.key:
            if isinstance(part, Rule):
                try_alone(part.function, capability)
        text = ptx(kernel, capability)
        content = entry(text).encode() + b"\0" + link(text, capability)
        with suppress(OSError):  # a full disk, a read-only home: it will be compiled again
            cache.write(path, content)
    name, _, cubin = content.partition(b"\0")
    return Code(name.decode(), cubin)


def how_many() -> int:
    """Return how many kernels this thread had to compile."""
    return getattr(_local, "compiled", 0)


@cache_results
def try_alone(rule: Any, capability: Capability) -> None:
    """Compile a rule by itself: Numba takes minutes to find out that a kernel around a wrong one is wrong."""
    signature = (types.float64,) * rule.__code__.co_argcount
    try:
        with _settings(capability):
            cuda.compile(rule, signature, cc=capability, device=True, abi="numba")
    except Exception as error:
        rules.explain(error, rule)
        raise


def ptx(kernel: KernelSource, capability: Capability) -> str:
    """A kernel in PTX."""
    signature = types.void(*[types.int64] * kernel.integers, *[types.float64] * kernel.reals)
    with _settings(capability):
        text, _ = cuda.compile(kernel.function, signature, cc=capability, device=False, abi="numba")
    return text


def entry(text: str) -> str:
    """The name of the kernel in some PTX."""
    found = re.search(r"\.visible \.entry (\w+)\(", text)
    assert found is not None
    return found[1]


def link(text: str, capability: Capability) -> bytes:
    """PTX as machine code."""
    major, minor = capability
    handle = nvjitlink.create(1, [f"-arch=sm_{major}{minor}"])
    try:
        content = text.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, content, len(content), "kernel")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin)
    finally:
        nvjitlink.destroy(handle)


@contextmanager
def _settings(capability: Capability) -> Iterator[None]:
    """Let Numba compile for a capability, not for the device that is there, and leave a * b + c as it is.

    Contracted to one rounding it would be no faster, as memory is what kernels wait for, and not what the CPU
    computes. Numba has no option for it.
    """

    device = SimpleNamespace(compute_capability=capability)
    plain = partial(nvvm.compile_ir, fma=False)
    with (
        global_compiler_lock,
        mock.patch.object(numba.cuda.dispatcher, "get_current_device", return_value=device),
        mock.patch.object(nvvm, "compile_ir", plain),
    ):
        yield


@cache_results
def _versions() -> tuple[Any, ...]:
    return (version("numba-cuda"), numba.__version__, nvvm.NVVM().get_ir_version(), nvjitlink.version())
