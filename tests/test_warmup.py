"""`numba_opt.warmup`: what it makes is all that a program needs, by whichever process it is made."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import numba_opt
from numba_opt.compiler import cache
from numba_opt.tools import crew, wanted

from .scripts import COMPILED, awaited, environment, result

PRELUDE = (
    COMPILED
    + """
import json, os, sys
import numpy as np
import numba_opt

from numba_opt.tools import crew as work
"""
)


def process(script, *args, **env):
    """The JSON that a script prints last."""
    return result(PRELUDE + script, *args, **env)


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


# ---------------------------------------------------------------- what is kept is light to load

LOGARITHM = """
from numba_opt.scalar import exp, log

class Entropic(numba_opt.Optimizer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rule = rule
    def hyper(self, lr, t):
        return (lr,)

def rule(weight, grad, lr):
    return (exp(log(weight) - lr * grad),)

if sys.argv[1] == "missing":
    import llvmlite.binding
    llvmlite.binding.address_of_symbol = lambda name: None
weight = np.linspace(0.1, 2, 40)
optimizer = Entropic()
optimizer.update([0], [weight], [weight - 1], [optimizer.create_state(0, weight)])
heavy = "numba.np.linalg" in sys.modules
print(json.dumps([compiled, heavy, weight.tolist()]))
"""


def test_kept_kernels_find_the_functions_that_they_call(tmp_path):
    """Numba's registries, which take long to load, come in only where a kernel calls what nobody knows."""
    compiled, _, expected = process(LOGARITHM, "all", NUMBA_CACHE_DIR=tmp_path)
    assert compiled
    for symbols in ("all", "missing"):
        compiled, heavy, weight = process(LOGARITHM, symbols, NUMBA_CACHE_DIR=tmp_path)
        assert (compiled, weight) == ([], expected)
        assert heavy == (symbols == "missing")
    assert any(name.startswith("dense-rule-") for name in files(tmp_path))


# ---------------------------------------------------------------- nothing is left to compile

EVERYTHING = """
import warnings
import scipy.sparse

warnings.simplefilter("ignore")  # half precision without float32 copies
numba_opt.warmup(progress=False)
numba_opt.warmup("nag", "float16")
numba_opt.warmup([numba_opt.NAG(sparse_update="exact"), numba_opt.NAG(momentum=0)], "float64")
before = len(compiled)
rng = np.random.default_rng(0)

def gradients(dtype, shape=(6, 4)):
    dense = rng.standard_normal(shape).astype(dtype)
    yield dense
    yield numba_opt.RowSparse([4, 1, 4], dense[:3], shape)
    if dtype in ("float32", "float64"):
        csr = scipy.sparse.csr_array(np.triu(dense))
        yield csr
        wide = csr.copy()
        wide.indices, wide.indptr = wide.indices.astype("i8"), wide.indptr.astype("i8")
        yield wide

def train(optimizer, dtype, grads=None):
    weight = rng.standard_normal((6, 4)).astype(dtype)
    options = {"clip_global_norm": 1.0}
    trainer = numba_opt.Trainer([weight], optimizer, **options)
    for grad in grads or gradients(dtype):
        trainer.step([grad])
    trainer.accumulate([next(gradients(dtype))])
    trainer.step()
    trainer.flush()
    large = rng.standard_normal((4096, 64)).astype(dtype)
    state = optimizer.create_state_multi_precision("large", large)
    optimizer.update_multi_precision(["large"], [large], [large / 2], [state])
    return float(np.abs(weight.astype("f8")).sum())

numbers = []
for cls, options in (
    (numba_opt.NAG, {}),
    (numba_opt.NAG, {"momentum": 0}),
    (numba_opt.RMSProp, {}),
    (numba_opt.RMSProp, {"centered": True}),
    (numba_opt.Adamax, {}),
    (numba_opt.FTML, {}),
    (numba_opt.FTML, {"reduced": True}),
    (numba_opt.GroupAdaGrad, {}),
):
    numbers.append(train(cls(**options), "float32"))
for options in ({}, {"multi_precision": True}):
    numbers.append(train(numba_opt.NAG(**options), "float16"))
numbers.append(train(numba_opt.NAG(multi_precision=True), "float16", [np.ones((6, 4), "f4")]))
numbers.append(train(numba_opt.NAG(sparse_update="exact"), "float64"))
numbers.append(train(numba_opt.NAG(momentum=0), "float64"))
print(json.dumps({"numbers": numbers, "compiled": compiled[before:]}))
"""


def test_nothing_is_left_to_compile():
    found = process(EVERYTHING)
    assert found["compiled"] == []
    assert np.isfinite(found["numbers"]).all()


# ---------------------------------------------------------------- who compiles

FEW = """
work.SHARE, work.cores = 1, lambda: 3
summary = numba_opt.warmup(["nag", "adamax"], sparse=False)
again = numba_opt.warmup(["nag", "adamax"], sparse=False)
print(json.dumps({"summary": summary, "again": again[:2], "compiled": compiled, "text": str(summary)}))
"""
# Wait until two others have something to do, however long they take to start.
THEY_COME = """
import time

hire = work.Work._hire

def hire_and_wait(self):
    before = len(self.shared)
    hire(self)
    while len(self.shared) > before - 2:
        time.sleep(0.01)

work.Work._hire = hire_and_wait
"""
KERNELS = 6  # two for arrays and threads, one for norms, three rules


def test_other_processes_join_in_and_the_next_one_loads_all(tmp_path):
    first = process(THEY_COME + FEW, NUMBA_CACHE_DIR=tmp_path)
    folder = str(tmp_path / "numba_opt")
    assert first["summary"][:2] == [KERNELS, 0]
    assert first["summary"][3:] == [folder, True]
    assert first["text"].startswith(f"{KERNELS} kernels compiled, 0 loaded in ")
    assert first["text"].endswith(f" s; kept in {folder}")
    assert first["again"] == [0, KERNELS]
    names = files(tmp_path)
    assert all(name.endswith(".nbc") for name in names)
    assert first["compiled"].count("kernel") < 4  # somebody else compiled the others
    second = process(FEW, NUMBA_CACHE_DIR=tmp_path)
    assert second["summary"][:2] == [0, KERNELS]
    assert second["compiled"] == []
    assert files(tmp_path) == names


def test_other_processes_that_die(tmp_path):
    """Nobody to help: one interpreter ends at once, another one is none."""
    script = """
names = iter([sys.executable + "w", "/bin/false"])
start = work.subprocess.Popen
work.subprocess.Popen = lambda command, **options: start([next(names), *command[1:]], **options)
"""
    found = process(script + FEW, NUMBA_CACHE_DIR=tmp_path)
    assert found["summary"][:2] == [KERNELS, 0]
    assert found["compiled"].count("kernel") == 4


def test_no_place_for_a_cache(tmp_path):
    (tmp_path / "file").touch()
    script = """
work.subprocess.Popen = None  # what nobody could read is not made elsewhere
summary = numba_opt.warmup(numba_opt.NAG(), sparse=False)
print(json.dumps({"summary": summary, "text": str(summary)}))
"""
    found = process(script, NUMBA_CACHE_DIR=tmp_path / "file")
    assert found["summary"][:2] == [4, 0]
    assert found["summary"][4] is False
    assert found["text"].endswith(f"; none can be kept in {tmp_path / 'file' / 'numba_opt'}")


def test_an_optimizer_of_ones_own(tmp_path):
    """Its rule is compiled here: nobody else imports the program."""
    (tmp_path / "mine.py").write_text("""
import numba_opt

with open(__file__ + ".imported", "a") as file:
    file.write("once ")

def rule(weight, grad, lr):
    return (weight - lr * grad - lr,)

@numba_opt.register
class Mine(numba_opt.Optimizer):
    rule = staticmethod(rule)
    def hyper(self, lr, t):
        return (lr,)
""")
    script = """
sys.path.insert(0, sys.argv[1])
import mine
work.SHARE, work.cores = 1, lambda: 2
summary = numba_opt.warmup(["mine", "nag"], sparse=False)
before = len(compiled)
weight = np.ones(3, np.float32)
mine.Mine(learning_rate=0.25).update([0], [weight], [weight.copy()], [None])
print(json.dumps({"summary": summary, "later": compiled[before:], "weight": weight.tolist()}))
"""
    found = process(script, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")
    assert found["summary"][0] == 6
    assert found["later"] == []
    assert found["weight"] == [0.5] * 3
    assert (tmp_path / "mine.py.imported").read_text() == "once "


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt(tmp_path):
    """One line, nothing half-written, nobody left behind."""
    env = environment(NUMBA_CACHE_DIR=tmp_path)
    command = [sys.executable, "-m", "numba_opt", "warmup"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as running:
        awaited(lambda: files(tmp_path), "a kernel")
        if crew.cores() > 1 and Path("/proc/self/task").exists():
            awaited(lambda: _children(running.pid), "another process")
        children = _children(running.pid)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
    assert err == "numba-opt warmup: interrupted\n"
    assert running.returncode == 130
    assert all(name.endswith(".nbc") for name in files(tmp_path))
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    """The processes that a process has started, from whichever of its threads; none where nobody says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = path.read_text().rpartition(")")[2].split()[1]
            found += [path.parent.name] * (int(parent) == pid)
    return found


# ---------------------------------------------------------------- the bar


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_on_a_terminal(shown):
    import fcntl
    import pty
    import struct
    import termios

    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    script = "import numba_opt, sys; numba_opt.warmup('nag', sparse=False, progress=sys.argv[1] == 'True')"
    found = bytearray()

    def read():  # meanwhile: a terminal that nobody reads takes no more than a few kilobytes
        while not found.endswith(b"end"):
            found.extend(os.read(ours, 10_000))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    command = [sys.executable, "-c", script, str(shown)]
    subprocess.run(command, env=environment(), stderr=theirs, timeout=300, check=True)
    os.write(theirs, b"end")
    reader.join(60)
    assert (b"kernels:" in found) == shown
    assert shown or found == b"end"
    os.close(ours)
    os.close(theirs)


def test_no_bar_without_a_terminal_or_tqdm(capsys, monkeypatch):
    numba_opt.warmup("nag", sparse=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    numba_opt.warmup("nag", sparse=False)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- arguments


def layouts(*args, **kwargs):
    """What would be made: the makers' names with their last arguments."""
    variants, codes = wanted.variants(args[0]), wanted.codes(args[1])
    kernels = wanted.cpu_kernels(variants, codes, kwargs.get("sparse", True))
    return [
        (name, *(getattr(argument, "text", argument) for argument in arguments))
        for name, *(_, *arguments) in (kernel for kernel in kernels if kernel[0] in ("dense", "rows"))
    ]


def test_an_instance_means_itself():
    assert layouts(numba_opt.NAG(momentum=0), "float32", sparse=False) == [("dense", "f32 f32")]
    assert layouts(numba_opt.NAG(multi_precision=True), "float16", sparse=False) == [
        ("dense", "f16 f32 f32 f16"),
        ("dense", "f32 f32 f32 f16"),
    ]
    assert layouts(numba_opt.NAG(), "float16", sparse=False) == [("dense", "f16 f16 f16")]
    assert layouts(numba_opt.NAG(sparse_update="dense"), "float64") == [("dense", "f64 f64 f64")]
    assert layouts(numba_opt.NAG(sparse_update="exact"), "float64") == [
        ("dense", "f64 f64 f64"),
        ("rows", "f64 f64", "block f64", True),
        ("rows", "f64 f64", "csr f64", True),
        ("rows", "f64 f64", "none", True),
    ]


def test_a_class_or_a_name_means_all_variants():
    expected = [("dense", "f32 f32 f32"), ("dense", "f32 f32 f32 f32 f32")]
    for given in (numba_opt.RMSProp, "rmsprop", [numba_opt.RMSProp], ("RMSProp",)):
        assert layouts(given, "float32", sparse=False) == expected
    assert set(layouts("rmsprop", ["float32", "float64"])) < set(layouts(None, ["float32", "float64"]))


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("f4"), ["float32", np.float32]])
def test_dtypes_by_name_or_as_objects(dtype):
    assert wanted.codes(dtype) == ["f32"]


def test_dtypes_of_other_packages():
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    found = wanted.codes([torch.bfloat16, ml_dtypes.bfloat16, torch.float64, "bfloat16"])
    assert found == ["bf16", "f64"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"optimizers": "nix"}, ValueError, "name must be one of .*NAG.*, got 'nix'"),
        ({"optimizers": [3]}, TypeError, "optimizers must be optimizers, .*, got 3"),
        ({"optimizers": int}, TypeError, "got <class 'int'>"),
        ({"dtypes": "int8"}, ValueError, "dtypes must be among float32, .*, got 'int8'"),
        ({"dtypes": ["float32", np.int64]}, ValueError, "got <class 'numpy.int64'>"),
        ({"devices": "tpu"}, ValueError, "devices must be 'cpu', 'cuda', .*, got 'tpu'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        numba_opt.warmup(**kwargs)


def test_an_optimizer_without_a_rule_has_nothing_to_compile():
    class Still(numba_opt.Optimizer):
        def step(self, indices, weights, grads, states):
            pass

    assert layouts(Still(), "float32") == []


def test_a_registered_class_that_needs_arguments_is_left_out(monkeypatch):
    class Needy(numba_opt.Optimizer):
        def __init__(self, needed):
            super().__init__()

    monkeypatch.setitem(numba_opt.Optimizer.opt_registry, "needy", Needy)
    assert layouts(None, "float32")
    with pytest.raises(TypeError, match="needed"):
        layouts("needy", "float32")


def test_devices_and_the_folder():
    summary = numba_opt.warmup("nag", devices=["cpu"], sparse=False)
    assert summary.folder == str(cache.folder())
