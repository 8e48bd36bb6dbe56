"""What can be wrong with a kernel, or with what this interpreter knows."""

from __future__ import annotations


class KernelError(AssertionError):
    """A kernel, or who launched it, did what must not be done."""


class OrderError(KernelError):
    """What a kernel leaves behind depends on which of two threads comes first."""


class UnknownFormError(NotImplementedError):
    """An instruction that nobody has taught this interpreter."""
