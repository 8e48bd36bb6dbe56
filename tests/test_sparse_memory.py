"""Sparse gradients in memory: nothing outside an array is touched, and nothing that is bad reaches a kernel.

Arrays lie right beside pages that nobody may touch, in a process of their own that would not survive it.
"""

from __future__ import annotations

import os

import pytest

from numba_opt.compiler import cache

from .scripts import printed

GUARD = '''
import ctypes, mmap, sys, warnings
import numpy as np, scipy.sparse as ss
import numba_opt
from numba_opt import RowSparse, Trainer
from numba_opt.cpu import reader, touched
from numba_opt.cpu import merge, threads
from tests import table

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
sides = [True]


def guarded(array):
    """A copy between two pages that nobody may touch, right before one or right after the other."""
    size = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + PAGE + size):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    start = PAGE + (size - array.nbytes if sides[0] else 0)
    out = np.ndarray(array.shape, array.dtype, memory, start)
    out[...] = array
    return out


def tree(thing):
    if isinstance(thing, (tuple, list)):
        return type(thing)(map(tree, thing))
    return guarded(thing) if isinstance(thing, np.ndarray) else thing


def guard_matrix(matrix):
    for name in ("data", "indices", "indptr"):
        setattr(matrix, name, guarded(getattr(matrix, name)))
    return matrix


def patch():
    """What the package hands to its kernels is guarded too: touched rows, starts, places, tables, history,
    scratch."""
    touched_rows, run, scratch = reader.touched_rows, threads.run, threads.scratch

    def guarded_rows(*args):
        form, *arrays = touched_rows(*args)
        return touched.TouchedRows(form, *map(tree, arrays))

    def guarded_run(jobs, afterwards=()):
        for job in jobs:
            copies = tuple(map(guarded, job.args))
            run([job._replace(args=copies)])
            for array, copy in zip(job.args, copies):
                array[...] = copy
        run([], afterwards)

    reader.touched_rows, threads.run = guarded_rows, guarded_run
    threads.scratch = lambda *sizes: guarded(scratch(*sizes))
'''

FORMS_ON_GUARDED_PAGES = """
patch()
height = 9
rng = np.random.default_rng(0)

def gradients(width, dtype):
    rows = [0, 3, height - 1]
    values = rng.standard_normal((5, width)).astype(dtype)
    yield RowSparse(guarded(np.array(rows)), guarded(values[:3]), (height, width))
    yield RowSparse(guarded(np.array([8, 0, 8, 8, 0])), guarded(values), (height, width))
    yield RowSparse(guarded(np.array([8, 0, 8, 8, 0], "u1")), guarded(values), (height, width))
    yield RowSparse(guarded(np.zeros(0, int)), guarded(values[:0]), (height, width))
    dense = np.zeros((height, width), dtype)
    dense[rows] = values[:3]
    full = ss.csr_array(dense.astype("f4"))
    for index in ("i4", "i8"):
        for columns, times in ((full.indices, 1), (full.indices[::-1], 1), (full.indices, 2)):
            matrix = ss.csr_array((height, width), dtype="f4")
            matrix.data = np.tile(full.data.astype(dtype), times)
            matrix.indices = np.tile(columns, times).astype(index)
            matrix.indptr = (full.indptr * times).astype(index)
            yield guard_matrix(matrix)
    yield guard_matrix(ss.csr_array((height, width), dtype="f4"))
    yield guarded(dense)

def go(name, dtype, mode, width, **options):
    optimizer = table.build(table.row(name), sparse_update=mode, clip_gradient=0.5, **options)
    weight = guarded(rng.standard_normal((height, width)).astype(dtype))
    state = tree(optimizer.create_state_multi_precision(0, weight))
    for grad in gradients(width, dtype):
        optimizer.update_multi_precision([0], [weight], [grad], [state])
    optimizer.flush([0], [weight], [state])
    assert np.isfinite(weight.astype("f4")).all()

for sides[0] in (True, False):
    for width in range(1, 34):
        go("nag", "f4", "lazy", width)
        go("nag", "f4", "exact", width)
        if width % 3 == 1 or width < 3:
            go("ftml", "f4", "lazy", width)
            go("groupadagrad", "f4", "lazy", width)
            go("groupadagrad", "f4", "exact", width)
            go("nag", "f8", "lazy", width)
            go("nag", "f2", "lazy", width, multi_precision=True)
        trainer = Trainer([guarded(np.ones((height, width), "f4"))], "nag", clip_global_norm=1.0)
        for grad in gradients(width, "f4"):
            trainer.step([grad])
for sides[0] in (True, False):  # work that is shared: chunks end in the middle of rows
    height, width = 700, 77
    weight = guarded(np.ones((height, width), "f4"))
    rows = rng.integers(0, height, 1500)
    threads.SHARED, threads.count = 1, lambda: 3
    optimizer = numba_opt.NAG(sparse_update="exact")
    state = tree(optimizer.create_state(0, weight))
    for _ in range(3):
        grad = RowSparse(guarded(rows), guarded(np.ones((1500, width), "f4")), (height, width))
        optimizer.update([0], [weight], [grad], [state])
    optimizer.flush([0], [weight], [state])
print("survived")
"""

