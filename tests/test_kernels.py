"""What is compiled, when, and where it is kept. Everything runs in processes with a cache of their own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import numba_opt

from . import table
from .scripts import ROOT, result
from .test_machine_code import assert_vectorised

# Every process begins with this: `made` are the kernels, `compiled` the names of those that were compiled
# rather than found in the cache.
PRELUDE = """
import json, sys
import numpy as np
from numba.core import event
from numba_opt.compiler import cache

made, compiled, plain = [], [], cache.compiled

def record(function, *args, **kwargs):
    made.append(plain(function, *args, **kwargs))
    return made[-1]

class Listener(event.Listener):
    def on_start(self, event):
        dispatcher = event.data["dispatcher"]
        if isinstance(getattr(dispatcher, "_cache", None), cache.KernelCache):
            compiled.append(dispatcher.py_func.__name__)
    def on_end(self, event):
        pass

cache.compiled = record
event.register("numba:compile", Listener())

import numba_opt
from numba_opt.scalar import sign
"""

# Both paths on the table's rows; `difference` shows where a kernel is not the rule.
ROWS = """
from tests import table

def check(name, dtype="float32"):
    row = table.row(name)
    call = table.make(row, [(30, 20), (7, 5)], dtype)
    expected = call.copy()
    table.build(row).fused_step(*call)
    table.build(row).step(*expected)
    for a, b in zip(table.outputs(call), table.outputs(expected), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6), f"{name} went wrong"
    return call.weights[0].ravel()[:5].tolist()
"""


def process(cache, script, *args, package=ROOT, rows=True):
    """The JSON that a script prints last."""
    source = PRELUDE + (ROWS if rows else "") + script
    settings = {"NUMBA_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": 1}
    return result(source, *args, cwd=cache, root=package, **settings)


def entries(cache):
    """The compiled kernels on disk, with what tells whether they were written anew."""
    return {path.name: path.stat().st_mtime_ns for path in Path(cache).rglob("*.nbc")}


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- the disk cache

RUN = """
found = {name: check(name) for name in sys.argv[1:]}
print(json.dumps({"found": found, "compiled": sorted(compiled)}))
"""


@pytest.fixture(scope="module")
def first():
    """What a process finds that needs all rows' kernels, which are in the suite's own cache afterwards."""
    return process(os.environ["NUMBA_CACHE_DIR"], RUN, *(row.id for row in table.TABLE))["found"]


@pytest.fixture
def filled(first, tmp_path):
    """A copy of that cache, for a test to change."""
    return shutil.copytree(os.environ["NUMBA_CACHE_DIR"], tmp_path / "filled")


@pytest.fixture
def found(first):
    """What a process must find for some rows."""
    return lambda names: {name: first[name] for name in names}


def test_a_second_process_compiles_nothing(first, filled):
    files = entries(filled)
    assert len(files) >= len(first) - 1  # two rows share a rule
    assert process(filled, RUN, *first) == {"found": first, "compiled": []}
    assert entries(filled) == files


def test_kernels_of_different_processes_work_together(filled):
    """One process compiles one kernel, the next another; a third finds both in the cache, apart.

    Numba names a compiled function by its qualified name, a number that counts from 1 in every process, and
    its argument types, which are all the same for kernels of one precision.
    """
    for path in filled.rglob("dense-*.nbc"):
        path.unlink()
    names, alone = ["nag", "rmsprop", "adamax", "ftml"], {}
    for name in names:
        found = process(filled, RUN, name)
        assert len(found["compiled"]) == 1
        alone |= found["found"]
    for order in (1, -1):
        together = process(filled, RUN, *names[::order])
        assert together == {"found": alone, "compiled": []}


def test_damaged_entries_are_compiled_again(filled, found):
    for path in filled.rglob("*.nbc"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    second = process(filled, RUN, "adamax")
    assert second["compiled"]
    assert second["found"] == found(["adamax"])
    assert process(filled, RUN, "adamax") == {**second, "compiled": []}


def test_no_place_for_a_cache(cache):
    """A cache that cannot be written costs time, never more."""
    nowhere = cache / "file"
    nowhere.write_text("")
    script = "import numba\nnumba.config.CACHE_DIR = " + repr(str(nowhere)) + RUN
    assert process(cache, script, "adamax")["compiled"]
    assert entries(cache) == {}


# ---------------------------------------------------------------- editing


@pytest.fixture
def package(tmp_path):
    """A copy of the package, for a test to edit."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "numba_opt", folder / "numba_opt", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(package, file, old, new):
    path = package / "numba_opt" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


NAMES = ["nag", "rmsprop-centered", "adamax"]


def test_editing_a_rule_recompiles_just_that_rule(filled, found, package):
    files, before = entries(filled), found(NAMES)
    edit(package, "optimizers/rmsprop.py", "maximum(var - mean * mean, 0)", "maximum(var - mean * mean, 1)")
    after = process(filled, RUN, *NAMES, package=package)
    assert len(after["compiled"]) == 1
    assert [name for name in NAMES if after["found"][name] != before[name]] == ["rmsprop-centered"]
    grown = entries(filled)
    assert len(grown) == len(files) + 1
    assert files.items() <= grown.items()
    edit(package, "optimizers/rmsprop.py", "maximum(var - mean * mean, 1)", "maximum(var - mean * mean, 0)")
    assert process(filled, RUN, *NAMES, package=package) == {"found": before, "compiled": []}


