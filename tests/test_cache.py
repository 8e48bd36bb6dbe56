"""What makes a kept kernel the right one: all that a rule reaches, and whose file it is."""

from __future__ import annotations

import math
import os
import stat
import struct
import subprocess
import sys
import types

import numba
import numpy as np
import pytest
from numba import njit
from numba.extending import overload, register_jitable

import numba_opt
from numba_opt.compiler import cache, fingerprint, private
from numba_opt.scalar import absolute, sqrt
from numba_opt.tools import info

from .scripts import COMPILED, environment, result

POSIX = pytest.mark.skipif(not private.HAS_OWNERS, reason="files have no owners here")


# ---------------------------------------------------------------- fingerprints


def made(source, **names):
    """The function `f` of a source, with some globals."""
    exec(source, names)
    return names["f"]


def using(value):
    """A function with a global."""
    return made("def f(x): return x * VALUE", VALUE=value)


def enclosing(value):
    """A function with a closure."""

    def f(x):
        return x * value

    return f


def given_by_default(value):
    def f(x):
        return x

    f.__defaults__ = (value,)
    return f


def given_by_keyword(value):
    def f(x):
        return x

    f.__kwdefaults__ = {"value": value}
    return f


def within_a_module(value):
    return made("def f(x): return x * m.inner.VALUE", m=module(inner=module(VALUE=value)))


def module(**names):
    found = types.ModuleType("m")
    vars(found).update(names)
    return found


def jitted(source, **options):
    """A function that calls a compiled one."""
    return made("def f(x): return g(x)", g=njit(**options)(made(source)))


def told(function):
    return fingerprint.look(function).complete


def digest(function):
    return fingerprint.look(function).digest


NAN, OTHER_NAN = (struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 + k))[0] for k in (0, 1))
LARGE = np.zeros(10_000)
CHANGED = LARGE.copy()
CHANGED[5_000] = 1  # which its representation leaves out

# Values that are different, though some of them are equal, or look alike.
DIFFERENT = [
    1,
    1.0,
    True,
    1 + 0j,
    "1",
    b"1",
    0.0,
    -0.0,
    complex(0.0, -0.0),
    0j,
    NAN,
    OTHER_NAN,
    None,
    (),
    [],
    frozenset(),
    (1,),
    ((1,),),
    (1, 1),
    (1.0, 10.5),
    (1.01, 0.5),
    ("a", "bc"),
    ("ab", "c"),
    ((1, 2), 3),
    (1, (2, 3)),
    frozenset({1, 2}),
    frozenset({1.0, 2}),
    {1: 2},
    {2: 1},
    {"a": {"b": 1}},
    math.pi,
    2**70,
    np.float64(1),
    np.float32(1),
    np.int64(1),
    np.dtype("f4"),
    np.dtype("f8"),
    np.array(1.0),
    np.array([1.0]),
    np.array([[1.0]]),
    np.array([1]),
    np.ones(3, "f4"),
    np.ones((2, 3)),
    np.ones((3, 2)),
    np.asfortranarray(np.ones((2, 3))),
    LARGE,
    CHANGED,
    math.sqrt,
    math.exp,
    np.sqrt,
    sqrt,
    absolute,
    abs,
    float,
    np.float32,
    numba.float32,
    numba.float64,
]


