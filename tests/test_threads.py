"""Threads of the program, forked processes, and how many threads of ours may work."""

from __future__ import annotations

import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from numba_opt.cpu import threads

from . import table
from .scripts import TRAIN, printed, result

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")

PRELUDE = """
import os, threading
import numba, numpy as np, numba_opt
from numba.np.ufunc import parallel
from numba_opt.cpu import threads
from tests import table

def helpers():
    return sum(thread.name == "numba_opt" for thread in threading.enumerate())

def run(name="ftml"):
    row = table.row(name)
    call = table.make(row, [1_000_000, (300, 500)])
    optimizer = table.build(row)
    for _ in range(3):
        optimizer.fused_step(*call)
    return table.content(table.outputs(call))
"""


def process(script, **env):
    """A fresh process; the kernels come from the cache of the tests."""
    return printed(PRELUDE + script, **env)


def train(row, steps=10):
    call = table.make(row, [400_000, (30, 20), 7])
    optimizer = table.build(row)
    for _ in range(steps):
        optimizer.update(*call)
    return table.outputs(call)


def test_threads_with_optimizers_of_their_own():
    """Eight at once, in work that is shared between threads; the same bits as one after the other."""
    rows = (table.TABLE * 8)[:8]
    expected = list(map(train, rows))
    barrier = threading.Barrier(8)

    def start(row):
        barrier.wait()
        return train(row)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(start, rows))
    table.assert_bits(found, expected)


def test_threads_that_compile_at_once():
    """Nothing is cached, all need the same kernels."""
    script = """
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(8)

def start(name):
    barrier.wait()
    return run(name)

names = ["nag", "ftml"] * 4
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(start, names))
assert found == [run(name) for name in names]
"""
    process(script, NUMBA_CACHE_DIR=os.devnull)


def test_helpers_are_used_and_come_back(monkeypatch):
    monkeypatch.setattr(threads, "count", lambda: 4)
    call = table.make(table.row("nag"), [1_000_000])
    optimizer = table.build(table.row("nag"))
    for _ in range(50):
        optimizer.update(*call)
    assert sum(thread.name == "numba_opt" for thread in threading.enumerate()) >= 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "numba_opt")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities, as Linux has them")
def test_helpers_keep_off_the_callers_processor():
    """The system would wake them there, and the two would take turns; also once affinities have changed."""
    script = """
def places():
    return [os.sched_getaffinity(t.native_id) for t in threading.enumerate() if t.name == "numba_opt"]

allowed = os.sched_getaffinity(0)
run()
assert all(place < allowed and len(place) == len(allowed) - 1 for place in places()), places()
one = {min(allowed)}
os.sched_setaffinity(0, one)  # nowhere else to go
expected = run()
os.sched_setaffinity(0, allowed)
assert run() == expected
os.sched_setaffinity(0, one)
left = [*allowed - one][:1]
os.sched_setaffinity(0, {*one, *left})
run()
assert all(len(place) == 1 for place in places()), places()
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    process(script, NUMBA_NUM_THREADS="3")


def test_set_num_threads_is_respected():
    script = """
numba.set_num_threads(1)
expected = run()
assert (threads.count(), helpers()) == (1, 0)
numba.set_num_threads(3)
assert run() == expected
assert (threads.count(), helpers()) == (3, 2)
"""
    process(script, NUMBA_NUM_THREADS="4")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_environment_is_respected(number):
    """And Numba's own threading layer, which ends forked children, is never started."""
    script = f"""
run()
assert threads.count() == {number}
assert helpers() == {number} - 1
assert not parallel._is_initialized
"""
    process(script, NUMBA_NUM_THREADS=str(number))


def test_a_process_ends_while_helpers_sleep():
    process("run()\nassert helpers() == 3", NUMBA_NUM_THREADS="4")


# ---------------------------------------------------------------- beside other threads


