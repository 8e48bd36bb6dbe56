"""NVIDIA GPUs: arrays there, steps on them, and the kernels. `on` names the stream to work on.

Nothing here imports numba-cuda before an array on a GPU comes.
"""

from __future__ import annotations

from ..errors import CudaUnavailableError
from .arrays import on

__all__ = ["CudaUnavailableError", "on"]
