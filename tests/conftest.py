"""Settings that every test shares."""

import signal
from importlib.util import find_spec

from hypothesis import settings

# The same examples on every machine and every run, and no time limit on a busy one.
settings.register_profile("numba_opt", derandomize=True, database=None, deadline=None, max_examples=15)
settings.load_profile("numba_opt")

# Shells start programs in the background with SIGINT ignored, and these hand that on to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["golden/make_golden.py"]  # needs MXNet
if find_spec("torch") is None:
    collect_ignore += ["cuda_torch.py"]