LAYERS = (
    TRAIN
    + """
import numba

@numba.njit(parallel=True)
def others(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += np.sqrt(x[i])
    return total

names = ["nag", "ftml", "adamax", "rmsprop", "groupadagrad", "rmsprop-centered"]
expected = [train(name) for name in names]
x = np.full(300_000, 4.0)
assert others(x) == 600_000
stop, sums = threading.Event(), []

def run_others():
    while not stop.is_set():
        sums.append(others(x))

barrier = threading.Barrier(6)

def start(name):
    barrier.wait()
    return [train(name) for _ in range(4)]

user = threading.Thread(target=run_others)
user.start()
with ThreadPoolExecutor(6) as pool:
    found = list(pool.map(start, names))
stop.set()
user.join()
assert found == [[one] * 4 for one in expected]
assert sums and set(sums) == {600_000.0}
print(json.dumps(numba.threading_layer()))
"""
)


def _has_layer(name):
    if name == "workqueue":
        return True
    try:
        importlib.import_module(f"numba.np.ufunc.{name}pool")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_six_threads_beside_somebody_elses_parallel_kernel(layer):
    if not _has_layer(layer):
        pytest.skip(f"numba has no {layer} here")
    assert result(LAYERS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=4) == layer


def test_the_number_of_threads_is_respected_and_changes_no_bit():
    script = (
        TRAIN
        + """
found = train("ftml")
helpers = sum(thread.name == "numba_opt" for thread in threading.enumerate())
print(json.dumps([found, helpers]))
"""
    )
    found = [result(script, NUMBA_NUM_THREADS=count) for count in (1, 2, 5)]
    assert found == [[found[0][0], helpers] for helpers in (0, 1, 4)]


# ---------------------------------------------------------------- forks


@forks
def test_forked_children():
    """Helpers do not live on in a child: it starts its own, and nobody waits for the dead."""
    script = """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
expected = run()
assert helpers() >= 1
for _ in range(3):
    child = os.fork()
    if child == 0:
        assert helpers() == 0
        good = run() == expected and helpers() >= 1
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if run() == expected else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if good and status == 0 else 1)
    assert run() == expected
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""
    process(script, NUMBA_NUM_THREADS="4")


@forks
def test_fork_while_other_threads_are_at_work():
    script = """
import warnings
warnings.simplefilter("ignore")
expected, stop = run(), threading.Event()

def work():
    while not stop.is_set():
        run()

workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if run() == expected else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
for worker in workers:
    worker.join()
"""
    process(script, NUMBA_NUM_THREADS="4")


@forks
@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_fork_after_use(layer):
    """Also where the program has entered Numba's own threads before; in the child only we run."""
    if not _has_layer(layer):
        pytest.skip(f"numba has no {layer} here")
    script = (
        TRAIN
        + """
import numba

@numba.njit(parallel=True)
def others(x):
    for i in numba.prange(x.size):
        x[i] += 1

others(np.zeros(100_000))
expected = {name: train(name) for name in ("nag", "ftml")}
statuses = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(250)  # rather than to wait for ever
        os._exit(0 if {name: train(name) for name in expected} == expected else 1)
    statuses.append(os.waitpid(child, 0)[1])
    assert train("nag") == expected["nag"]
print(json.dumps([numba.threading_layer(), statuses]))
"""
    )
    found = result(script, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=4)
    assert found == [layer, [0] * 4]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    script = tmp_path / "program.py"
    script.write_text(
        TRAIN
        + """
import multiprocessing

def send(queue, name):
    queue.put((name, train(name)))

def main():
    expected = {name: train(name) for name in ("nag", "ftml")}
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    started = [context.Process(target=send, args=(queue, name)) for name in expected]
    for one in started:
        one.start()
    found = dict(queue.get(timeout=250) for _ in started)
    for one in started:
        one.join(250)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        pooled = dict(zip(expected, pool.map(train, expected)))
    codes = [one.exitcode for one in started]
    print(json.dumps([codes, found == expected, pooled == expected, train("nag") == expected["nag"]]))

if __name__ == "__main__":
    main()
"""
    )
    assert result(script, method, NUMBA_NUM_THREADS=4) == [[0, 0], True, True, True]
