"""What else a program may do with a trainer: copy it, step it twice at once, interrupt it, take it apart."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import numba_opt
from numba_opt import RowSparse, Trainer
from numba_opt.core.turn import Turn
from numba_opt.cpu.deferred import DeferredSteps
from numba_opt.trainer.trainer import UNASKED

from . import table
from .scripts import result
from .test_trainer import snapshot

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals of Windows are others")


def made(**options):
    """A trainer of two small arrays that has taken a step, and its gradients."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype("f4") for shape in ((6, 3), (4,))]
    grads = [rng.standard_normal(w.shape).astype("f4") for w in weights]
    trainer = Trainer(weights, "adamax", **options)
    trainer.step(grads)
    return trainer, grads


# -------------------------------------------------------------------- copies

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda trainer: pickle.loads(pickle.dumps(trainer))}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@copies
def test_a_copy_goes_on_by_itself(copied):
    trainer, grads = made(clip_global_norm=0.5, lr_mult={"1": 0.25})
    trainer.accumulate(grads)
    other, before = copied(trainer), snapshot(trainer)
    assert snapshot(other) == before
    other.step(grads)
    assert snapshot(trainer) == before
    trainer.step(grads)
    assert snapshot(other) == snapshot(trainer)
    assert other.grad_norm == trainer.grad_norm


@copies
def test_a_copy_outlives_the_original(copied):
    trainer, grads = made()
    expected, other = copied(trainer), copied(trainer)
    expected.step(grads)
    del trainer
    gc.collect()
    junk = [np.full((6, 3), np.nan, "f4") for _ in range(100)]
    other.step(grads)
    assert snapshot(other) == snapshot(expected)
    assert np.isnan(junk).all()


@copies
def test_a_copy_has_rows_to_catch_up_and_rates_of_its_own(copied):
    weight, grad = np.ones((8, 3)), RowSparse([1, 5], np.ones((2, 3)), (8, 3))
    rates = {0: SimpleNamespace(lr_mult=0.5, wd_mult=2.0)}
    optimizer = numba_opt.NAG(sparse_update="exact", wd=0.1, param_dict=rates)
    trainer = Trainer([weight], optimizer)
    for _ in range(3):
        trainer.step([grad])
    other = copied(trainer)
    for one in (trainer, other):
        one.step([np.ones((8, 3))])
    assert snapshot(other) == snapshot(trainer)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(made()[0])


# -------------------------------------------------------------------- parts that cannot be replaced


@pytest.mark.parametrize("name", ["optimizer", "params", "states"])
def test_parts_cannot_be_replaced(name):
    trainer, grads = made()
    before = snapshot(trainer)
    with pytest.raises(AttributeError, match=name):
        setattr(trainer, name, getattr(made()[0], name))
    if name != "optimizer":
        with pytest.raises(TypeError, match="item assignment"):
            getattr(trainer, name)["0"] = np.zeros((6, 3), "f4")
    assert snapshot(trainer) == before
    trainer.step(grads)


def test_an_optimizer_of_two_trainers_is_refused():
    optimizer = numba_opt.NAG()
    first = Trainer([np.ones(3)], optimizer)
    with pytest.raises(ValueError, match="belongs to another Trainer"):
        Trainer([np.ones(3)], optimizer)
    first.step([np.ones(3)])
    Trainer([np.ones(3)], copy.deepcopy(optimizer)).step([np.ones(3)])
    del first
    gc.collect()
    Trainer([np.ones(3)], optimizer).step([np.ones(3)])


@pytest.mark.parametrize("name", UNASKED)
def test_a_method_that_a_trainer_would_not_call_is_refused(name):
    kind = type("Own", (numba_opt.NAG,), {name: lambda self, *args: 0.0})
    with pytest.raises(TypeError, match=f"Own has a {name} of its own"):
        Trainer([np.ones(3)], kind())


@pytest.mark.parametrize("name", ["_get_lr", "_get_wd"])
def test_an_update_asks_for_a_subclass_s_own_rates(name):
    """As MXNet's classes do, and after the update has been counted."""
    asked = []

    class Own(numba_opt.NAG):
        pass

    def rate(self, index):
        asked.append((index, self.num_update))
        return {"_get_lr": 0.5, "_get_wd": 0.25}[name] * (index + 1)

    setattr(Own, name, rate)
    weights = [np.ones(2), np.ones(2)]
    optimizer = Own(learning_rate=1, momentum=0)
    optimizer.update([0, 1], weights, [np.ones(2), np.ones(2)], [None, None])
    assert asked == [(0, 1), (1, 1)]
    assert optimizer.num_update == 1
    expected = [0.5, 0.0] if name == "_get_lr" else [-0.25, -0.5]
    assert [w[0] for w in weights] == expected


