"""Settings that every test shares."""

from importlib.util import find_spec

from hypothesis import settings

# The same examples on every machine and every run, and no time limit on a busy one.
settings.register_profile("numba_opt", derandomize=True, database=None, deadline=None, max_examples=15)
settings.load_profile("numba_opt")

collect_ignore = ["golden/make_golden.py"]  # needs MXNet
if find_spec("torch") is None:
    collect_ignore += ["cuda_torch.py"]
