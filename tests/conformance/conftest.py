"""The backends that a test runs on: each of them, only devices, or a GPU that is there."""

from __future__ import annotations

import pytest

from . import backends


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    """The CPU, compiled PTX, and a real GPU with each library's arrays."""
    yield from backends.opened(request)


@pytest.fixture(params=backends.DEVICES)
def device(request):
    """A backend that is no CPU."""
    yield from backends.opened(request)


@pytest.fixture(params=backends.GPUS)
def gpu(request):
    """A real GPU, for each library."""
    yield from backends.opened(request)


def pytest_runtest_setup(item):
    """Where there is no GPU, its tests are skipped, all of them here, so that this is told once."""
    if item.get_closest_marker("gpu") and isinstance(reason := backends.how_many(), str):
        pytest.skip(reason)
