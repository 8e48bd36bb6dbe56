"""What the package does to the process that hosts it: imports, interrupts, a broken cache, and all at once.

Everything runs in processes of its own. Where nothing is said of the cache they use that of the tests.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from numba_opt.cpu import measures

from .scripts import COMPILED, TRAIN, result

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and forks")


# ---------------------------------------------------------------- imports


def test_import_compiles_nothing_and_imports_little(tmp_path):
    script = """
import json, sys
from numba.core import event

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(str(event.data))
    def on_end(self, event):
        pass

compiled = []
event.register("numba:compile", Listener())
before = set(sys.modules)
import numba_opt
from numba.np.ufunc import parallel
new = sorted(set(sys.modules) - before)
print(json.dumps({"compiled": compiled, "new": new, "layer": parallel._is_initialized}))
"""
    found = result(script, NUMBA_CACHE_DIR=tmp_path)
    assert found["compiled"] == []
    assert found["layer"] is False
    assert list(tmp_path.iterdir()) == []
    unwanted = {"torch", "cupy", "numba_cuda", "matplotlib", "scipy", "safetensors", "tqdm", "ml_dtypes"}
    assert unwanted.isdisjoint({name.partition(".")[0] for name in found["new"]})
    assert not [name for name in found["new"] if name.startswith(("numba.cuda", "numba_opt.demo"))]


def test_an_update_imports_nothing_that_it_does_not_need():
    script = """
import json, sys
import numpy as np
import numba_opt

weight = np.ones(300_000, np.float32)
numba_opt.NAG(momentum=0).update([0], [weight], [weight / 2], [None])
names = ("torch", "cupy", "numba_cuda", "numba.cuda.cudadrv", "matplotlib", "scipy.sparse", "safetensors")
print(json.dumps([name for name in names if name in sys.modules]))
"""
    assert result(script) == []


# ---------------------------------------------------------------- interrupts

# In each step every weight falls by 1, so that a weight is minus the number of steps that it has taken.
# A thread sends SIGINT at random times, and waits until the one before has been looked at.
INTERRUPTS = """
import itertools, json, os, random, signal, sys, threading, time
import numpy as np
import numba_opt
from numba_opt.compiler import cache

rng = random.Random(int(sys.argv[2]))
names, shape = [0, 1, 2], (700, 600)
options = {"learning_rate": 1.0, "momentum": 0}
exact = {**options, "sparse_update": "exact"}

def make(kind):
    optimizer = numba_opt.NAG(**(exact if kind == "exact" else options))
    optimizer.use_fused_step = kind != "unfused"
    weights = [np.zeros(shape, np.float32), np.zeros((7, 3), np.float32), np.zeros((70, 600), np.float32)]
    if kind == "strided":
        weights = [np.zeros((*weight.shape, 2), np.float32)[:, :, 0] for weight in weights]
    if kind == "double":
        weights[0] = weights[0].astype(np.float64)  # two kernels in a step
    grads = [np.ones_like(weight) for weight in weights]
    if kind == "exact":
        every = [np.arange(0, weight.shape[0], 2) for weight in weights]
        some = [numba_opt.RowSparse(r, g[r], g.shape) for r, g in zip(every, grads)]
    if kind in ("trainer", "clip"):
        limit = {"clip_global_norm": 1e9} if kind == "clip" else {}
        trainer = numba_opt.Trainer(weights, optimizer, **limit)
        return optimizer, weights, lambda: trainer.step(grads)
    states = [optimizer.create_state(i, weight) for i, weight in enumerate(weights)]
    turns = itertools.cycle([grads, some] if kind == "exact" else [grads])
    return optimizer, weights, lambda: optimizer.update(names, weights, next(turns), states)

def check(kind, optimizer, weights):
    counts = [optimizer._index_update_count.get(i, 0) for i in names]
    assert len(set(counts)) == 1, counts
    assert optimizer.num_update == counts[0]
    for weight in weights:
        even = weight[::2]
        assert (even == -counts[0]).all(), (kind, counts[0], np.unique(even))
        if kind != "exact":
            assert (weight == -counts[0]).all(), (kind, counts[0], np.unique(weight))
    return counts[0]
"""

AT_RANDOM = (
    INTERRUPTS
    + """
def send():
    while True:
        looked_at.wait()
        looked_at.clear()
        time.sleep(rng.random() * 3 * usual)
        os.kill(os.getpid(), signal.SIGINT)

kind, number = sys.argv[1], int(sys.argv[3])
optimizer, weights, step = make(kind)
for _ in range(4):  # everything is compiled then
    step()
usual = time.perf_counter()
step(), step(), step(), step()
usual = (time.perf_counter() - usual) / 4
looked_at = threading.Event()
threading.Thread(target=send, daemon=True).start()
came = 0
while came < number:
    looked_at.set()
    try:
        end = time.monotonic() + 10  # an exception that came in a destructor is heard by nobody
        while time.monotonic() < end:
            step()
    except KeyboardInterrupt:
        came += 1
        count = check(kind, optimizer, weights)
