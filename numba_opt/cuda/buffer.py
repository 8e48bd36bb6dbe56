"""The layout of a device's buffer of coefficients: for kernels, and for the host without them."""

from __future__ import annotations

# A buffer of coefficients begins with what kernels say, in OUT words. Then come three parts of the same
# length: float64 as given, float64 as used, float32 as used. Each one has HEAD numbers and the rows.
OUT, HEAD = 4, 4
# float64: whether to change nothing; the norm; how many steps were skipped; whether a row led outside
SKIP, NORM, SKIPPED, OUT_OF_RANGE_ROWS = range(4)
# The limit of the norm; what gradients are multiplied by; whether to skip non-finite ones.
LIMIT, RESCALE, GUARD = range(3)
ROOM = 16  # numbers that one launch of `set_coefficients` writes