BAD_ON_GUARDED_PAGES = """
def csr(**changes):
    matrix = ss.csr_array(np.eye(4, 3, dtype="f4") + np.eye(4, 3, 1, dtype="f4"))
    for name, change in changes.items():
        array = getattr(matrix, name).copy()
        setattr(matrix, name, change(array))
    return guard_matrix(matrix)

def put(k, value):
    def change(array):
        array[k] = value
        return array
    return change

FAR = [-1, 3, 4, 2**31 - 1, -2**31]
def bad():
    for value in [-1, 4, 2**31, 2**62, -2**62]:
        for k in range(3):
            grad = RowSparse(guarded(np.arange(3)), guarded(np.ones((3, 3), "f4")), (4, 3))
            grad.rows[k] = value
            yield grad
    for value in FAR:
        for k in (0, 2, -1):
            yield csr(indices=put(k, value))
    for value in (-1, 1, 2**31 - 1, -2**31):
        yield csr(indptr=put(0, value))
    for value in (-1, 6, 2**31 - 1, -2**31):
        yield csr(indptr=put(2, value))
    for value in (-1, 4, 7, 2**31 - 1):
        yield csr(indptr=put(-1, value))
    yield csr(data=lambda a: a[:-1])
    yield csr(data=lambda a: a[:0])
    yield csr(indices=lambda a: a[:-1])
    yield csr(indptr=lambda a: a[:-1])
    yield csr(indptr=lambda a: np.r_[a, a[-1]])
    yield csr(indptr=lambda a: a[:0])
    grad = RowSparse([0, 1], np.ones((2, 3), "f4"), (4, 3))
    grad.values = guarded(np.ones((1, 3), "f4"))
    yield grad
    grad = RowSparse([0, 1], np.ones((2, 3), "f4"), (4, 3))
    grad.values = guarded(np.ones((2, 2), "f4"))
    yield grad
    grad = RowSparse([0, 1], np.ones((2, 3), "f4"), (4, 3))
    grad.shape = (40, 3)
    yield grad

refused = 0
for sides[0] in (True, False):
    for mode in ("lazy", "dense", "exact"):
        for name in ("nag", "groupadagrad"):
            for fused in (True, False):
                optimizer = table.build(table.row(name), sparse_update=mode, use_fused_step=fused)
                weight = guarded(np.ones((4, 3), "f4"))
                state = tree(optimizer.create_state(0, weight))
                for grad in bad():
                    try:
                        optimizer.update([0], [weight], [grad], [state])
                    except (TypeError, ValueError):
                        refused += 1
                    else:
                        raise SystemExit(f"accepted: {grad!r} {vars(grad)}")
                assert (weight == 1).all() and optimizer.num_update == 0
print("survived", refused)
"""

