"""A GPU for each test, played by `tests.ptx`, where numba-cuda can compile for one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS = "needs the package numba-cuda: pip install 'numba_opt[cuda]'"


@pytest.fixture(autouse=True)
def driver(request):
    """The driver that the package has during a test; ``@pytest.mark.device(...)`` gives its options."""
    if find_spec("numba_cuda") is None:
        pytest.skip(NEEDS)
    from ..ptx.driver import Driver, installed

    options = [mark.kwargs for mark in request.node.iter_markers("device")]
    with installed(
        Driver(**{name: value for mark in reversed(options) for name, value in mark.items()})
    ) as made:
        yield made