def test_editing_a_comment_recompiles_nothing(filled, found, package):
    edit(package, "optimizers/adamax.py", "def adamax(", "# a remark\n\n\ndef adamax(")
    assert process(filled, RUN, *NAMES, package=package) == {"found": found(NAMES), "compiled": []}


# The kernel alone: an edited vocabulary may well make the two paths disagree.
FUSED = """
def fused(name):
    row = table.row(name)
    call = table.make(row, [(30, 20), (7, 5)])
    table.build(row).fused_step(*call)
    return call.weights[0].ravel()[:5].tolist()
""" + RUN.replace("check(name)", "fused(name)")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("scalar.py", "abs(x)", "abs(x) + x * 0 + 1"),  # what rules are written with
        ("compiler/elements.py", "clip(rescale * grad, bound)", "clip(rescale * grad * 2, bound)"),
    ],
)
def test_editing_what_rules_call_recompiles(filled, found, package, file, old, new):
    edit(package, file, old, new)
    after = process(filled, FUSED, "adamax", package=package)
    assert after["compiled"]
    assert after["found"] != found(["adamax"])


# ---------------------------------------------------------------- an optimizer of one's own

LION = """
class Lion(numba_opt.Optimizer):
    state_names = ("mom",)

    def __init__(self, learning_rate=0.01, beta1=0.9, beta2=0.99, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta1, self.beta2 = beta1, beta2

    def rule(weight, grad, mom, lr, beta1, rest1, beta2, rest2):
        return weight - lr * sign(beta1 * mom + rest1 * grad), beta2 * mom + rest2 * grad

    def hyper(self, lr, t):
        return lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2

def train(path, dtype, size):
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(size).astype(dtype)
    optimizer = Lion(wd=0.1)
    state = optimizer.create_state(0, weight)
    for _ in range(3):
        grad = rng.standard_normal(size).astype(dtype)
        getattr(optimizer, path)([0], [weight], [grad], [state])
    return weight, state

found = {}
for dtype in ("float32", "float64"):
    for size in (1000, 500_000):
        for path in ("step", "fused_step"):
            weight, state = train(path, dtype, size)
            found[f"{dtype} {size} {path}"] = weight[:1000].tolist() + state[-1000:].tolist()
code = [["".join(text.values()) for text in (k.inspect_asm(), k.inspect_llvm())] for k in made if compiled]
print(json.dumps({"found": found, "compiled": sorted(compiled), "code": code}))
"""


def lion(dtype, size):
    """The same in NumPy and float64."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(size).astype(dtype).astype("f8")
    mom = np.zeros(size)
    for _ in range(3):
        grad = rng.standard_normal(size).astype(dtype) + 0.1 * weight
        weight = weight - 0.01 * np.sign(0.9 * mom + 0.1 * grad)
        mom = 0.99 * mom + 0.01 * grad
    return np.concatenate([weight[:1000], mom[-1000:]])


def test_an_optimizer_of_ones_own(cache):
    first = process(cache, LION, rows=False)
    for key, found in first["found"].items():
        dtype, size, _ = key.split()
        assert found == first["found"][f"{dtype} {size} step"]
        np.testing.assert_allclose(found, lion(dtype, int(size)), atol=1e-6 if dtype == "float32" else 1e-14)
    assert first["compiled"]
    (code,) = (code for code in first["code"] if re.search(r"fmul <\d+ x float>", code[1]))
    assert_vectorised(*code, "fsub")
    files = entries(cache)
    second = process(cache, LION, rows=False)
    assert second["compiled"] == []
    assert second["found"] == first["found"]
    assert entries(cache) == files
    changed = process(cache, LION.replace("weight - lr", "weight + lr"), rows=False)
    assert changed["compiled"]
    assert changed["found"] != first["found"]
    assert files.items() <= entries(cache).items()


# ---------------------------------------------------------------- sizes


def available_memory():
    """GiB that may be used; infinite where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return np.inf
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.mark.large
@pytest.mark.skipif(available_memory() < 8, reason="needs 8 GiB of free memory")
def test_more_elements_than_2_to_the_31():
    size = 2**31 + 70_001
    places = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, size - 1]
    weight, grad = np.zeros(size, np.float16), np.zeros(size, np.float16)
    grad[places] = np.arange(1, len(places) + 1)
    small, small_grad = np.ones(5, np.float16), np.ones(5, np.float16)
    optimizer = numba_opt.NAG(0.5, momentum=0)
    optimizer.update([0, 1], [weight, small], [grad, small_grad], [None, None])
    assert weight[places].tolist() == [-0.5 * k for k in range(1, len(places) + 1)]
    assert np.count_nonzero(weight.view(np.uint16)) == len(places)
    assert small.tolist() == [0.5] * 5


# ---------------------------------------------------------------- Ctrl-C


INTERRUPTED = """
import signal

def three():
    return 3

def save(self, sig, data):
    signal.raise_signal(signal.SIGINT)
    saved.append(str(sig))

saved = []
cache.KernelCache.save_overload = save
kernel = plain(three, "test")
try:
    kernel()
    came = False
except KeyboardInterrupt:
    came = True
print(json.dumps([came, saved, kernel()]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_waits_for_the_compiler(tmp_path):
    """Where it comes while LLVM calls Python, it would be lost."""
    assert process(tmp_path, INTERRUPTED, rows=False) == [True, ["()"], 3]
