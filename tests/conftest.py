"""Settings that every test shares."""

import sys
from importlib.util import find_spec

from hypothesis import settings

# The same examples on every machine and every run, and no time limit on a busy one.
settings.register_profile("numba_opt", derandomize=True, database=None, deadline=None, max_examples=15)
settings.load_profile("numba_opt")

collect_ignore = ["golden/make_golden.py"]  # needs MXNet
if find_spec("torch") is None:
    collect_ignore += ["cuda_torch.py"]


def pytest_sessionfinish():
    """Note which basic blocks of CUDA kernels were run; see `tests.ptx.coverage`."""
    if "tests.ptx.coverage" in sys.modules:
        sys.modules["tests.ptx.coverage"].save()