@pytest.mark.parametrize(
    "holding",
    [using, enclosing, given_by_default, given_by_keyword, within_a_module],
    ids=lambda f: f.__name__,
)
def test_different_values_have_different_fingerprints(holding):
    found = [digest(holding(value)) for value in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert found == [digest(holding(value)) for value in DIFFERENT]
    assert all(told(holding(value)) for value in DIFFERENT)


SOURCES = [
    "def f(x): return x + 1",
    "def f(x): return x + 1.0",
    "def f(x): return x + True",
    "def f(x): return x - 1",
    "def f(x): return (lambda y: y + 1)(x)",
    "def f(x): return (lambda y: y + 2)(x)",
    "def f(x): return x in (1, 2)",
    "def f(x): return x in {1, 2}",
    "def f(x, y): return x + 1",
    "def f(x, /): return x + 1",
    "def f(*x): return x + 1",
    "def f(x):\n try: return x + 1\n except Exception: return x",
    "def f(x): return g(x)",
    "def f(x): return h(x)",
    "def f(x): return m.a(x)",
    "def f(x): return m.b(x)",
    "def f(x): return f(x)",
]


def test_different_sources_have_different_fingerprints():
    for holding in (made, lambda source: made("def f(x): return g(x)", g=made(source)), jitted):
        found = [digest(holding(source)) for source in SOURCES]
        assert len(set(found)) == len(SOURCES)
        assert found == [digest(holding(source)) for source in SOURCES]


def test_where_a_source_stands_does_not_matter():
    assert digest(made("def f(x): return x + 1")) == digest(made("\n# said\n\ndef f(x):\n    return x + 1\n"))


def test_options_of_helpers():
    """Whatever a helper is compiled with is part of what calls it."""
    source = "def f(x): return x + 1"
    options = [
        {},
        {"fastmath": True},
        {"fastmath": {"nnan"}},
        {"error_model": "numpy"},
        {"inline": "always"},
        {"boundscheck": True},
        {"nogil": True},
        {"locals": {"y": numba.float32}},
        {"locals": {"y": numba.float64}},
    ]
    found = [digest(jitted(source, **given)) for given in options]
    assert len(set(found)) == len(options)
    for holding in (register_jitable, lambda function: register_jitable(fastmath=True)(function)):
        found.append(digest(made("def f(x): return g(x)", g=holding(made(source)))))
    assert len(set(found)) == len(options) + 2


def test_overloads():
    def overloaded(addend):
        def g(x):
            return x

        @overload(g)
        def compiled(x):
            return lambda x: x + addend

        return made("def f(x): return g(x)", g=g)

    assert digest(overloaded(1)) == digest(overloaded(1)) != digest(overloaded(2))


def test_nested_modules():
    def reaching(text):
        inner = module(scale=made(text), unused=object())
        return made("def f(x): return m.inner.scale(x)", m=module(inner=inner, other=object()))

    first, again = (reaching("def f(x): return x + 1") for _ in range(2))
    assert digest(first) == digest(again) != digest(reaching("def f(x): return x + 2"))
    assert told(first)  # only what is mentioned counts


def test_a_closure_of_a_module():
    def reaching(m):
        def f(x):
            return m.VALUE * x

        return f

    assert digest(reaching(module(VALUE=1))) != digest(reaching(module(VALUE=2)))


def test_recursion_and_cycles():
    ring: list = []
    ring.append(ring)
    m, n = module(), module()
    m.n, n.m = n, m
    one, two = (
        made(
            "def f(x): return g(x)",
            g=made("def f(x): return f(x) + h(x)", h=made(f"def f(x): return x + {k}")),
        )
        for k in (1, 2)
    )
    assert digest(one) != digest(two)
    for function in (using(ring), made("def f(x): return m.n.m.n.m.x", m=m)):
        assert digest(function) == digest(function)


def test_an_end_is_put_to_what_has_none():
    deep: tuple = ()
    for _ in range(5_000):
        deep = (deep,)
    chain = made("def f(x): return x")
    for _ in range(500):
        chain = made("def f(x): return g(x)", g=chain)
    for function in (using(deep), using(tuple(range(100_000))), chain):
        assert not told(function)
        assert digest(function) == digest(function)


class Opaque:
    pass


@pytest.mark.parametrize(
    "value",
    [Opaque(), Opaque, [Opaque()], np.array([None]), {"a": (Opaque(),)}, iter(())],
    ids=lambda v: type(v).__name__,
)
def test_what_cannot_be_told_is_not_kept(value):
    for function in (using(value), enclosing(value), within_a_module(value)):
        assert not told(function)
        assert digest(function) == digest(function)
        key = cache.fingerprint(function)
        assert cache.fingerprint(function) != key  # not even in this process are two kernels taken for one
        place = cache.place("name", ("key", key))
        assert cache.read(place) is None
        with pytest.raises(OSError, match=r"."):
            cache.write(place, b"content")


def test_helpers_that_were_compiled_before():
    """Numba keeps what they were compiled with, which may be other than it is now."""
    source = "def f(x): return x * FACTOR"
    new, used, kept = (njit(made(source, FACTOR=2.0)) for _ in range(3))
    used(1.0)
    kept._cache = object()  # as if it had a cache of Numba's, which misses edits of other files
    plain = njit(made("def f(x): return x * 2"))
    plain(1.0)
    calling = [made("def f(x): return g(x)", g=helper) for helper in (new, used, kept, plain)]
    assert list(map(told, calling)) == [True, False, False, True]
    new(1.0)
    assert told(calling[0])  # it was seen before
    new.py_func.__globals__["FACTOR"] = 3.0
    assert not told(made("def f(x): return g(x) + 1", g=new))


def test_a_function_that_changes():
    function = using(1.0)
    first = fingerprint.fingerprint(function)
    found = fingerprint.look(function)
    assert found.unmoved()
    function.__globals__["VALUE"] = float("1")  # another object that means the same
    assert not found.unmoved()
    assert fingerprint.look(function).unmoved()
    assert fingerprint.fingerprint(function) == first
    function.__globals__["VALUE"] = 2.0
    for ask in (fingerprint.look, fingerprint.fingerprint):
        with pytest.raises(fingerprint.ChangedError, match="is not the one of its first use in this process"):
            ask(function)


def test_closures_and_attributes_are_watched():
    value, m = 1.0, module(VALUE=1.0)

    def f(x):
        return value * x

    g = made("def f(x): return m.VALUE * x", m=m)
    before = [fingerprint.look(function) for function in (f, g)]
    assert all(found.unmoved() for found in before)
    value, m.VALUE = 2.0, 2.0
    assert not any(found.unmoved() for found in before)


# ---------------------------------------------------------------- no process gets another one's stale kernel

TRAIN = (
    COMPILED
    + """
import json, sys
import numpy as np
import numba_opt
import helpers, pkg
from pkg import mod
from numba_opt.compiler import cache

def using_a_module(weight, grad, lr):
    return (weight - helpers.scale(grad),)

def using_a_package(weight, grad, lr):
    return (weight - pkg.mod.scale(grad),)

def using_a_constant(weight, grad, lr):
    return (weight - helpers.PAIR[1] * grad,)

def using_a_registered_one(weight, grad, lr):
    return (weight - helpers.registered(grad),)

def using_what_changes(weight, grad, lr):
    return (weight - helpers.early(grad),)

class Own(numba_opt.Optimizer):
    def hyper(self, lr, t):
        return (lr,)

if len(sys.argv) > 1:
    helpers.LATER = float(sys.argv[1])
found = {}
for rule in (using_a_module, using_a_package, using_a_constant, using_a_registered_one, using_what_changes):
    optimizer, weight = Own(), np.zeros(2, np.float32)
    optimizer.rule = rule
    del compiled[:]
    optimizer.fused_step([0], [weight], [np.ones(2, np.float32)], [None])
    found[rule.__name__] = [-float(weight[0]), "kernel" in compiled]
print(json.dumps(found))
"""
)

HELPERS = """
from numba import njit
from numba.extending import register_jitable

FACTOR = 1.0
PAIR = (1.0, 10.5)
LATER = 4.0

@njit
def inner(x):
    return FACTOR * x

@njit
def scale(x):
    return inner(x)

@register_jitable
def registered(x):
    return FACTOR * x

@njit
def early(x):
    return LATER * x
"""

EARLY = """
import numpy as np
early(np.float32(1))  # compiled, with what is LATER now
"""


def test_edits_of_what_rules_reach(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    module, helpers = tmp_path / "pkg" / "mod.py", tmp_path / "helpers.py"
    module.write_text("from numba import njit\n\n@njit\ndef scale(x):\n    return x * 2\n")
    helpers.write_text(HELPERS + EARLY)
    settings = {"cwd": tmp_path, "NUMBA_CACHE_DIR": tmp_path / "cache", "PYTHONDONTWRITEBYTECODE": 1}
    names = [
        "using_a_module",
        "using_a_package",
        "using_a_constant",
        "using_a_registered_one",
        "using_what_changes",
    ]
    first = result(TRAIN, 3.0, **settings)
    assert first == dict(zip(names, [[f, True] for f in (1.0, 2.0, 10.5, 1.0, 4.0)], strict=True))
    # a constant that was changed after its helper had been compiled is nobody else's business
    helpers.write_text(HELPERS)
    second = result(TRAIN, 3.0, **settings)
    assert second == dict(
        zip(names, [[1.0, False], [2.0, False], [10.5, False], [1.0, False], [3.0, True]], strict=True)
    )
    edited = HELPERS.replace("FACTOR = 1.0", "FACTOR = 7.0").replace("(1.0, 10.5)", "(1.01, 0.5)")
    helpers.write_text(edited)
    module.write_text(module.read_text().replace("x * 2", "x * 5"))
    third = result(TRAIN, 3.0, **settings)
    assert third == dict(
        zip(names, [[7.0, True], [5.0, True], [0.5, True], [7.0, True], [3.0, False]], strict=True)
    )


# ---------------------------------------------------------------- whose files they are


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where an entry goes, in a cache of a test's own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return cache.place("name", "key")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def everything_under(path):
    return sorted(path.rglob("*"))


@POSIX
@pytest.mark.parametrize("umask", [0, 0o22, 0o77, 0o277, 0o777])
def test_what_is_made_is_this_users_alone(place, tmp_path, umask):
    before = os.umask(umask)
    try:
        cache.write(place, b"content")
    finally:
        os.umask(before)
    assert {mode(path) for path in (place.parent, *place.parent.parents[:2])} == {0o700}
    assert [mode(path) for path in everything_under(place.parent)] == [0o600]
    assert cache.read(place) == b"content"
    assert private.distrusted(place.parent) == ""


@POSIX
@pytest.mark.parametrize("bits", [0o620, 0o602, 0o660, 0o666])
def test_an_entry_that_others_may_write(place, bits):
    cache.write(place, b"content")
    place.chmod(bits)
    inode = place.stat().st_ino
    with place.open("rb") as held:
        assert cache.read(place) is None
        cache.write(place, b"again")  # another file takes its place
        assert held.read().endswith(b"content")
    assert (mode(place), place.stat().st_ino == inode) == (0o600, False)
    assert cache.read(place) == b"again"


@POSIX
def test_an_entry_that_others_may_read(place):
    cache.write(place, b"content")
    place.chmod(0o644)
    place.parent.chmod(0o755)
    assert cache.read(place) == b"content"


def untouched(place):
    """Whether nothing is read, and nothing written."""
    before = [(path, path.lstat().st_mtime_ns) for path in everything_under(place.parent)]
    read = cache.read(place)
    with pytest.raises(OSError, match=r"."):
        cache.write(place, b"again")
    return read is None and before == [
        (path, path.lstat().st_mtime_ns) for path in everything_under(place.parent)
    ]


@POSIX
@pytest.mark.parametrize("bits", [0o720, 0o702, 0o775, 0o777, 0o1777])
def test_a_folder_that_others_may_write(place, bits):
    cache.write(place, b"content")
    place.parent.chmod(bits)
    assert untouched(place)
    assert private.distrusted(place.parent) == f"others may write to {place.parent} (mode {bits:o})"


@POSIX
def test_somebody_elses_folder(place, monkeypatch):
    cache.write(place, b"content")
    owner, me = place.parent.stat().st_uid, os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: me)
    assert untouched(place)
    assert (
        private.distrusted(place.parent) == f"{place.parent} belongs to user {owner}, and this is user {me}"
    )


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_somebody_elses_file_in_ones_own_folder(place):
    cache.write(place, b"content")
    os.chown(place, 12345, -1)
    assert cache.read(place) is None
    cache.write(place, b"again")
    assert cache.read(place) == b"again"
    os.chown(place.parent, 12345, -1)
    assert untouched(place)


@POSIX
def test_a_parent_that_everybody_may_write(place):
    """Where others can rename the folder, they can put another one there, unless that is sticky."""
    cache.write(place, b"content")
    parent = place.parents[1]
    parent.chmod(0o777)
    assert untouched(place)
    assert private.distrusted(place.parent) == (
        f"everybody may write to {parent} (mode 777), and it has no sticky bit"
    )
    parent.chmod(0o1777)
    assert cache.read(place) == b"content"
    parent.chmod(0o755)
    place.parents[2].chmod(0o777)  # here nobody can rename the folder itself
    assert cache.read(place) == b"content"


@POSIX
def test_a_folder_that_is_a_link(place, tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir(0o700)
    place.parents[1].mkdir(parents=True)
    place.parent.symlink_to(real)
    cache.write(place, b"content")
    assert cache.read(place) == b"content"
    if os.geteuid() == 0:
        os.lchown(place.parent, 12345, -1)
        assert untouched(place)
        assert "is a link of user 12345" in private.distrusted(place.parent)


@POSIX
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_no_plain_file(place, tmp_path, kind):
    cache.write(place, b"content")
    moved = place.replace(tmp_path / "moved")
    {
        "link": lambda: place.symlink_to(moved),
        "dangling link": lambda: place.symlink_to(tmp_path / "nowhere"),
        "pipe": lambda: os.mkfifo(place, 0o600),
        "folder": place.mkdir,
    }[kind]()
    assert cache.read(place) is None  # at once: nobody will write into the pipe
    if kind != "folder":
        cache.write(place, b"again")
        assert cache.read(place) == b"again"
        assert not (tmp_path / "nowhere").exists()
        assert not place.is_symlink()
    assert moved.read_bytes().endswith(b"content")
    assert len(everything_under(place.parent)) == 1


@POSIX
def test_a_distrusted_cache_is_said_and_does_no_harm(place, capsys):
    from numba_opt.tools import cli

    cache.write(place, b"content")
    found = info.cache_usage()
    assert (found["entries"], found["trusted"], found["why"]) == (1, True, "")
    place.parent.chmod(0o770)
    found = info.cache_usage()
    reason = f"others may write to {place.parent} (mode 770)"
    assert (found["entries"], found["trusted"], found["why"]) == (1, False, reason)
    assert cli.main(["info"]) == 0
    assert f", not trusted, as {reason}: kernels are compiled in each process" in capsys.readouterr().out
    assert not sys.modules["numba_opt.tools.warmup"]._writable()  # which is what a warm-up says at its end
    assert place.parent.joinpath(place.name).exists()
    assert len(everything_under(place.parent)) == 1
    assert cli.main(["warmup", "--clear"]) == 0
    assert everything_under(place.parent) == []
    assert private.distrusted(place.parent) == reason


@POSIX
def test_a_process_does_not_unpickle_what_others_may_have_written(tmp_path):
    script = (
        COMPILED
        + """
import json, os, sys
os.umask(0)
import numpy as np, numba_opt
numba_opt.NAG(momentum=0).update([0], [np.ones(2)], [np.ones(2)], [None])
print(json.dumps("kernel" in compiled))
"""
    )
    settings = {"NUMBA_CACHE_DIR": tmp_path / "cache"}
    assert result(script, **settings) is True
    assert result(script, **settings) is False
    folder = tmp_path / "cache" / "numba_opt"
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    folder.chmod(0o777)
    assert result(script, **settings) is True


# ---------------------------------------------------------------- without a compiler

WITHOUT = "numba_opt needs Numba's compiler: unset NUMBA_DISABLE_JIT, or numba.config.DISABLE_JIT in Python"


@pytest.mark.parametrize("how", ["environment", "config"])
@pytest.mark.parametrize("name", ["numba_opt", "numba_opt.torch", "numba_opt.scalar"])
def test_without_a_compiler(how, name):
    script = "import numba\nnumba.config.DISABLE_JIT = True\n" if how == "config" else ""
    env = environment(**({"NUMBA_DISABLE_JIT": 1} if how == "environment" else {}))
    done = subprocess.run(
        [sys.executable, "-c", f"{script}import {name}"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {WITHOUT}"


def test_a_compiler_that_is_switched_off_later(monkeypatch):
    class Own(numba_opt.Optimizer):
        def rule(weight, grad, lr):  # noqa: N805
            return (weight - 3 * lr * grad,)

        def hyper(self, lr, t):
            return (lr,)

    weight = np.ones(3)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    with pytest.raises(RuntimeError, match="numba_opt needs Numba's compiler"):
        Own().fused_step([0], [weight], [np.ones(3)], [None])
    assert weight.tolist() == [1, 1, 1]
