"""Errors that are this package's own."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, of another format, or of something else."""


class CudaUnavailableError(RuntimeError):
    """CUDA was asked for, or a CUDA array came, and the packages or the driver needed are not there."""
