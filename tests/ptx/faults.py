"""What can be wrong with a kernel, or with what this interpreter knows."""

from __future__ import annotations


class Fault(AssertionError):
    """A kernel, or who launched it, did what must not be done."""


class Race(Fault):
    """What a kernel leaves behind depends on which of two threads comes first."""


class UnknownForm(NotImplementedError):
    """An instruction that nobody has taught this interpreter."""
