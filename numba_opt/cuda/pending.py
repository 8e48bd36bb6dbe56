"""Rows on a GPU that have yet to take steps: kernels that catch up, record a step, and forget all."""

from __future__ import annotations

import functools

import numpy as np
from numba import cuda
from numba.cuda.extending import register_jitable

from ..core.columns import CUDA_DEFERRED, CUDA_HEADER, CUDA_LAST_STEP, WIDTH
from ..core.rules import Rule
from ..core.storage import Layout, TouchedForm, size_of
from .buffer import SKIP
from .elements import numbers, put, syncwarp
from .loops import coefficient_reader_at, real_of, row_address, row_step
from .rows import source_for
from .units import WARP, KernelSource, first_row, number_at, tensor_at

COUNT_BYTES = 16  # of deferred steps, before their rows of coefficients: how many there are, and may be


@functools.cache
def catch_up(rule: Rule, layout: Layout, form: TouchedForm) -> KernelSource:
    """The kernel in which rows take the steps that they have yet to take.

    Arguments as in `rows`, before which it is launched: the rows that it will update take the deferred steps
    of their tensor, as a dense optimizer would have taken them with a zero gradient. Deferred steps begin
    with a count, in COUNT_BYTES, and have the coefficients of so many. A row's last step says how many of
    them it has taken; afterwards, how many there will be once this step is recorded. The form "none" means
    all rows, which take no step of their own; their last step is 0 afterwards, for a record that begins
    anew.
    """
    n_array, real = len(layout.codes), real_of(layout.compute)
    all_rows = form.kind == "none"
    source_of, _ = source_for(form, real)
    read_at = coefficient_reader_at(rule, layout)
    size = size_of(layout.compute) * rule.row_length(layout.stochastic)
    zero = register_jitable(lambda source, j: ((real(0),),))
    step = row_step(rule, layout, form.grad, zero)

    def kernel(table, columns, offsets, starts, tensors, buffer, room):
        if not all_rows and number_at(buffer, SKIP) != 0:
            return
        units = number_at(starts, tensors)
        unit, stride = first_row()
        while unit < units:
            t = tensor_at(starts, tensors, unit)
            entry = table + 8 * columns * t
            width = number_at(entry, columns + WIDTH)
            head = numbers(entry, "i64", CUDA_HEADER)
            row, source = source_of(head, unit - number_at(starts, t), width)
            if row >= 0:
                last_step, deferred = head[CUDA_LAST_STEP] + 8 * row, head[CUDA_DEFERRED]
                recorded = number_at(deferred, 0)
                q = max(number_at(last_step, 0), 0)
                while q < recorded:
                    x = read_at(deferred + COUNT_BYTES + size * q, entry, columns)
                    step(source, numbers(entry + 8 * CUDA_HEADER, "i64", n_array), row, width, x)
                    syncwarp()  # a row's state is written by one thread and read by all
                    q += 1
                syncwarp()  # all have read the last step
                if cuda.threadIdx.x % WARP == 0:
                    put(last_step, "i64", (0 if all_rows else recorded + 1,))
            unit += stride

    return KernelSource(kernel, ("catch_up", rule, layout.text, form.text), 7)


@functools.cache
def record(length: int, compute: str) -> KernelSource:
    """The kernel that appends a step's row of coefficients to the deferred steps of each tensor of a table.

    ``kernel(table, columns, tensors, buffer, room)``, the table being that of `rows`. A step that is skipped
    is not recorded, nor is one for which there is no room; whoever counts the steps sees to that.
    """
    address = row_address(compute)
    size = size_of(compute) * length

    def kernel(table, columns, tensors, buffer, room):
        if number_at(buffer, SKIP) != 0:
            return
        t = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while t < tensors:
            entry = table + 8 * columns * t
            deferred = number_at(entry, CUDA_DEFERRED)
            count = number_at(deferred, 0)
            if count < number_at(deferred, 1):
                row = numbers(address(buffer, room, entry, columns), compute, length)
                put(deferred + COUNT_BYTES + size * count, compute, row)
                put(deferred, "i64", (count + 1,))
            t += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return KernelSource(kernel, ("record", length, compute), 5)


@functools.cache
def forget() -> KernelSource:
    """The kernel that lets the deferred steps of a table's tensors begin anew.

    ``kernel(table, columns, tensors)``, the table being that of `rows`.
    """

    def kernel(table, columns, tensors):
        t = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while t < tensors:
            put(number_at(table + 8 * columns * t, CUDA_DEFERRED), "i64", (0,))
            t += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return KernelSource(kernel, ("forget",), 3)
