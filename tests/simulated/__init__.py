"""Tests that need Numba's CUDA simulator: `tests/test_cuda_simulator.py` runs them with it."""
