"""Which number in a row of a table is what: names for columns, for the host and for kernels.

A table has a row of uint64 for each tensor: perhaps the numbers of a sparse gradient, then the addresses of
the tensor's arrays, then three that all tables have, which are counted from the end.
"""

from __future__ import annotations

TENSOR_ID, WIDTH, ROW = -3, -2, -1  # for random bits; the length of its rows; its row of coefficients
COMMON = 3

GRAD, WEIGHT, STATES = 0, 1, 2  # arrays, where the gradient is one

# A sparse gradient on the CPU.
DATA = 0  # address of its numbers
TOUCHED = 1  # of the numbers of the rows that it touches
STARTS = 2  # of where each row's parts begin among the places; 0 where each row has one, at its own place
PLACES = 3  # of the places of parts: rows of a block, or columns
LAST_STEP = 4  # of how many of the recorded steps each row has taken
RECORDED = 5  # how many steps have been recorded
COUNT = 6  # how many rows are touched
PLACE_SIZE = 7  # bytes of a place
HEIGHT = 8  # how many rows there are
CPU_HEADER = 9

# A sparse gradient on a GPU, and the same numbers where all rows catch up.
CUDA_DATA = 0
CUDA_INDICES = 1  # address of row numbers, or of where the rows of a CSR matrix begin
CUDA_COLUMNS = 2  # of a CSR matrix's columns
CUDA_KEYS = 3  # of the keys that row numbers become where they may come more than once
CUDA_HEIGHT = 4
CUDA_ENTRIES = 5  # how many parts there are, or what a CSR matrix has room for
CUDA_LAST_STEP = 6
CUDA_DEFERRED = 7  # of the steps that rows have yet to take
CUDA_HEADER = 8
