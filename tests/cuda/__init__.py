"""What the package does on a GPU, which is one that `tests.ptx` plays: compiled kernels, the CPU's results."""
