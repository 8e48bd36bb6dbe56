"""A GPU for each test, played by `tests.ptx`, where numba-cuda can compile for one."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

collect_ignore = [] if find_spec("torch") else ["test_torch_front.py"]

NEEDS = "needs the package numba-cuda: pip install 'numba_opt[cuda]'"


@pytest.fixture(autouse=True)
def driver(request):
    """The driver that the package has during a test; ``@pytest.mark.device(...)`` gives its options."""
    if find_spec("numba_cuda") is None:
        pytest.skip(NEEDS)
    from ..ptx import coverage
    from ..ptx.driver import Driver, installed

    options = {}
    for mark in request.node.iter_markers("device"):
        options = mark.kwargs | options  # the nearest one counts
    with installed(Driver(**options)) as made:
        yield made
    coverage.note(made.covered)


def pytest_sessionfinish():
    """Note which basic blocks were run; see `tests.ptx.coverage`."""
    if "tests.ptx.coverage" in sys.modules:
        sys.modules["tests.ptx.coverage"].save()
