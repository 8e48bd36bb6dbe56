"""Whatever cuts a step short, from a signal's handler to a profiler, it has been made or it has not.

And what comes out of it is what was raised, not what Numba makes of it.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading

import numpy as np
import pytest
import scipy.sparse as ss

import numba_opt
from numba_opt import RowSparse
from numba_opt.cpu import threads

from . import table
from .scripts import printed

HEIGHT, WIDTH = 50, 8
POSIX = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")


class TimeLimitError(Exception):
    pass


@pytest.fixture(autouse=True)
def no_collector():
    """What is raised while Python's collector calls a finalizer reaches nobody, and counts for nothing."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def sparse_gradients():
    """Gradients whose rows are unsorted, or come twice (few of all there are, or many), and CSR matrices."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, HEIGHT, 30)
    matrix = ss.random_array((HEIGHT, WIDTH), density=0.1, format="csr", dtype="f4", rng=rng)
    long = ss.csr_array(matrix)
    long.indices, long.indptr = long.indices.astype("i8"), long.indptr.astype("i8")
    return {
        "unsorted": RowSparse(rng.permutation(HEIGHT)[:9], rng.random((9, WIDTH), "f4"), (HEIGHT, WIDTH)),
        "few of many": RowSparse(rows[:4], rng.random((4, WIDTH), "f4"), (HEIGHT, WIDTH)),
        "duplicates": RowSparse(rows, rng.random((30, WIDTH), "f4"), (HEIGHT, WIDTH)),
        "csr": matrix,
        "csr of int64": long,
        "full csr": ss.csr_array(np.ones((HEIGHT, WIDTH), "f4")),
    }


class Training:
    """A trainer of a few weights, and all states that it may be in, by how many steps have been made."""

    def __init__(self, gradients, most, **options):
        self.gradients, self.options = gradients, options
        trainer = self.fresh()
        self.states = [self.state(trainer)]
        for _ in range(most):
            trainer.step(gradients)
            self.states.append(self.state(trainer))

    def fresh(self):
        weights = [np.ones((HEIGHT, WIDTH), "f4") for _ in self.gradients]
        return numba_opt.Trainer(weights, numba_opt.NAG(), **self.options)

    def state(self, trainer):
        return table.content(list(trainer.params.values()), list(trainer.states.values()))

    def check(self, trainer):
        """What has been counted is what has been made; returns how many steps these are."""
        count = trainer.optimizer.num_update
        assert self.state(trainer) == self.states[count]
        counts = set(trainer.optimizer._index_update_count.values()) or {0}
        assert counts == {count}
        return count


@POSIX
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some come in GC callbacks
@pytest.mark.parametrize("form", sparse_gradients())
def test_a_handler_that_raises(form, monkeypatch):
    """Nothing comes out but what it raises, at whatever point of a step it comes."""
    training = Training([sparse_gradients()[form], np.ones((HEIGHT, WIDTH), "f4")], 500)
    trainer = training.fresh()
    trainer.step(training.gradients)

    def handler(number, frame):
        raise TimeLimitError

    came = 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for n in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + n % 50 * 1e-5)
                trainer.step(training.gradients)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeLimitError:
                came += 1
                training.check(trainer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    made = training.check(trainer)
    trainer.step(training.gradients)
    assert training.check(trainer) == made + 1


def raising_at(n, kinds):
    """A function for `sys.setprofile` or `sys.settrace` that raises at the n-th event."""
    left = iter(range(n))

    def function(frame, event, arg):
        if event in kinds and next(left, None) is None:
            raise TimeLimitError
        return function

    return function


@pytest.mark.parametrize("install", [sys.setprofile, sys.settrace], ids=["profile", "trace"])
def test_a_profile_or_trace_function_that_raises(install, monkeypatch):
    """At each event of a step that has a norm, kernels for sparse gradients and one for dense ones."""
    monkeypatch.setattr(threads, "SHARED", 1)
    monkeypatch.setattr(threads, "count", lambda: 2)
    gradients = [sparse_gradients()["duplicates"], np.ones((HEIGHT, WIDTH), "f4")]
    gradients += [sparse_gradients()["csr"]]
    training = Training(gradients, 2, clip_global_norm=1.0)
    kinds = {"call", "return", "line", "c_call", "c_return", "c_exception"}
    found = set()
    before = sys.gettrace() if install is sys.settrace else sys.getprofile()
    for n in range(100_000):
        trainer, ended = training.fresh(), False
        try:
            try:
                install(raising_at(n, kinds))
                trainer.step(gradients)
                ended = True
            finally:
                install(before)
        except TimeLimitError:
            pass  # perhaps only as it was taken away
        found.add(training.check(trainer))
        if ended:
            break
        if n % 50 == 0:
            made = training.check(trainer)
            trainer.step(gradients)
            assert training.check(trainer) == made + 1
    else:
        raise AssertionError("a step never ended")
    assert n > 100
    assert found == {0, 1}


@pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="needs sys.monitoring, of Python 3.12")
def test_a_monitoring_tool_that_raises(monkeypatch):
    monkeypatch.setattr(threads, "SHARED", 1)
    monkeypatch.setattr(threads, "count", lambda: 2)
    gradients = [sparse_gradients()["duplicates"], np.ones((HEIGHT, WIDTH), "f4")]
    training = Training(gradients, 2, clip_global_norm=1.0)
    monitoring = sys.monitoring
    tool, events, here = 4, monitoring.events, sys._getframe().f_code
    kinds = (events.PY_START, events.PY_RETURN, events.CALL, events.C_RETURN)
    monitoring.use_tool_id(tool, "numba_opt's tests")
    try:
        for n in range(100_000):
            trainer, left = training.fresh(), iter(range(n))

            def callback(code, *args, left=left):
                if code is not here and next(left, None) is None:
                    monitoring.set_events(tool, 0)
                    raise TimeLimitError

            for kind in kinds:
                monitoring.register_callback(tool, kind, callback)
            try:
                monitoring.set_events(tool, events.PY_START | events.PY_RETURN | events.CALL)
                trainer.step(gradients)
                ended = True
            except TimeLimitError:
                ended = False
            finally:
                monitoring.set_events(tool, 0)
            training.check(trainer)
            if ended:
                break
        else:
            raise AssertionError("a step never ended")
        assert n > 100
    finally:
        monitoring.free_tool_id(tool)


def test_a_stack_that_is_nearly_full():
    """`RecursionError` comes before the first kernel or not at all."""
    training = Training([np.ones((HEIGHT, WIDTH), "f4"), sparse_gradients()["duplicates"]], 2)
    limit, found = sys.getrecursionlimit(), set()

    def depth():
        frame, n = sys._getframe(), 0
        while frame is not None:
            frame, n = frame.f_back, n + 1
        return n

    start = depth()
    for room in range(5, 80):
        trainer = training.fresh()
        try:
            sys.setrecursionlimit(start + room)
            trainer.step(training.gradients)
        except RecursionError:
            pass
        finally:
            sys.setrecursionlimit(limit)
        found.add(training.check(trainer))
    assert found == {0, 1}


# ---------------------------------------------------------------- threads that cannot be had, or die

PRELUDE = """
import ctypes, sys, threading, time
import numpy as np, numba_opt
from numba_opt.cpu import threads