# -------------------------------------------------------------------- two callers at once


def test_threads_take_turns():
    """Each of 4 threads makes 50 steps; every weight falls by 1 in each of them."""
    weights = [np.zeros((700, 300), "f4"), np.zeros(5, "f4")]
    trainer = Trainer(weights, "nag", learning_rate=1, momentum=0)
    grads = [np.ones_like(weight) for weight in weights]
    barrier, errors = threading.Barrier(4), []

    def work():
        barrier.wait()
        try:
            for k in range(50):
                trainer.step([grads[0], grads[1] if k % 2 else None])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (weights[0] == -200).all()
    assert (weights[1] == -100).all()
    assert trainer.optimizer.num_update == 200


class Nested:
    """A scheduler that uses the trainer which asks it."""

    def __init__(self, use):
        self.use = use

    def __call__(self, num_update):
        if self.use:
            self.use()
        return 1.0


@pytest.mark.parametrize("method", ["step", "accumulate", "flush", "load_state_dict"])
def test_a_call_within_a_call_is_refused_and_changes_nothing(method):
    scheduler = Nested(None)
    trainer = Trainer([np.zeros(3)], "nag", lr_scheduler=scheduler, momentum=0)
    before = trainer.state_dict()
    arguments = {"step": ([np.ones(3)],), "accumulate": ([np.ones(3)],), "load_state_dict": (before,)}
    errors = []

    def use():
        with pytest.raises(RuntimeError, match="in use already") as info:
            getattr(trainer, method)(*arguments.get(method, ()))
        errors.append(info.value)

    scheduler.use = use
    trainer.step([np.ones(3)])
    assert errors
    scheduler.use = None
    trainer.step([np.ones(3)])
    assert trainer.params["0"].tolist() == [-2, -2, -2]


def test_a_handler_may_save_what_is_whole(tmp_path):
    """Something is saved from within a step, as a handler of SIGTERM does."""
    scheduler = Nested(None)
    trainer = Trainer([np.zeros(3)], "nag", lr_scheduler=scheduler, momentum=0)
    trainer.step([np.ones(3)])
    scheduler.use = lambda: trainer.save(tmp_path / "saved")
    trainer.step([np.ones(3)])
    scheduler.use = None
    found = Trainer([np.zeros(3)], "nag", lr_scheduler=Nested(None), momentum=0)
    found.load(tmp_path / "saved")
    assert (found.params["0"] == -1).all()
    assert found.optimizer.num_update == 1


def test_a_scheduler_that_changes_row_numbers():
    """It is asked before they are looked at."""
    rows = np.array([0, 2])
    weight = np.zeros((4, 2))

    def scheduler(num_update):
        rows[:] = [1 << 40, -(1 << 40)] if wild else [0, 2]
        return 1.0

    trainer = Trainer([weight], "nag", lr_scheduler=scheduler, momentum=0)
    optimizer = numba_opt.NAG(lr_scheduler=scheduler, momentum=0)
    grad = RowSparse(rows, np.ones((2, 2)), (4, 2))
    calls = [
        lambda: trainer.step([grad]),
        lambda: optimizer.update([0], [weight], [grad], [None]),
        lambda: numba_opt.get_updater(optimizer)(0, grad, weight),
    ]
    for call in calls:
        wild = True
        with pytest.raises(ValueError, match="rows of gradient of parameter"):
            call()
        wild = False
        call()
    assert weight[:, 0].tolist() == [-3, 0, -3, 0]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no forks here")
