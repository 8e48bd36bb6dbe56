"""What pytest is not to look into for examples: these modules need numba-cuda, and have none."""

collect_ignore_glob = ["numba_opt/kernels/cuda*.py"]
