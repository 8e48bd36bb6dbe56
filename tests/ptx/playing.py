"""A GPU for a test, where numba-cuda can compile for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

NEEDS = "needs the package numba-cuda: pip install 'numba_opt[cuda]'"


@contextlib.contextmanager
def played(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The driver that the package has during a test; ``@pytest.mark.device(...)`` gives its options."""
    if find_spec("numba_cuda") is None:
        pytest.skip(NEEDS)
    from . import coverage
    from .driver import Driver, installed

    options: dict[str, Any] = {}
    for mark in request.node.iter_markers("device"):
        options = mark.kwargs | options  # the nearest one counts
    with installed(Driver(**options)) as made:
        yield made
    coverage.note(made.covered)
