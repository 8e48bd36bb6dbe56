"""Errors that are this package's own."""

from __future__ import annotations

# What functions raise that are given something they were not made for. Not `Exception`: a signal handler's
# error, or a lack of memory, says nothing of what was given.
NONSENSE = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RecursionError,
    Warning,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, of another format, or of something else."""


class CudaUnavailableError(RuntimeError):
    """CUDA was asked for, or a CUDA array came, and the packages or the driver needed are not there."""