print(json.dumps([came, count]))
"""
)


@POSIX
@pytest.mark.parametrize("kind", ["update", "trainer", "clip", "strided", "double", "unfused", "exact"])
def test_interrupts_come_before_or_after_a_step(kind):
    came, count = result(AT_RANDOM, kind, 0, 100)
    assert came == 100
    assert count > 1


AT_A_KERNEL = (
    INTERRUPTS
    + """
load, sent = cache.KernelCache.load_overload, set()

def load_overload(self, sig, target):
    found = load(self, sig, target)
    if (self.name, str(self.key)) not in sent:
        sent.add((self.name, str(self.key)))
        os.kill(os.getpid(), signal.SIGINT)
    return found

cache.KernelCache.load_overload = load_overload
came = 0
for kind in sys.argv[1].split():
    optimizer, weights, step = make(kind)
    done = 0
    while done < 3:
        try:
            step()
            done += 1
        except KeyboardInterrupt:
            came += 1
            check(kind, optimizer, weights)
    check(kind, optimizer, weights)
print(json.dumps([came, len(sent)]))
"""
)


@POSIX
def test_interrupts_while_kernels_are_fetched():
    """The first step of a process compiles or loads what it needs; that too comes before the first write."""
    came, kernels = result(AT_A_KERNEL, "update double trainer clip exact", 0)
    assert 3 <= came <= kernels


# ---------------------------------------------------------------- caches that fail

SQUARES = (
    COMPILED
    + """
import json, os
import numba
import numpy as np
from numba_opt.cpu import measures, threads

def squares():
    array, total = np.ones(300_000, np.float32), np.zeros((19, 1))
    address, offsets = np.array([[array.ctypes.data, 0, 0]], np.uint64), np.array([0, array.size])
    threads.run([threads.Job(measures.squares("f32"), (address, offsets, total), array.size)])
    return int(total.sum())
"""
)

# Two small kernels, and which of them were compiled.
SMALL = SQUARES + 'print(json.dumps({"found": squares(), "compiled": sorted(compiled)}))'


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache as one process leaves it, and what that process found."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, result(SMALL, NUMBA_CACHE_DIR=folder)


def damage(path, rng):
    """Truncate a file at a random place, or change some of its bytes."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.choice([1, 1, 100])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_damaged_entries_are_compiled_again(kept, tmp_path):
    folder, first = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rng = random.Random(1)
    before = {}
    for path in sorted(tmp_path.rglob("*.nbc")):
        before[path] = path.stat().st_size
        damage(path, rng)
    assert result(SMALL, NUMBA_CACHE_DIR=tmp_path) == first
    assert result(SMALL, NUMBA_CACHE_DIR=tmp_path) == {**first, "compiled": []}
    assert sorted(tmp_path.rglob("*.*")) == sorted(before)


def test_no_damage_is_overlooked(kept, tmp_path, monkeypatch):
    folder, _ = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    kernel = measures.squares.__wrapped__("f32")
    (sig,) = kernel._cache_hits  # it was there
    path = kernel._cache._path(sig, kernel.targetctx.codegen())
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        path.write_bytes(whole)
        damage(path, rng)
        if path.read_bytes() != whole:
            assert kernel._cache.load_overload(sig, kernel.targetctx) is None
    path.write_bytes(whole)
    assert kernel._cache.load_overload(sig, kernel.targetctx) is not None


@POSIX
@pytest.mark.parametrize("home", ["/proc/nowhere", "here"])
def test_a_home_that_cannot_be_written(kept, home):
    """/proc takes no folders, not even from root."""
    _, first = kept
    env = {"HOME": home, "XDG_CACHE_HOME": "", "NUMBA_CACHE_DIR": ""}
    assert result(SMALL, **env) == first


@pytest.mark.skipif(os.name != "posix", reason="the variables are those of freedesktop.org")
@pytest.mark.parametrize("place", ["", "here"])
def test_a_cache_folder_is_never_relative(kept, tmp_path, place):
    """Else kernels would be left wherever a program happens to be started, or in the package's own folder."""
    _, first = kept
    env = {"HOME": tmp_path, "XDG_CACHE_HOME": place, "NUMBA_CACHE_DIR": ""}
    assert result(SMALL, **env) == first
    assert list((tmp_path / ".cache" / "numba_opt").glob("*.nbc"))