def step():
    weight = np.ones(1_000_000, "f4")
    numba_opt.Trainer([weight], numba_opt.NAG(momentum=0)).step([weight * 1])
    assert np.allclose(weight, 0.9)

def helpers():
    return [thread for thread in threading.enumerate() if thread.name == "numba_opt"]
"""

NO_THREADS = """
started = threading.Thread.start
def refuse(thread):
    if len(helpers()) >= ROOM:
        raise RuntimeError("can't start new thread")
    started(thread)
threading.Thread.start = refuse
for _ in range(3):
    step()
assert len(helpers()) == ROOM
threading.Thread.start = started
step()
assert len(helpers()) == 3
"""


@pytest.mark.parametrize("room", [0, 1])
def test_no_thread_can_be_made(room):
    """The step goes on with those there are, and asks again next time."""
    printed(PRELUDE + NO_THREADS.replace("ROOM", str(room)), NUMBA_NUM_THREADS="4")


LIMITED = """
import os, resource
if os.getuid() == 0:
    os.setuid(65534)  # root may always make threads
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
step()
print(len(helpers()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_system_allows_no_threads():
    """As a container's limit does; kernels come from the cache that root may read, or are compiled."""
    warmed = PRELUDE + "threads.count = lambda: 1\nstep()\nthreads.count = lambda: 2\n"
    warmed += "threads.compiled_finished()\n"
    assert printed(warmed + LIMITED).split() == ["0"]


DEAD = """
step()
assert len(helpers()) == 3
for _ in range(3):
    victim = helpers()[0]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), ctypes.py_object(SystemExit))
    deadline = time.monotonic() + 60
    while victim.is_alive():
        assert time.monotonic() < deadline
        step()  # what wakes it
    step()
    assert len(helpers()) == 3 and victim not in helpers()
"""


def test_a_helper_that_died_is_replaced():
    printed(PRELUDE + DEAD, NUMBA_NUM_THREADS="4")


def test_a_helper_that_takes_a_job_and_does_nothing_is_not_waited_for(monkeypatch):
    """Whoever has begun no piece of work holds up nobody."""
    monkeypatch.setattr(threads, "count", lambda: 2)
    monkeypatch.setattr(threads, "_jobs", type(threads._jobs)())  # nobody listens here
    weight = np.ones(1_000_000, "f4")
    done = threading.Event()

    def step():
        numba_opt.Trainer([weight], numba_opt.NAG(momentum=0)).step([weight * 1])
        done.set()

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    assert done.wait(60)
    np.testing.assert_allclose(weight, 0.9, rtol=1e-6)
