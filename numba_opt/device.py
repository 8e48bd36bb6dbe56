"""The device layer: which of the CPU's and CUDA's parts serve an array.

Whatever has two implementations is asked for here: functions on arrays, the executor, sums, deferred steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .core.call import Arrays
from .core.executor import Executor
from .core.foreign import on_cuda as on_cuda
from .core.rules import Rule
from .core.sums import Sums
from .cpu import arrays as cpu_arrays
from .cpu import deferred as cpu_deferred
from .cpu import reader as cpu_reader
from .cpu.executor import CpuExecutor
from .cpu.sums import CpuSums
from .cuda import arrays as cuda_arrays
from .cuda import call as cuda_call
from .cuda import deferred as cuda_deferred
from .cuda.executor import CudaExecutor
from .cuda.sums import CudaSums


def arrays_for(array: Any) -> Any:
    """The module whose functions work on an array: `look_at`, `zeros_like`, `as_single` and others."""
    return cuda_arrays if on_cuda(array) else cpu_arrays


def look_at(array: Any, what: str) -> np.ndarray:
    """A NumPy array with an array's shape and dtype; if that is on a GPU, what it holds must not be read."""
    found: np.ndarray = arrays_for(array).look_at(array, what)
    return found


def to_host(array: Any, what: str) -> np.ndarray:
    """Return an array in the CPU's memory: itself, or a copy from a GPU, for which the host waits."""
    found: np.ndarray = arrays_for(array).to_host(array, what)
    return found


def writable(array: Any, what: str) -> Any:
    """Return something that takes ``[...] = array`` for an array, and has its shape and dtype."""
    return arrays_for(array).writable(array, what)


def executor_for(weights: Iterable[Any], rule: Rule, graphs: bool = True) -> Executor:
    """Make the executor of a rule's steps on some weights; `graphs`: steps on a GPU may be captured."""
    return CudaExecutor(rule, graphs) if any(map(on_cuda, weights)) else CpuExecutor(rule)


def sums_for(weights: Iterable[Any], names: Sequence[str]) -> Sums:
    """Make the sums of the gradients of some weights."""
    return (CudaSums if any(map(on_cuda, weights)) else CpuSums)(names)


def deferred_steps(found: Any, weight: Any, length: int, what: str) -> Any:
    """The steps that rows of a weight have yet to take, where it is, from those that were found for it."""
    made = cuda_deferred if on_cuda(weight) else cpu_deferred
    return made.deferred_steps(found, weight, length, what)


def check(arrays: Arrays) -> None:
    """Refuse arrays of which no step can be made; nothing is changed."""
    (cuda_call if any(map(on_cuda, arrays.weights)) else cpu_reader).read(arrays)