def test_a_full_disk(kept, tmp_path):
    _, first = kept
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)],
            capture_output=True,
            check=False,
        )
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("cannot mount a small disk")
    try:
        assert result(SMALL, NUMBA_CACHE_DIR=tmp_path) == first
        again = result(SMALL, NUMBA_CACHE_DIR=tmp_path)
        assert again["found"] == first["found"]
        assert not list(tmp_path.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SIXTEEN = (
    SQUARES
    + """
numba.njit(lambda: 1)()  # what the compiler itself needs
ready, start = os.pipe()
children = []
for _ in range(16):
    child = os.fork()
    if child == 0:
        os.close(start)
        os.read(ready, 1)
        os._exit(0 if squares() == 300_000 else 1)
    children.append(child)
os.close(start)
print(json.dumps([os.waitpid(child, 0)[1] for child in children]))
"""
)


@POSIX
def test_sixteen_processes_that_start_cold_together(tmp_path):
    assert result(SIXTEEN, NUMBA_CACHE_DIR=tmp_path) == [0] * 16
    left = [path.suffix for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [".nbc"] * 2


# ---------------------------------------------------------------- for long

SOAK = (
    TRAIN
    + """
import scipy.sparse

def sparse(steps=4):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4000, 64)).astype(np.float32)
    optimizer = numba_opt.Adamax(sparse_update="exact")
    state = optimizer.create_state(0, weight)
    for _ in range(steps):
        rows = rng.integers(0, 4000, 5000)
        values = rng.standard_normal((5000, 64), np.float32)
        optimizer.update([0], [weight], [numba_opt.RowSparse(rows, values, weight.shape)], [state])
    optimizer.flush([0], [weight], [state])
    return digest([weight])

def csr(steps=4):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((3000, 100))
    optimizer = numba_opt.GroupAdaGrad()
    state = optimizer.create_state(0, weight)
    for _ in range(steps):
        grad = scipy.sparse.random(3000, 100, 0.05, "csr", np.float64, rng)
        optimizer.update([0], [weight], [grad], [state])
    return digest([weight, state])

def trainer(steps=4):
    rng = np.random.default_rng(3)
    params = [np.ones((700, 600), np.float32), np.ones(700, np.float32), np.ones(9)]
    found = numba_opt.Trainer(params, "ftml", clip_global_norm=1.0, wd=0.01, lr_mult={"1": 0.5})
    for _ in range(steps):
        found.step([rng.standard_normal(array.shape).astype(array.dtype) for array in params])
    return digest(params)

def half(steps=4):
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(400_000).astype(np.float16)
    optimizer = numba_opt.RMSProp(multi_precision=True)
    state = optimizer.create_state_multi_precision(0, weight)
    for _ in range(steps):
        optimizer.update_multi_precision([0], [weight], [weight / 3], [state])
    return digest([weight])

dense = {name: (lambda name=name: train(name)) for name in ("nag", "ftml", "adamax", "groupadagrad")}
kinds = {"sparse": sparse, "csr": csr, "trainer": trainer, "half": half, **dense}
expected = {name: kind() for name, kind in kinds.items()}

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def work(seed, until):
    rng, done = random.Random(seed), 0
    while done < 2 or time.monotonic() < until:
        name = rng.choice(list(kinds))
        assert kinds[name]() == expected[name], name
        done += 1
    return done

def run(seconds):
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(work, range(8), [until] * 8))

seconds = float(sys.argv[1])
run(seconds / 4)  # until the allocator has what it wants
before = resident()
done = run(seconds * 3 / 4)
print(json.dumps({"rounds": done, "before": before, "after": resident()}))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_soak():
    """Eight threads, everything mixed: memory stays flat, and each result is the serial one's."""
    seconds = float(os.environ.get("NUMBA_OPT_SOAK", "4"))
    env = {"NUMBA_NUM_THREADS": 4, "MALLOC_MMAP_THRESHOLD_": 65536}  # what is freed leaves the process
    found = result(SOAK, seconds, timeout=seconds * 2 + 600, **env)
    print(found)
    assert found["rounds"] >= 16
    assert found["after"] - found["before"] < 32, found


# ---------------------------------------------------------------- without the GIL


def _free_threaded():
    """An interpreter without the GIL that has numba, or the reason why there is none."""
    names = ["python3.14t", "python3.13t"]
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return sys.executable, ""
    for python in filter(None, map(shutil.which, names)):
        if not subprocess.run([python, "-c", "import numba"], capture_output=True, check=False).returncode:
            return python, ""
    return None, f"numba has wheels for cp314t, but there is no {' or '.join(names)} with numba on the path"


def test_threads_without_the_gil():
    python, reason = _free_threaded()
    if python is None:
        pytest.skip(reason)
    script = (
        TRAIN
        + """
assert not sys._is_gil_enabled()
names = ["nag", "ftml", "adamax", "groupadagrad"] * 2
expected = [train(name) for name in names]
with ThreadPoolExecutor(8) as pool:
    found = [list(pool.map(train, names)) for _ in range(5)]
assert found == [expected] * 5
print(json.dumps(len(found)))
"""
    )
    assert result(script, python=python, PYTHON_GIL=0, NUMBA_NUM_THREADS=4) == 5