def test_a_child_forked_while_another_thread_steps():
    """The lock that the thread held is not the child's."""
    script = """
import os, threading, sys
import numpy as np, numba_opt
trainer = numba_opt.Trainer([np.zeros(3)], "nag", momentum=0, learning_rate=1)
trainer.step([np.ones(3)])
inside, leave = threading.Event(), threading.Event()
def scheduler(num_update):
    if threading.current_thread() is not threading.main_thread():
        inside.set()
        leave.wait()
    return 1.0
trainer.optimizer.lr_scheduler = scheduler
thread = threading.Thread(target=lambda: trainer.step([np.ones(3)]))
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    trainer.step([np.ones(3)])
    os._exit(0 if (trainer.params["0"] == -2).all() else 1)
_, status = os.waitpid(child, 0)
leave.set()
thread.join()
print(1 if status == 0 and (trainer.params["0"] == -2).all() else 0)
"""
    assert result("import warnings; warnings.simplefilter('ignore')\n" + script) == 1


def test_a_turn_is_pickled_as_a_new_one():
    turn = Turn()
    claim = turn.claim("it")
    other = pickle.loads(pickle.dumps(turn))
    kept = other.claim("it")
    with pytest.raises(RuntimeError, match="it is in use already"):
        other.claim("it")
    assert other.claim("it", again=True) is kept
    del kept
    other.claim("it")
    del claim


# -------------------------------------------------------------------- handlers and profilers that raise

# A handler raises at random times. In each step every weight falls by 1, where it has a gradient.
AT_RANDOM = """
import json, random, signal, sys, time
import numpy as np, numba_opt

kind = sys.argv[1]
rng = random.Random(1)
class Limit(Exception):
    pass
def handler(number, frame):
    raise Limit
options = {"learning_rate": 1.0, "momentum": 0, "use_fused_step": kind != "unfused"}
if kind.startswith("exact"):
    options["sparse_update"] = "exact"
if kind == "exact-unfused":
    options["use_fused_step"] = False
weights = [np.zeros((300, 20), np.float32), np.zeros((7, 3), np.float32), np.zeros((70, 6))]
trainer = numba_opt.Trainer(weights, numba_opt.NAG(**options))
grads = [np.ones_like(w) for w in weights]
if kind.startswith("exact"):
    some = [np.arange(0, len(w), 2) for w in weights]
    rows = [numba_opt.RowSparse(r, g[r], g.shape) for r, g in zip(some, grads)]
elif kind == "sparse":
    twice = [np.tile(np.arange(len(g))[::-1], 2) for g in grads]
    rows = [numba_opt.RowSparse(r, g[r] / 2, g.shape) for r, g in zip(twice, grads)]
else:
    rows = grads
def calls(k):
    if kind == "accumulate":
        trainer.accumulate(rows)
        trainer.step()
    elif kind == "load":
        trainer.load_state_dict(trainer.state_dict())
        trainer.step(grads)
    else:
        trainer.step(rows if k % 5 else grads)
        if kind.startswith("exact") and k % 7 == 0:
            trainer.flush()

def check():
    sums = trainer._totals is not None
    n = trainer.optimizer.num_update
    counts = set(trainer.optimizer._index_update_count.values())
    assert counts <= {n}, (counts, n)
    for weight in weights:
        even = weight[::2] if kind.startswith("exact") else weight
        assert (even == -n).all(), (kind, n, np.unique(even))
    return n

for k in range(8):  # everything is compiled then
    calls(k)
usual = time.perf_counter()
for k in range(4):
    calls(k)
usual = (time.perf_counter() - usual) / 4
signal.signal(signal.SIGALRM, handler)
came = 0
while came < int(sys.argv[2]):
    try:
        k = 0
        signal.setitimer(signal.ITIMER_REAL, rng.random() * 3 * usual + 1e-5)
        end = time.monotonic() + 10  # an exception that came in a destructor is heard by nobody
        while time.monotonic() < end:
            calls(k)
            k += 1
    except Limit:
        came += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    if kind == "accumulate":
        trainer._totals = None
    check()
calls(0), calls(1)
print(check() > 0)
"""

KINDS = ["dense", "sparse", "unfused", "exact", "exact-unfused", "accumulate", "load"]


@POSIX
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_whole_whatever_a_handler_raises(kind):
    script = AT_RANDOM.replace("print(check() > 0)", "import json; print(json.dumps(bool(check() > 0)))")
    assert result(script, kind, 150) is True


