"""A GPU for each test, played by `tests.ptx`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ..ptx.playing import played

collect_ignore = [] if find_spec("torch") else ["test_torch_front.py"]


@pytest.fixture(autouse=True)
def driver(request):
    """The driver that the package has during a test."""
    with played(request) as made:
        yield made
