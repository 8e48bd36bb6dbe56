"""The memory that kernels work in: what they need is had before the first write, and only what they need."""

from __future__ import annotations

import sys
import weakref

import numpy as np
import pytest
import scipy.sparse as ss

import numba_opt
from numba_opt import RowSparse
from numba_opt.core.call import Arrays
from numba_opt.core.step_rows import StepRows
from numba_opt.cpu import measures, threads
from numba_opt.cpu.executor import CpuExecutor
from numba_opt.cpu.reader import read_dense
from numba_opt.cpu.touched import TouchedRows

from . import table
from .scripts import printed

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

PRELUDE = """
import resource, sys, threading, time
import numpy as np, numba_opt
from numba_opt import RowSparse, Trainer
from numba_opt.cpu import threads
from tests import table
"""

# Each of these died by a signal, or took minutes, where scratch was made within the loop.
WIDE = {
    "a row longer than many chunks": """
w = np.ones((1, 300_000), "f4")
Trainer([w], "groupadagrad").step([w * 2])
assert np.allclose(w, 0.99)
""",
    "several such rows": """
w = np.ones((16, 1_000_000), "f4")
Trainer([w], "groupadagrad").step([w * 2])
assert np.allclose(w, 0.99)
""",
    "sparse, reduced": """
w = np.ones((1, 9_000_000), "f4")
Trainer([w], "groupadagrad").step([RowSparse([0], w * 2, w.shape)])
assert np.allclose(w, 0.99)
""",
    "sparse, summed": """
w = np.ones((1, 9_000_000), "f4")
Trainer([w], numba_opt.NAG(momentum=0)).step([RowSparse([0, 0], np.ones((2, 9_000_000), "f4"), w.shape)])
assert np.allclose(w, 0.8)
""",
    "sparse, reduced and summed": """
w = np.ones((1, 3_000_000), "f4")
Trainer([w], "groupadagrad").step([RowSparse([0, 0], np.ones((2, 3_000_000), "f4"), w.shape)])
assert np.allclose(w, 0.99)
""",
    "sparse, catching up": """
w = np.ones((2, 3_000_000), "f4")
trainer = Trainer([w], numba_opt.GroupAdaGrad(sparse_update="exact"))
for row in (0, 1, 0):
    trainer.step([RowSparse([row], np.ones((1, 3_000_000), "f4"), w.shape)])
trainer.flush()
assert (w[0] == w[0, 0]).all() and (w[1] == w[1, 0]).all() and (w < 1).all()
""",
    "few rows of many columns": """
w = np.ones((2, 20_000_000), "f4")
trainer = Trainer([w], "nag")
gradient = RowSparse([0, 1], w * 2, w.shape)
started = time.perf_counter()
trainer.step([gradient])
assert time.perf_counter() - started < 20, time.perf_counter() - started  # 0.1 s, and once minutes
assert np.allclose(w, 1 - 0.1 * 2 * 1.9)
""",
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_rows(case):
    printed(PRELUDE + WIDE[case], timeout=100)


ONE_ARENA = """
threads.count = lambda: 2
threads.SHARED = 1
rng = np.random.default_rng(0)

def steps(gradient, shape, expected):
    for n in range(100):
        weight = np.ones(shape, "f4")
        Trainer([weight], "groupadagrad").step([gradient])
        assert (weight == expected).all(), n

g = rng.standard_normal((40, 20000)).astype("f4")
w = np.ones((40, 20000), "f4")
threads.count = lambda: 1
Trainer([w], "groupadagrad").step([g])
threads.count = lambda: 2
steps(g, g.shape, w)

rows = rng.integers(0, 300, 900)
g = RowSparse(rows, rng.standard_normal((900, 1000)).astype("f4"), (300, 1000))
w = np.ones(g.shape, "f4")
threads.count = lambda: 1
Trainer([w], "groupadagrad").step([g])
threads.count = lambda: 2
steps(g, g.shape, w)
"""


@LINUX
def test_threads_have_scratch_of_their_own():
    """Where all allocate from one heap, what one lets go of another one gets at once."""
    printed(PRELUDE + ONE_ARENA, MALLOC_ARENA_MAX="1")


def sizes_of_scratch(monkeypatch, gradient, weight, name, **options):
    """How much each step of an optimizer asks for, as (threads, bytes), two threads working."""
    made = []
    scratch = threads.scratch

    def noted(*sizes):
        made.append(sizes)
        return scratch(*sizes)

    monkeypatch.setattr(threads, "scratch", noted)
    monkeypatch.setattr(threads, "SHARED", 1)
    monkeypatch.setattr(threads, "count", lambda: 2)
    trainer = numba_opt.Trainer([weight], numba_opt.create(name, **options))
    trainer.step([gradient])
    return made


def block(weight, rows, dtype=None):
    return RowSparse(rows, np.ones((len(rows), weight.shape[1]), dtype or weight.dtype), weight.shape)


@pytest.mark.parametrize(
    ("name", "rows", "dtype", "needed"),
    [
        ("nag", None, "f4", 0),
        ("nag", [0, 3, 7], "f4", 0),
        ("nag", [0, 3, 0], "f4", 1),
        ("nag", [0, 3, 7], "f8", 1),  # converted
        ("groupadagrad", None, "f4", 1),
        ("groupadagrad", [0, 3, 7], "f4", 1),
        ("groupadagrad", [0, 3, 0], "f4", 2),
    ],
)
def test_no_more_scratch_than_a_form_needs(name, rows, dtype, needed, monkeypatch):
    weight = np.ones((8, 20_000), "f4")
    gradient = weight + 1 if rows is None else block(weight, rows, dtype)
    made = sizes_of_scratch(monkeypatch, gradient, weight, name)
    row = -(-20_000 * 4 // 64) * 64
    assert made == [(2, needed * row)] * (needed > 0)


def test_no_scratch_for_threads_that_would_find_nothing_to_do(monkeypatch):
    """A row is one thread's, however long it is."""
    weight = np.ones((1, 300_000), "f4")
    assert sizes_of_scratch(monkeypatch, weight + 1, weight, "groupadagrad") == [(1, 1_200_000)]


def test_scratch_is_let_go_of_after_the_step(monkeypatch):
    """Even if no helper has come to look at the job."""
    monkeypatch.setattr(threads, "_jobs", type(threads._jobs)())  # nobody listens here
    made = []
    scratch = threads.scratch

    def noted(*sizes):
        array = scratch(*sizes)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(threads, "scratch", noted)
    monkeypatch.setattr(threads, "SHARED", 1)
    monkeypatch.setattr(threads, "count", lambda: 2)
    weight = np.ones((8, 20_000), "f4")
    numba_opt.Trainer([weight], "groupadagrad").step([weight + 1])
    assert threads._jobs.qsize() == 1
    assert [array() for array in made] == [None]


def test_no_more_threads_join_than_have_a_place():
    """Those beyond do nothing; what the others do is whole."""
    array = np.arange(300_000, dtype="f4")
    address = np.array([[array.ctypes.data, 0, 0]], np.uint64)
    total, progress = np.zeros((19, 1)), np.array([3, 0, 0])
    args = (address, np.array([0, array.size]), total, threads.scratch(3, 64), progress)
    kernel = measures.squares("f32").entry_point
    kernel(*args)
    assert (total == 0).all()
    assert progress.tolist() == [4, 0, 0]
    progress[0] = 2
    kernel(*args)
    assert total.sum() == pytest.approx(np.square(array, dtype="f8").sum())


NO_MEMORY = """
def room(extra):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))

def all_of(trainer):
    arrays = list(trainer.params.values()), list(trainer.states.values())
    return trainer.optimizer.num_update, table.content(*arrays)

shape = (2, 20_000_000)
gradients = {
    "groupadagrad": RowSparse([0, 1], np.ones(shape, "f4"), shape),
    "nag": RowSparse([1, 1], np.ones(shape, "f4"), shape),
}
for name, gradient in gradients.items():
    for mode in ("lazy", "exact"):
        weights = [np.ones((3, 4), "f4"), np.ones(shape, "f4")]
        trainer = Trainer(weights, numba_opt.create(name, sparse_update=mode))
        small = np.ones((3, 4), "f4")
        trainer.step([small, RowSparse([0], np.ones((1, shape[1]), "f4"), shape)])  # all is compiled
        before = all_of(trainer)
        room(50 << 20)  # scratch takes 80 MB and more
        try:
            trainer.step([small, gradient])
        except MemoryError:
            pass
        else:
            raise SystemExit(f"{name} {mode} needed no memory")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert all_of(trainer) == before, (name, mode)
        trainer.step([small, gradient])
        assert trainer.optimizer.num_update == before[0] + 1
        assert (weights[1][1] != 1).all() and np.isfinite(weights[1]).all()
"""


@LINUX
def test_without_memory_for_scratch_nothing_has_changed():
    printed(PRELUDE + NO_MEMORY, MALLOC_ARENA_MAX="1", NUMBA_NUM_THREADS="1")


@pytest.mark.parametrize("name", ["nag", "groupadagrad"])
def test_a_shape_that_changes_in_place(name):
    """As many elements in rows of another length, in a step that keeps two tables."""
    weights = [np.ones((4, 6), "f4"), np.ones((5, 2), "f8")]
    grads = [np.arange(24, dtype="f4").reshape(4, 6), np.ones((5, 2))]
    row = table.row(name)
    expected = [weight.copy() for weight in weights]
    optimizers = [table.build(row), table.build(row)]

    def step(optimizer, weights, grads):
        states = [optimizer.create_state(t, weight) for t, weight in enumerate(weights)]
        optimizer.update([0, 1], weights, grads, states)

    for shape in ((4, 6), (6, 4), (2, 12), (24, 1)):
        for array in (weights[0], grads[0], expected[0]):
            array.resize(shape, refcheck=False)
        step(optimizers[0], weights, grads)
        fresh = [weight.copy() for weight in expected]
        step(optimizers[1], fresh, [grad.copy() for grad in grads])
        optimizers[1]._executors.clear()
        expected = fresh
        table.assert_bits(weights, expected)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("what", ["rows", "sorted rows", "indices", "indptr"])
def test_row_numbers_and_columns_that_change_after_they_were_checked(what, mode, monkeypatch):
    """As another thread may change them: rows count as they were, and columns that lead outside do not."""
    height, width = 64, 30
    room = np.ones((3 * height, width), "f4")
    weight = room[height : 2 * height]
    if what.endswith("rows"):
        rows = np.arange(10, 40) if what == "sorted rows" else np.r_[np.arange(40)[::-1], np.arange(9)]
        gradient = RowSparse(rows, np.ones((len(rows), width), "f4"), weight.shape)
        array = gradient.rows
    else:
        gradient = ss.csr_array(np.eye(height, width, dtype="f4"))
        array = getattr(gradient, what)
    good, bad = array.copy(), np.linspace(-(2**31), 2**31 - 1, len(array)).astype(array.dtype)
    expected = weight.copy()
    numba_opt.Trainer([expected], numba_opt.NAG(sparse_update=mode)).step([gradient])
    made = CpuExecutor.jobs

    def then_changed(*args):
        jobs = made(*args)
        array[:] = bad
        return jobs

    monkeypatch.setattr(CpuExecutor, "jobs", then_changed)
    trainer = numba_opt.Trainer([weight], numba_opt.NAG(sparse_update=mode))
    trainer.step([gradient])
    if what == "indices":
        inside = (bad >= 0) & (bad < width)
        expected = np.where(np.isin(np.arange(height), np.flatnonzero(inside))[:, None], expected, 1)
    table.assert_bits([weight], [expected.astype("f4")])
    assert (room[:height] == 1).all()
    assert (room[2 * height :] == 1).all()
    array[:] = good
    monkeypatch.undo()
    trainer.step([gradient])
    trainer.flush()
    assert np.isfinite(weight).all()


def test_kernels_pass_over_what_leads_outside():
    """Rows and columns beyond the parameter, as a change after all has been looked at would make them."""
    for name in ("nag-plain", "groupadagrad"):
        optimizer = table.build(table.row(name))
        room = np.ones((12, 5), "f4")
        weight = room[4:8]
        state = optimizer.create_state(0, weight)
        parts = {
            "block f32": (np.ones((3, 5), "f4"), np.array([-3, 2, 5]), None, None),
            "csr f32": (
                np.ones(4, "f4"),
                np.array([2, 3, 7]),
                np.array([0, 3, 3, 4]),
                np.array([-1, 3, 5, 0], "i4"),
            ),
        }
        for form, arrays in parts.items():
            before = room.copy()
            arrays_of_call = Arrays(
                columns=[[None], [weight], [state]] if state is not None else [[None], [weight]],
                rule=optimizer.checked_rule(),
                states=optimizer.state_names,
                label=str,
                touched={0: None},
            )
            call = read_dense(arrays_of_call)._replace(touched={0: TouchedRows(table.form(form), *arrays)})
            executor = CpuExecutor(call.rule)
            executor.hold([call])
            threads.run(executor.jobs(StepRows.alike(optimizer.coefficient_row(1.0, 0.1, 0.0, 1), 1)))
            changed = np.argwhere(room != before)
            assert len(changed)
            assert (changed[:, 0] == 6).all()
            if form == "csr f32":
                assert changed[:, 1].tolist() == [3]


def test_weights_without_elements_and_without_dimensions():
    """In one table with others: no row has a length there, or there is no row."""
    for row in table.TABLE:
        shapes = [(0, 5), (3, 5), (4, 0), (0, 0), (2, 5)] if row.cls.per_row else [(0, 5), (), (4, 0), (3, 5)]
        optimizer = table.build(row)
        weights = [np.ones(shape, "f4") for shape in shapes]
        states = [optimizer.create_state(t, weight) for t, weight in enumerate(weights)]
        optimizer.update(list(range(len(shapes))), weights, [np.full_like(w, 2) for w in weights], states)
        full = [weight for weight in weights if weight.size]
        assert all((weight == full[0].ravel()[0]).all() and (weight != 1).all() for weight in full)