@pytest.mark.parametrize("kind", ["dense", "unfused", "exact", "clip", "accumulate"])
def test_a_step_is_whole_whatever_a_profiler_raises(kind):
    """It raises at the n-th event of a step, for each n."""

    class StopError(Exception):
        pass

    options = {"sparse_update": "exact"} if kind == "exact" else {}
    optimizer = numba_opt.NAG(learning_rate=1, momentum=0, use_fused_step=kind != "unfused", **options)
    weights = [np.zeros((6, 2), "f4"), np.zeros((5, 3))]
    trainer = Trainer(weights, optimizer, clip_global_norm=1e9 if kind == "clip" else None)
    grads = [np.ones_like(weight) for weight in weights]
    if kind == "exact":
        grads = [RowSparse(np.arange(len(g)), g, g.shape) for g in grads]

    def step():
        if kind == "accumulate":
            trainer.accumulate(grads)
            trainer.step()
        else:
            trainer.step(grads)

    step(), step()
    for n in range(10_000):
        left = n

        def profile(frame, event, arg):
            nonlocal left
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise StopError

        try:
            sys.setprofile(profile)
            step()
            sys.setprofile(None)
            break
        except StopError:
            pass
        finally:
            sys.setprofile(None)
        trainer._totals = None
        count = optimizer.num_update
        assert set(optimizer._index_update_count.values()) == {count}
        for weight in weights:
            assert (weight == -count).all(), (n, count)
    assert n > 20
    assert optimizer.num_update > 2


def test_floating_point_errors_of_the_program_do_not_cut_a_step():
    """`np.seterr(all="raise")`, and a learning rate that float32 cannot hold."""
    weights = [np.ones(3), np.ones(3, "f4"), np.ones(3)]
    optimizer = numba_opt.NAG(learning_rate=1e300, momentum=0, use_fused_step=False)
    trainer = Trainer(weights, optimizer)
    before = table.content(weights)
    with np.errstate(all="raise"):
        try:
            trainer.step([np.ones(3), np.ones(3, "f4"), np.ones(3)])
        except FloatingPointError:
            assert (table.content(weights), optimizer.num_update) == (before, 0)
        else:
            assert optimizer.num_update == 1
            assert all((weight < 0).all() for weight in weights)


def test_a_handler_s_exception_waits_for_the_compiler_or_comes_before(tmp_path):
    """Handlers of any signal, not of SIGINT alone, are called once the compiler has ended."""
    script = """
import json, os, signal
import numpy as np, numba_opt
from numba.core import event

class Sender(event.Listener):
    left = 2
    def on_start(self, event):
        if self.left:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGUSR1)
    def on_end(self, event):
        pass

def handler(number, frame):
    raise SystemExit(7)

came = done = 0
weight = np.zeros(3)
trainer = numba_opt.Trainer([weight], "nag", momentum=0, learning_rate=1)
signal.signal(signal.SIGUSR1, handler)
sender = Sender()
event.register("numba:llvm_lock", sender)
while not done:
    try:
        trainer.step([np.ones(3)])
        done = 1
    except SystemExit:
        came += 1
        assert trainer.optimizer.num_update == -weight[0]
print(json.dumps([came > 0, weight.tolist()]))
"""
    if sys.platform == "win32":
        pytest.skip("no SIGUSR1")
    came, weight = result(script, NUMBA_CACHE_DIR=tmp_path)
    assert came
    assert len(set(weight)) == 1


# -------------------------------------------------------------------- a history that has an end


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
def test_rows_that_nobody_touches_catch_up_in_time(fused, monkeypatch):
    """The history stays below some limit, and the weights are those of a dense run."""
    monkeypatch.setattr(DeferredSteps, "LIMIT", 16)
    monkeypatch.setattr(DeferredSteps, "TRIM", 8)
    rng = np.random.default_rng(0)
    weight, other = (np.ones((37, 3)) for _ in range(2))
    options = {"learning_rate": 0.1, "wd": 0.05, "use_fused_step": fused}
    exact = Trainer([weight], numba_opt.NAG(sparse_update="exact", **options))
    dense = Trainer([other], numba_opt.NAG(sparse_update="dense", **options))
    longest = 0
    for _ in range(200):
        rows = rng.choice(20, 2, replace=False)  # rows from 20 on are never touched
        grad = RowSparse(rows, rng.standard_normal((2, 3)), weight.shape)
        exact.step([grad])
        dense.step([grad])
        longest = max(longest, exact.optimizer._deferred[0].recorded)
    assert 16 <= longest <= 64
    exact.flush()
    np.testing.assert_array_equal(weight, other)
