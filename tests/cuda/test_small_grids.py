"""Grids that are smaller than the work: kernels go round, as with more tensors than a GPU has threads."""

from __future__ import annotations

import numpy as np
import pytest

from numba_opt.core.columns import COMMON, CUDA_DEFERRED, CUDA_HEADER
from numba_opt.core.storage import dtype_of
from numba_opt.cuda import arrays as cuda_arrays
from numba_opt.cuda.buffer import HEAD, OUT, SKIP

from .. import table

TENSORS = 200  # 7 rounds of a warp: compilers unroll four


@pytest.fixture
def gpu(driver):
    return cuda_arrays.kernels().driver.device(0)


def launch(gpu, kernel, arguments, threads=32):
    """Launch a kernel in a grid of one block."""
    with gpu.current():
        cuda_arrays.kernels().driver.Launch(gpu, kernel, 1, threads, arguments)(0)


def placed(gpu, content):
    """Memory of the device with some content."""
    memory = gpu.memory(content.nbytes)
    gpu.assign(int(memory.address), np.ascontiguousarray(content))
    return memory, int(memory.address)


def found(gpu, address, like):
    return np.frombuffer(gpu.read(address, like.nbytes), like.dtype).reshape(like.shape)


@pytest.mark.parametrize(
    ("length", "compute"), [*((n, "f32") for n in (4, 5, 7, 8, 9, 10)), (5, "f64")], ids=str
)
def test_a_step_is_recorded_for_each_tensor(gpu, length, compute):
    """Where there is room; a step that is skipped is recorded for none."""
    loops, real, head = cuda_arrays.loops(), dtype_of(compute), cuda_arrays.loops().COUNT_BYTES
    rows = np.arange(2 * length, dtype="f8").reshape(2, length)
    room = rows.size + HEAD
    parts = np.zeros(OUT + 3 * room)
    used = parts[OUT + room : OUT + 2 * room] if compute == "f64" else parts[OUT + 2 * room :].view("f4")
    used[HEAD : HEAD + rows.size] = rows.ravel()
    buffer, at = placed(gpu, parts)
    held = [gpu.memory(head + 2 * length * real.itemsize) for _ in range(TENSORS)]
    for k, memory in enumerate(held):
        gpu.assign(int(memory.address), np.array([k % 3, 2], np.int64))  # every third one is full
    entries = np.zeros((TENSORS, CUDA_HEADER + 1 + COMMON), np.int64)
    entries[:, CUDA_DEFERRED] = [int(memory.address) for memory in held]
    entries[:, -1] = [length * (k % 2) for k in range(TENSORS)]
    kept, first = placed(gpu, entries)
    for skip in (1.0, 0.0):
        gpu.assign(at + 8 * SKIP, np.array([skip]))
        launch(gpu, loops.record(length, compute), (first, entries.shape[1], TENSORS, at, room))
    for k, memory in enumerate(held):
        content = memory.read(head + 2 * length * real.itemsize)
        (count, _), recorded = np.frombuffer(content, np.int64, 2), np.frombuffer(content, real, -1, head)
        assert count == min(k % 3 + 1, 2)
        if k % 3 < 2:
            assert recorded[k % 3 * length :][:length].tolist() == rows[k % 2].tolist()
    launch(gpu, loops.forget(), (first, entries.shape[1], TENSORS))
    assert all(np.frombuffer(memory.read(8), np.int64)[0] == 0 for memory in held)
    del buffer, kept


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("count", [1, 70, 300])
@pytest.mark.parametrize("limit", [2.0, np.inf])
def test_a_norm_is_settled(gpu, threads, length, count, limit):
    loops, n = cuda_arrays.loops(), 90
    given = np.arange(1.0, 1.0 + n * length)
    room = HEAD + given.size
    parts = np.zeros(OUT + 3 * room)
    parts[OUT : OUT + HEAD] = limit, 0.5, 1.0, 0.0
    parts[OUT + HEAD : OUT + room] = given
    buffer, at = placed(gpu, parts)
    kept, partial = placed(gpu, np.full(count, 16.0))
    launch(gpu, loops.clip_norm(), (at, room, length, partial, count), threads)
    skip, norm, skipped, _ = found(gpu, at, parts[:OUT])
    assert (skip, norm, skipped) == (0, np.sqrt(16.0 * count) * 0.5, 0)
    expected = given.copy()
    expected[::length] = 0.5 * min(1.0, limit / norm)
    used = found(gpu, at + 8 * (OUT + room), parts[:room])[HEAD:]
    np.testing.assert_allclose(used, expected, rtol=1e-15)
    single = found(gpu, at + 8 * (OUT + 2 * room), np.zeros(room, "f4"))[HEAD:]
    np.testing.assert_allclose(single, expected, rtol=1e-7)
    del buffer, kept


@pytest.mark.parametrize(
    ("total", "form"),
    [
        *(("f64", "rows i64 f64"), ("f32", "rows i64 f64"), ("f32", "rows i64 f32")),
        *(("f32", "rows i32 f32"), ("f32", "rows i64 f16"), ("f16", "rows i64 f16")),
    ],
)
def test_a_block_is_collected(gpu, total, form):
    loops, shape, at = cuda_arrays.loops(), table.form(form), 3
    values = np.round(np.random.default_rng(0).standard_normal((TENSORS, 3)) * 8).astype(dtype_of(shape.grad))
    rows = np.arange(TENSORS, dtype=f"i{int(shape.indices[1:]) // 8}")
    kept = [placed(gpu, values), placed(gpu, rows)]
    numbers = gpu.memory(8 * (TENSORS + at))
    block = gpu.memory((TENSORS + at) * 3 * dtype_of(total).itemsize)
    launch(gpu, loops.vacate(), (int(numbers.address), TENSORS + at))
    assert (found(gpu, int(numbers.address), np.zeros(TENSORS + at, np.int64)) < 0).all()
    into = int(numbers.address) + 8 * at, int(block.address) + 3 * at * dtype_of(total).itemsize
    given = kept[0][1], kept[1][1], 0, TENSORS, TENSORS, 3, *into, 0
    launch(gpu, loops.collect(total, shape), given)
    assert found(gpu, into[0], np.zeros(TENSORS, np.int64)).tolist() == rows.tolist()
    content = found(gpu, into[1], np.zeros((TENSORS, 3), dtype_of(total)))
    table.assert_bits([content], [values.astype(dtype_of(total))])
