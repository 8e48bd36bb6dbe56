"""The package on a GPU, which `tests.ptx` plays: compiled kernels run, and give the CPU's results."""