BOUNDS_CHECKED = """
try:
    merge.rows_of_csr(np.arange(0), 0, 1)
except IndexError:
    pass
else:
    raise SystemExit("kernels are not bounds-checked")
rng = np.random.default_rng(0)
for n in (0, 1, 7, 300):
    for height in (1, 3, 2048, 2049, 2**22 + 1):
        rows = rng.integers(0, height, n)
        touched, starts, order = merge.group(rows, height)
        assert (touched == np.unique(rows)).all() and (order == np.argsort(rows, kind="stable")).all()
        assert merge.look(rows, height) in (merge.GOOD, merge.UNSORTED)
for name in ("groupadagrad",):
    optimizer = table.build(table.row(name), sparse_update="exact")
    weight = rng.standard_normal((9, 5)).astype("f4")
    state = optimizer.create_state(0, weight)
    lazy = table.build(table.row(name))
    for grad in (
        RowSparse([0, 8], np.ones((2, 5), "f4"), (9, 5)),
        RowSparse([8, 0, 8], np.ones((3, 5), "f4"), (9, 5)),
        ss.csr_array(np.eye(9, 5, dtype="f4")),
        ss.csr_array(np.ones((9, 5), dtype="f4")),
        ss.csr_array((9, 5), dtype="f4"),
    ):
        lazy.update([0], [weight], [grad], [state[0]])
        if isinstance(grad, RowSparse):
            optimizer.update([0], [weight], [grad], [state])
    optimizer.flush([0], [weight], [state])
print("survived")
"""


def process(script, **env):
    assert "survived" in printed(GUARD + script, options=("-X", "faulthandler"), **env)


posix = pytest.mark.skipif(os.name != "posix", reason="no mprotect here")


@posix
@pytest.mark.parametrize("side", [True, False])
def test_the_guards_are_there(side):
    script = f"""
sides[0] = {side}
array = guarded(np.arange(5, dtype="u1"))
assert array.tolist() == [0, 1, 2, 3, 4]
print("survived", flush=True)
ctypes.c_char.from_address(array.ctypes.data + (5 if sides[0] else -1)).value
"""
    with pytest.raises(AssertionError, match="survived"):
        process(script)


@posix
def test_nothing_outside_the_arrays_is_touched():
    """All kernels on arrays that lie right beside forbidden pages, at every small width."""
    process(FORMS_ON_GUARDED_PAGES)


@posix
def test_bad_input_never_reaches_the_kernels():
    process(BAD_ON_GUARDED_PAGES)


@posix
def test_bounds_checked_kernels():
    """Numba's own check of every index into an array that is not a raw pointer."""
    folder = os.devnull if cache.folder().is_relative_to(os.devnull) else str(cache.folder() / "boundscheck")
    process(BOUNDS_CHECKED, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=folder)


@posix
@pytest.mark.parametrize("value", [-1, -1000, -(10**8), -(2**62), 10, 2**62])
def test_stamps_that_lead_nowhere(value):
    """They are in the caller's hands, as row numbers are, and come back from files."""
    script = f"""
optimizer = numba_opt.NAG(wd=0.1, sparse_update="exact")
weight = np.ones((6, 3))
state = optimizer.create_state(0, weight)
optimizer.update([0], [weight], [RowSparse([0], np.ones((1, 3)), (6, 3))], [state])
state[1][4] = {value}
before = weight.copy(), state[0].copy()
calls = [
    lambda: optimizer.update([0], [weight], [RowSparse([4], np.ones((1, 3)), (6, 3))], [state]),
    lambda: optimizer.update([0], [weight], [np.ones((6, 3))], [state]),
    lambda: optimizer.flush([0], [weight], [state]),
]
for call in calls:
    try:
        call()
    except ValueError as error:
        assert "last_step of parameter 0" in str(error), error
    else:
        raise SystemExit("accepted")
    assert (weight == before[0]).all() and (state[0] == before[1]).all() and state[1][4] == {value}
print("survived")
"""
    process(script)


@posix
@pytest.mark.parametrize("form", ["coo", "csc", "bsr"])
def test_bad_matrices_of_other_formats(form):
    """scipy converts them without a look at their indices."""
    script = f"""
warnings.simplefilter("ignore")
for value in (10**8, -10**8, 50):
    matrix = ss.csr_array(np.eye(50, 4)).asformat({form!r})
    if {form!r} == "coo":
        matrix.coords[0][3] = value
    else:
        matrix.indices[0] = value
    weight = np.ones((50, 4))
    try:
        numba_opt.NAG(momentum=0).update([0], [weight], [matrix], [None])
    except ValueError:
        assert (weight == 1).all()
    else:
        raise SystemExit(f"accepted {{value}}")
print("survived")
"""
    process(script)
